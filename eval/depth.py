"""Depth of a picture by Depth-Anything, a model of its own beside the base."""

import os
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoModelForDepthEstimation

from data_prep.errors import InputError
from eval.places import find_model

DEPTH_MODEL = "DEPTH_MODEL"
"""Environment variable: which depth model, where no other is named."""
DEFAULT_DEPTH_MODEL = "depth-anything/Depth-Anything-V2-Small-hf"
"""25 M parameters, Apache-2.0; the larger ones of the family have a licence that forbids commercial use."""


class DepthModel:
    """How near everything in a picture is (Depth-Anything V2, arXiv 2406.09414).

    Args:
        model: transformers' DepthAnythingForDepthEstimation.
        processor: its image processor.
    """

    def __init__(self, model: Any, processor: Any):
        self.model, self.processor = model, processor

    @torch.no_grad()
    def nearness(self, image: Image.Image) -> np.ndarray:
        """1 at the nearest point of an RGB image, 0 at the farthest, float32 (H, W); 0 everywhere if all is as near."""
        inputs = self.processor(images=image, return_tensors="pt").to(self.model.device)
        sizes = [(image.height, image.width)]
        near = self.processor.post_process_depth_estimation(self.model(**inputs), sizes)[0]["predicted_depth"]
        if self.model.config.depth_estimation_type == "metric":
            near = 1 / near.clamp_min(1e-3)  # metres; relative models predict inverse depth
        farthest, span = near.min(), near.max() - near.min()
        if span <= 1e-5 * near.abs().max():  # rounding, which must not be stretched to a picture
            return np.zeros(near.shape, np.float32)
        return ((near - farthest) / span).clamp(0, 1).cpu().numpy()


def load_depth_model(path: str | None = None, device: torch.device | str = "cpu") -> DepthModel:
    """Reads a Depth-Anything model in transformers' layout, frozen, in float32.

    Args:
        path: a folder, also below `$MODEL_DIR`, or a hub id; None: `$DEPTH_MODEL`, or else DEFAULT_DEPTH_MODEL.

    Raises:
        InputError: it is none, cannot be had, or is of another kind.
    """
    path = find_model(path or os.environ.get(DEPTH_MODEL) or DEFAULT_DEPTH_MODEL)
    try:
        kind = AutoConfig.from_pretrained(path).model_type
        if kind == "depth_anything":
            return _read(path, device)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"no depth model could be read from {path}: name a folder that holds one with --depth-model or {DEPTH_MODEL}, or "
            f"fetch one where there is a network with `hf download {DEFAULT_DEPTH_MODEL}`"
        ) from error
    raise InputError(f"{path} is a {kind} model: a map of depth needs Depth-Anything, such as {DEFAULT_DEPTH_MODEL}")


def _read(path: str, device: torch.device | str) -> DepthModel:
    processor = AutoImageProcessor.from_pretrained(path)
    model, report = AutoModelForDepthEstimation.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    if report["missing_keys"]:  # transformers would leave them random
        raise ValueError(f"{len(report['missing_keys'])} tensors are missing")
    return DepthModel(model.to(device).requires_grad_(False).eval(), processor)
