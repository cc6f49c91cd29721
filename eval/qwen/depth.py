"""Depth of a picture by Depth-Anything, a model of its own beside the base."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoModelForDepthEstimation

from data_prep.errors import InputError
from data_prep.model.hub_files import fetch
from data_prep.rows.images import file_digest
from eval.request.lookup import find_model

DEPTH_MODEL = "DEPTH_MODEL"
"""Environment variable: which depth model, where no other is named."""
DEFAULT_DEPTH_MODEL = "depth-anything/Depth-Anything-V2-Small-hf"
"""25 M parameters, Apache-2.0; the larger ones of the family have a licence that forbids commercial use."""
FILES = ["*.json", "*.safetensors"]


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


@dataclass(frozen=True)
class DepthFiles:
    """Where a depth model is, and what identifies it."""

    path: str
    """A folder or a hub id."""
    folder: Path
    fingerprint: str
    """Fingerprint of its configuration and weights."""


class DepthSource:
    """A depth model that is looked for once, when it is first asked for, and read when it is first used.

    Args:
        path: a folder, also below `$MODEL_DIR`, or a hub id; None: `$DEPTH_MODEL` as it is now, or DEFAULT_DEPTH_MODEL.
        device: where it computes.
        waits: it stays on the CPU between two uses.
    """

    def __init__(self, path: str | None, device: torch.device, waits: bool = False):
        self.path, self.device, self.waits = named_depth_model(path), device, waits
        self._lock = Lock()
        self._found: DepthFiles | str | None = None
        self._model: DepthModel | None = None

    def files(self) -> DepthFiles:
        """Where it is; a hub id that is not in the cache is downloaded. May be called in threads.

        Raises:
            InputError: there is none, or it is of another kind; later calls say so without another look.
        """
        with self._lock:
            if self._found is None:
                try:
                    self._found = find_depth_model(self.path)
                except InputError as error:
                    self._found = str(error)
        if isinstance(self._found, str):
            raise InputError(self._found)
        return self._found

    @contextmanager
    def model(self) -> Iterator[DepthModel]:
        """The model, on its device.

        Raises:
            InputError: as `files`, or its weights cannot be read.
        """
        self._model = self._model or read_depth_model(self.files())
        self._model.model.to(self.device)
        try:
            yield self._model
        finally:
            if self.waits:
                self._model.model.to("cpu")


def named_depth_model(path: str | None) -> str:
    """What is named, else `$DEPTH_MODEL`, else DEFAULT_DEPTH_MODEL."""
    return path or os.environ.get(DEPTH_MODEL) or DEFAULT_DEPTH_MODEL


def find_depth_model(path: str) -> DepthFiles:
    """Finds a Depth-Anything model in transformers' layout, and reads no weights.

    Args:
        path: a folder, also below `$MODEL_DIR`, or a hub id, which is taken from the hub's cache or downloaded.

    Raises:
        InputError: it is none, cannot be had, or is of another kind.
    """
    path = find_model(path)
    try:
        folder = fetch(path, FILES, needed=["config.json", "*.safetensors"])
        kind = AutoConfig.from_pretrained(folder).model_type
    except (OSError, ValueError) as error:
        raise _unreadable(path) from error
    if kind != "depth_anything":
        raise InputError(
            f"{path} is a {kind} model: a map of depth needs Depth-Anything, such as {DEFAULT_DEPTH_MODEL}"
        )
    if not any(folder.glob("*.safetensors")):
        raise _unreadable(path)
    return DepthFiles(path, folder, _fingerprint(folder))


def _fingerprint(folder: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(file for pattern in FILES for file in folder.glob(pattern)):
        digest.update(f"{file.name} {file_digest(file)}\n".encode())
    return digest.hexdigest()


def read_depth_model(files: DepthFiles) -> DepthModel:
    """Reads a model that was found, frozen, in float32, on the CPU.

    Raises:
        InputError: its weights cannot be read, or are not all there.
    """
    try:
        processor = AutoImageProcessor.from_pretrained(files.folder)
        model, report = AutoModelForDepthEstimation.from_pretrained(
            files.folder, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _unreadable(files.path) from error
    if report["missing_keys"]:  # transformers would leave them random
        raise _unreadable(files.path)
    return DepthModel(model.requires_grad_(False).eval(), processor)


def _unreadable(path: str) -> InputError:
    return InputError(
        f"no depth model could be read from {path}: give a folder with one as --depth-model or {DEPTH_MODEL}, or "
        f"fetch one where there is a network with `hf download {DEFAULT_DEPTH_MODEL}`"
    )
