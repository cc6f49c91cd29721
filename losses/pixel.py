"""Terms in pixel space, on the target that the bridge predicts."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from losses.randomness import SampleRandom

Decode = Callable[[Tensor], Tensor]
"""Latents (B, 16, h, w) -> pixels (B, 3, 8h, 8w) in about [-1, 1], differentiable."""


class PixelTerm:
    """L1 and a perceptual distance between decoded crops of the predicted and the true target.

    Args:
        l1: weight of the mean absolute difference.
        lpips: weight of `perceptual`.
        perceptual: pixels, pixels -> (B,) or (B, 1, 1, 1), for example `lpips.LPIPS(net="vgg")` (Zhang et al., arXiv
            1801.03924); needed when `lpips` is not 0.
        crop: side in latent cells of the random square that is decoded; None decodes everything.

    Raises:
        ValueError: no weight is positive, a weight is negative, `perceptual` is missing, or `crop` is not positive.
    """

    def __init__(
        self,
        l1: float = 1.0,
        lpips: float = 0.0,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
        crop: int | None = 32,
    ):
        if not (0 <= l1 < math.inf and 0 <= lpips < math.inf and l1 + lpips > 0):
            raise ValueError(f"l1 and lpips must be 0 or more and not both 0, got {l1} and {lpips}")
        if lpips > 0 and perceptual is None:
            raise ValueError(f"lpips={lpips} needs perceptual, a distance such as {{_target_: lpips.LPIPS, net: vgg}}")
        if crop is not None and crop < 1:
            raise ValueError(f"crop must be positive or null, got {crop}")
        self.l1 = l1
        self.lpips = lpips
        self.perceptual = perceptual
        self.crop = crop

    def __call__(self, predicted: Tensor, target: Tensor, decode: Decode, generator: SampleRandom) -> dict[str, Tensor]:
        """The weighted terms by name, each (B,), from predicted and true latents (B, 16, h, w)."""
        pixels = decode(self._cropped(predicted, generator))
        with torch.no_grad():
            expected = decode(self._cropped(target, generator))
        terms = {}
        if self.l1:
            terms["pixel_l1"] = self.l1 * (pixels - expected).abs().flatten(1).mean(1)
        if self.lpips and self.perceptual is not None:
            if isinstance(self.perceptual, torch.nn.Module):
                self.perceptual.to(pixels.device)
            terms["pixel_lpips"] = self.lpips * self.perceptual(pixels, expected).reshape(len(pixels))
        return terms

    def _cropped(self, latents: Tensor, generator: SampleRandom) -> Tensor:
        """Each sample's own random square."""
        height, width = latents.shape[-2:]
        if self.crop is None or (self.crop >= height and self.crop >= width):
            return latents
        sides = min(self.crop, height), min(self.crop, width)
        room = torch.tensor([height - sides[0] + 1, width - sides[1] + 1])
        corners = (generator.uniform("crop", (2,)) * room).long().tolist()
        squares = [
            sample[:, y : y + sides[0], x : x + sides[1]] for sample, (y, x) in zip(latents, corners, strict=True)
        ]
        return torch.stack(squares)
