"""Control: maps of a picture's edges or depth, given as a further reference, and how much they count."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from skimage.color import rgb2gray, rgb2lab
from skimage.feature import canny
from torch import Tensor

from eval.qwen.depth import DepthModel
from eval.qwen.samplers import Velocity
from eval.request.knobs import Control
from losses.batch import Condition


def make_map(control: Control, image: Image.Image, depth: DepthModel | None = None) -> Image.Image:
    """A map of an RGB image, white on black (or near on far), as an RGB image of its size.

    Args:
        depth: needed for a map of depth, and for that alone.
    """
    if control.kind == "depth":
        assert depth is not None
        values = depth.nearness(image)
    else:
        values = {"canny": canny_edges, "lines": soft_lines}[control.kind](np.asarray(image))
    return Image.fromarray((values * 255).round().astype(np.uint8)).convert("RGB")


def canny_edges(pixels: np.ndarray, weak: float = 0.75, strong: float = 0.9, floor: float = 0.1) -> np.ndarray:
    """Canny's edges: 1 on lines one pixel wide, 0 elsewhere.

    Args:
        pixels: RGB, uint8 (H, W, 3).
        weak, strong: the two thresholds, as quantiles of the picture's gradients, so that a dim photograph has as many
            lines as a bright one. Chosen by eye on photographs: higher ones tear outlines, lower ones draw every hair.
        floor: the strong threshold is at least this (the step from 0 to 1 is 8, unsmoothed), so that a picture of nothing
            has no lines.

    Returns:
        Float32 (H, W).
    """
    grey, sigma = rgb2gray(pixels), max(1.0, min(pixels.shape[:2]) / 320)
    smooth = ndimage.gaussian_filter(grey, sigma)
    slope = np.hypot(ndimage.sobel(smooth, 0), ndimage.sobel(smooth, 1))  # as skimage's canny measures it
    low, high = (max(np.quantile(slope, share), least) for share, least in ((weak, floor / 2), (strong, floor)))
    return canny(grey, sigma, low, high).astype(np.float32)


def soft_lines(pixels: np.ndarray, scales: Sequence[float] = (1, 2, 4), white: float = 98) -> np.ndarray:
    """Lines as a drawing would have them: 1 where a clear edge is, less the fainter it is.

    It stands for a learned detector (HED, arXiv 1504.06375) without its weights: colour edges that show at every scale, which
    outlines do and texture does not, thinned to their crests.

    Args:
        pixels: RGB, uint8 (H, W, 3).
        scales: widths of the edges, multiples of 1/512 of the shorter side.
        white: this percentile of what is found, or 3 units of CIELAB where that is more, becomes white.

    Returns:
        Float32 (H, W) in [0, 1].
    """
    lab, base = rgb2lab(pixels / np.float32(255)), max(0.7, min(pixels.shape[:2]) / 512)
    edges = [_colour_edges(lab, base * scale) for scale in scales]
    steady = np.prod([strength for strength, _ in edges], axis=0) ** (1 / len(edges))
    total = sum(strength for strength, _ in edges)
    thinned = steady * sum(crest for _, crest in edges) / np.maximum(total, 1e-6)
    lines = ndimage.gaussian_filter(thinned, max(0.6, base / 2))
    return np.clip(lines / max(np.percentile(lines, white), 3.0), 0, 1).astype(np.float32)


def _colour_edges(lab: np.ndarray, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Strength of the edges at a scale of `sigma` pixels in CIELAB units, (H, W), and the same on their crests alone.

    Di Zenzo 1986 (A note on the gradient of a multi-image), scale-normalised as Lindeberg 1998 (Edge detection and ridge
    detection with automatic scale selection).
    """
    smooth = ndimage.gaussian_filter(lab, (sigma, sigma, 0))
    down, across = (sigma * np.asarray(np.gradient(smooth, axis=axis)) for axis in (0, 1))
    xx, xy, yy = (across**2).sum(-1), (across * down).sum(-1), (down**2).sum(-1)
    strength = np.sqrt((xx + yy + np.hypot(xx - yy, 2 * xy)) / 2)
    angle = np.arctan2(2 * xy, xx - yy) / 2  # of the steepest direction
    reach = max(1.0, sigma)
    step = reach * np.stack([np.sin(angle), np.cos(angle)])
    here = np.indices(strength.shape, dtype=np.float32)
    beside = [ndimage.map_coordinates(strength, here + way * step, order=1, mode="nearest") for way in (1, -1)]
    lead = (strength - np.maximum(*beside)) / np.maximum(strength, 1e-6)
    return strength, strength * np.clip(4 * lead, 0, 1)


@dataclass(frozen=True)
class Strengthened:
    """A denoiser in which controls count as much as they should, for one condition; others pass through.

    With the velocity v of the condition without controls and vᵢ of the one with control i alone, it gives
    v + Σ strengthᵢ·(vᵢ − v) (Composable Diffusion, arXiv 2206.01714). Only what counts is called: a single control costs one
    call at strength 1 or 0 and two at others. For classifier-free guidance wrap it again, for the negative condition: else a
    control of strength 0 still counts there.
    """

    denoiser: Velocity
    base: Condition
    """Without controls: the very object that the sampler asks for, already on its device."""
    controlled: Sequence[Condition]
    """The same with one control each."""
    strengths: Sequence[float]

    def __call__(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """As the denoiser: latents (B, 16, h, w), sigma (B,) -> velocity (B, 16, h, w)."""
        if condition is not self.base:
            return self.denoiser(latents, sigma, condition)
        shares = [1 - sum(self.strengths), *self.strengths]
        terms = [
            share * self.denoiser(latents, sigma, term)
            for share, term in zip(shares, [self.base, *self.controlled], strict=True)
            if share
        ]
        return torch.stack(terms).sum(0)
