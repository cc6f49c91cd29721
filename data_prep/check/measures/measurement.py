"""What is measured of one row, in worker processes: plain numbers, which limits are laid on later."""

import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageOps
from tokenizers import Tokenizer

from data_prep.cache.sizes import estimated_tokens
from data_prep.check.measures.drift import measure_drift
from data_prep.check.measures.likeness import alike, turn_between
from data_prep.jobs.items import Item, Result
from data_prep.model.geometry import Geometry, Size, background_cells, fit_back_mask
from data_prep.rows.duplicates import HASH_BYTES, image_hash
from data_prep.rows.images import OpenedImage, check_mask_shape, inspect_image, inspect_mask
from data_prep.rows.rows import Row

COMPARED_SIDE = 256
"""Pixels of the longest side at which a mask is laid on the difference of source and target."""
CHANGED = 16
"""Grey levels of 255, in the most different channel: below it are JPEG's and resizing's."""
DARK, LIGHT = 32, 223
"""What a mask's black and white are, with some room for JPEG."""


def as_item(row: Row) -> Item:
    """A row as a unit of work. The measurements depend on nothing else of it."""
    optional = [("ref_gt", row.ref_gt), ("back_mask", row.back_mask)]
    values = {"prompt": row.prompt, "bridge_image": row.bridge_image, "sources": len(row.edit_image)}
    values |= {name: path is not None for name, path in optional}
    files = (row.image, *row.edit_image, *(path for _, path in optional if path))
    return Item(row.number, row.id, files, values)


@dataclass(frozen=True)
class Measure:
    """Reads all files of a row, as caching will, and measures them."""

    tokenizer: Path | None
    """A `tokenizer.json`; without one the prompt's length is estimated."""
    geometry: Geometry
    """How training sizes images: what becomes of a mask depends on it."""

    def __call__(self, item: Item) -> Result:
        """Sizes are (height, width) in pixels, shares in [0, 1], `drift` is (x, y, zoom) as in `Drift`.

        Raises:
            RejectedImage: one of the files cannot be used.
        """
        wanted, files = item.values, list(item.files)
        opened = [inspect_image(path) for path in files[: 1 + wanted["sources"]]]
        target, sources = opened[0].image, [each.image for each in opened[1:]]
        rest = files[1 + wanted["sources"] :]
        if wanted["ref_gt"]:
            opened.append(inspect_image(rest.pop(0)))
        mask = None
        if wanted["back_mask"]:
            opened.append(inspect_mask(rest[0]))
            mask = opened[-1].image
            check_mask_shape(mask, target, rest[0])
        if not sources:
            return Result(self._without_source(wanted["prompt"], target, mask, _conversions(files, opened)))
        source = sources[wanted["bridge_image"]]
        same = alike(source, target, files[1 + wanted["bridge_image"]], files[0])
        turn = None if same else turn_between(source, target)
        return Result(
            {
                "sizes": [[image.height, image.width] for image in (target, *sources)],
                "tokens": self._tokens(wanted["prompt"]),
                "conversions": _conversions(files, opened),
                "alike": same,
                "turn": turn,
                "drift": None if turn else _drift(source, target, mask),
                "mask": mask and self._mask_facts(mask, source, target),
                "hashes": [image_hash(image).hex() for image in (source, target)],
                "digest": _digest(wanted["prompt"], target, *sources),
            }
        )

    def _without_source(
        self, prompt: str, target: Image.Image, mask: Image.Image | None, conversions: list[list[str]]
    ) -> dict[str, Any]:
        """The same facts of text to image. There is no source to compare with: its hash is that of nothing."""
        return {
            "sizes": [[target.height, target.width]],
            "tokens": self._tokens(prompt),
            "conversions": conversions,
            "alike": None,
            "turn": None,
            "drift": None,
            "mask": mask and self._mask_facts(mask, target, target),
            "hashes": [bytes(HASH_BYTES).hex(), image_hash(target).hex()],
            "digest": _digest(prompt, target),
        }

    def _mask_facts(self, mask: Image.Image, source: Image.Image, target: Image.Image) -> dict[str, Any]:
        cells = background_cells(fit_back_mask(mask, self.geometry.target_size(Size.of(target))))
        return _mask_facts(mask, source, target) | {"background_cells": float((cells >= 0.5).float().mean())}

    def _tokens(self, prompt: str) -> int:
        if self.tokenizer is None:
            return estimated_tokens(prompt)
        return len(_tokenizer(self.tokenizer).encode(prompt, add_special_tokens=False).ids)


@functools.cache
def _tokenizer(path: Path) -> Tokenizer:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are processes enough
    return Tokenizer.from_file(str(path))


def _conversions(files: list[Path], opened: list[OpenedImage]) -> list[list[str]]:
    pairs = ((path, each.conversions) for path, each in zip(files, opened, strict=False))
    return [[str(path), "; ".join(conversions)] for path, conversions in pairs if conversions]


def _difference(source: Image.Image, target: Image.Image) -> np.ndarray:
    """Of two pictures of one size: uint8 (H, W, 3)."""
    return np.asarray(ImageChops.difference(source, target))


def _drift(source: Image.Image, target: Image.Image, mask: Image.Image | None) -> list[float] | None:
    """Where the mask says that nothing changes, or, as it may be wrong, in the whole picture."""
    drift = (mask and measure_drift(source, target, mask)) or measure_drift(source, target)
    return drift and [drift.x, drift.y, drift.zoom]


def _mask_facts(mask: Image.Image, source: Image.Image, target: Image.Image) -> dict[str, Any]:
    scale = min(1.0, COMPARED_SIDE / max(target.size))
    size = max(1, round(target.width * scale)), max(1, round(target.height * scale))
    small = [ImageOps.fit(image, size, Image.Resampling.BOX) for image in (source, target)]
    changed = _difference(*small).max(axis=2) > CHANGED
    full, levels = np.asarray(mask), np.asarray(ImageOps.fit(mask, size, Image.Resampling.NEAREST))
    white, black = levels > LIGHT, levels < DARK
    return {
        "size": [mask.height, mask.width],
        "white": float((full > LIGHT).mean()),
        "black": float((full < DARK).mean()),
        "changed_white": float(changed[white].mean()) if white.any() else None,
        "changed_black": float(changed[black].mean()) if black.any() else None,
    }


def _digest(prompt: str, *images: Image.Image) -> str:
    """Of all that makes a row, so that the same row under other names has the same."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=8)
    for image in images:
        digest.update(repr(image.size).encode() + image.tobytes())
    return digest.hexdigest()
