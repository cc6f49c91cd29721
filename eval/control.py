"""Control: maps of a picture's edges or depth, given as a further reference, and how much they count."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from skimage.color import rgb2gray
from skimage.feature import canny
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModelForDepthEstimation

from data_prep.errors import InputError
from eval.request import Control
from eval.samplers import Velocity
from losses.batch import Condition

DEPTH_MODEL = "depth-anything/Depth-Anything-V2-Small-hf"
"""Where no other is named. 25 M parameters, Apache-2.0; the larger ones of the family may not be used commercially."""


class DepthModel:
    """Depth-Anything (arXiv 2406.09414): how near everything in a picture is.

    Args:
        model: transformers' DepthAnythingForDepthEstimation.
        processor: its image processor.
    """

    def __init__(self, model: Any, processor: Any):
        self.model, self.processor = model, processor

    @torch.no_grad()
    def nearness(self, image: Image.Image) -> np.ndarray:
        """1 at the nearest point of an RGB image, 0 at the farthest, float32 (H, W); 0 everywhere if nothing differs."""
        inputs = self.processor(images=image, return_tensors="pt").to(self.model.device, self.model.dtype)
        sizes = [(image.height, image.width)]
        depth = self.processor.post_process_depth_estimation(self.model(**inputs), target_sizes=sizes)[0][
            "predicted_depth"
        ]
        near = depth.float()
        if self.model.config.depth_estimation_type == "metric":
            near = 1 / near.clamp_min(1e-3)  # metres; the others predict inverse depth
        near = near - near.min()
        return (near / near.max().clamp_min(torch.finfo(near.dtype).tiny)).cpu().numpy()


def load_depth_model(path: str | None = None, device: torch.device | str = "cpu") -> DepthModel:
    """Reads a Depth-Anything model in transformers' layout, frozen, in float32.

    Args:
        path: a folder or a hub id; None: the environment's DEPTH_MODEL, or else Depth-Anything-V2-Small.

    Raises:
        InputError: it is neither, cannot be had, or is of another kind.
    """
    path = path or os.environ.get("DEPTH_MODEL") or DEPTH_MODEL
    try:
        kind = AutoConfig.from_pretrained(path).model_type
        if kind != "depth_anything":
            raise InputError(f"{path} is a {kind} model: a depth map needs a Depth-Anything one, such as {DEPTH_MODEL}")
        processor: Any = AutoImageProcessor.from_pretrained(path)
        model = AutoModelForDepthEstimation.from_pretrained(path, dtype=torch.float32)
    except OSError as error:
        raise InputError(
            f"no depth model at {path}: name a folder that holds one with --depth-model or DEPTH_MODEL, or fetch it where "
            f"there is a network with `hf download {DEPTH_MODEL}`"
        ) from error
    return DepthModel(model.to(device).requires_grad_(False).eval(), processor)


def make_map(control: Control, image: Image.Image, depth: DepthModel | None = None) -> Image.Image:
    """A map of an RGB image, white on black, as an RGB image of its size.

    Args:
        depth: needed for depth alone.
    """
    if control.kind == "depth":
        assert depth is not None
        values = depth.nearness(image)
    else:
        grey = rgb2gray(np.asarray(image))
        values = canny(grey, sigma=1.5)
    return Image.fromarray((np.asarray(values, dtype=np.float32) * 255).round().astype(np.uint8)).convert("RGB")


@dataclass(frozen=True)
class Strengthened:
    """A denoiser in which controls count as much as they should, for one condition; others pass through.

    With the velocity v of the condition without controls and vᵢ of the one with control i alone, it gives
    v + Σ strengthᵢ·(vᵢ − v) (Composable Diffusion, arXiv 2206.01714, eq. 11). Only what counts is called: a single control
    of strength 1 costs one call, of strength 0 as well. Wrap it again for the negative condition.
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
