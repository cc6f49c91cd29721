"""How close a picture is to the one that it should be, without any weights."""

import statistics
from typing import Any

import torch
from skimage.metrics import structural_similarity
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchmetrics.functional.regression import mean_squared_error

MAX_PSNR = 100.0
"""dB, stands for equal pictures, whose PSNR is infinite: means stay finite and JSON valid. 8-bit noise is at 59 dB."""


def compare(prediction: Tensor, target: Tensor, background: Tensor | None = None) -> dict[str, float]:
    """Scores one picture, as a validation during training does.

    Args:
        prediction: RGB pixels in [0, 1], (3, H, W).
        target: what it should be, the same.
        background: True where the picture must stay as it was, (H, W), or None without a mask.

    Returns:
        `psnr` (dB) and `ssim` of the whole; with a mask also `psnr_edited` and `psnr_background`, each without the
        pixels of the other, and absent where it has no pixel at all.
    """
    scores = {
        "psnr": psnr(prediction, target),
        "ssim": ssim(prediction, target),
    }
    if background is not None:
        for name, region in (("psnr_edited", ~background), ("psnr_background", background)):
            if region.any():
                scores[name] = psnr(prediction[:, region], target[:, region])
    return scores


def mse(prediction: Tensor, target: Tensor) -> float:
    """Mean square of the difference of values in [0, 1]."""
    return float(mean_squared_error(prediction.contiguous(), target.contiguous()))


def psnr(prediction: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio of values in [0, 1] in dB, at most MAX_PSNR."""
    if torch.equal(prediction, target):
        return MAX_PSNR
    return min(MAX_PSNR, float(peak_signal_noise_ratio(prediction, target, data_range=1.0)))


def ssim(prediction: Tensor, target: Tensor) -> float:
    """Structural similarity of RGB pictures (3, H, W) in [0, 1]: Gaussian windows of 11 pixels, sigma 1.5, wherever one fits."""
    return ssim_map(prediction, target)[0]


def ssim_map(prediction: Tensor, target: Tensor) -> tuple[float, Tensor]:
    """`ssim`, and its value around every pixel, (H, W)."""
    arrays = (
        pixels.double().numpy() for pixels in (prediction, target)
    )  # float32 rounds the variances of smooth areas
    found: Any = structural_similarity(
        *arrays, channel_axis=0, data_range=1.0, gaussian_weights=True, use_sample_covariance=False, full=True
    )
    mean, full = found
    return float(mean), torch.from_numpy(full).mean(0)


def mean_scores(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over the rows that have it."""
    values: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            values.setdefault(name, []).append(value)
    return {name: statistics.fmean(some) for name, some in values.items()}
