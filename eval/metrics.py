"""How close a picture is to the one that it should be."""

import statistics

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

MAX_PSNR = 100.0
"""dB, stands for equal pictures, whose PSNR is infinite: means stay finite and JSON valid. 8-bit noise is at 59 dB."""


def compare(prediction: Tensor, target: Tensor, background: Tensor | None = None) -> dict[str, float]:
    """Scores one picture.

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


def psnr(prediction: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio of values in [0, 1] in dB, at most MAX_PSNR."""
    if torch.equal(prediction, target):
        return MAX_PSNR
    return min(MAX_PSNR, float(peak_signal_noise_ratio(prediction, target, data_range=1.0)))


def ssim(prediction: Tensor, target: Tensor) -> float:
    """Structural similarity of RGB pictures (3, H, W) in [0, 1]: Gaussian window of 11 pixels, sigma 1.5."""
    batches = prediction[None].double(), target[None].double()  # float32 rounds the small variances of smooth areas
    value = structural_similarity_index_measure(*batches, data_range=1.0)
    assert isinstance(value, Tensor)
    return value.item()


def mean_scores(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over the rows that have it."""
    values: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            values.setdefault(name, []).append(value)
    return {name: statistics.fmean(some) for name, some in values.items()}
