"""PSNR, SSIM and MSE: of the whole, of the edited part and of the background, in two ways of counting a part.

By area: over the part's own pixels, so that a small edit counts as much as a large one. PIE-Bench's way (Ju et al. 2023,
PnP Inversion, arXiv 2310.01506): both pictures are blackened outside the part, and the whole of them is compared; the smaller
the part, the better the number, and the background is held against the *source*.
"""

from collections.abc import Callable

from torch import Tensor

from eval.scores.fidelity import mse, psnr, ssim, ssim_map
from eval.scores.metrics.metric import Example, Scores


def _mse(prediction: Tensor, target: Tensor) -> float:
    return 1000 * mse(prediction, target)


_FUNCTIONS: dict[str, Callable[[Tensor, Tensor], float]] = {"psnr": psnr, "ssim": ssim, "mse": _mse}


class Pixels:
    """PSNR, SSIM and MSE. They need no weights."""

    def __call__(self, example: Example) -> Scores:
        prediction, target, background = example.prediction, example.target, example.background
        whole, similarity = ssim_map(prediction, target)
        scores = {"psnr": psnr(prediction, target), "ssim": whole, "mse": _mse(prediction, target)}
        if background is None:
            return scores
        for part, region, held_against in (
            ("_edited", ~background, target),
            ("_background", background, example.source),
        ):
            if region.any():
                inside = prediction[:, region], target[:, region]
                scores |= {f"psnr{part}": psnr(*inside), f"mse{part}": _mse(*inside)}
                scores[f"ssim{part}"] = similarity[region].mean().item()
                masked = prediction * region, held_against * region
                scores |= {f"{name}{part}_pie": function(*masked) for name, function in _FUNCTIONS.items()}
        return scores
