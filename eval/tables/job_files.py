"""What a job's files hold: the key of its result, and the request that is made of them."""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from data_prep.builders.overlay.command import MakeOverlay
from data_prep.builders.overlay.style import DEFAULT_STYLE, Style, parse_style
from data_prep.builders.overlay.typography import DEFAULT_FONT, check_font
from data_prep.jobs.items import Item
from data_prep.model.geometry import Size, fit_mask
from data_prep.rows.images import check_mask_shape, file_digest, open_image, open_mask, open_transparent
from eval.qwen.frame import shown_whole
from eval.request.knobs import AdapterUse
from eval.request.provenance import numbered
from eval.request.request import KEEPING, EditRequest
from eval.tables.table import Job, describe
from train.model.adapter_files import adapter_file, extra_file

KEY_DIGITS = 16
VERSION = 1
"""Version of what the keys are made of."""


@dataclass(frozen=True)
class KeyedJob:
    """A job, the key of what it asks for, and the names of its pictures in the folder of results."""

    job: Job
    key: str
    outputs: tuple[str, ...]

    def is_done(self, out: Path) -> bool:
        """Whether all its pictures are there. They are written whole, and their names hold the key."""
        return all((out / name).is_file() for name in self.outputs)


@dataclass(frozen=True)
class JobFiles:
    """Reads jobs' files; `key` and `load` may be called in threads.

    Args:
        common: what a request's pictures depend on besides its row, as JSON has it: models, the numbers they compute in.
        fonts: for texts that are laid over.
    """

    common: Callable[[EditRequest], Mapping[str, Any]]
    fonts: tuple[Path, ...] = (DEFAULT_FONT,)
    digest: Callable[[Path], str] = field(default_factory=lambda: functools.lru_cache(maxsize=100_000)(file_digest))

    def __post_init__(self):
        for font in self.fonts:
            check_font(font)

    def key(self, job: Job) -> KeyedJob:
        """The same for the same contents, whatever the files' names and places, the row's id and its place.

        Raises:
            RejectedImage: a file cannot be read.
            InputError: an adapter cannot.
        """
        asked = job.placeholder()
        contents = {
            "version": VERSION,
            "common": self.common(asked),
            "knobs": describe(asked) | ({"whole": True} if shown_whole(asked) else {}),  # cropped in earlier versions
            "adapters": [self._adapter(use) for use in asked.adapters],
            "images": [self.digest(path) for path in job.images],
            "mask": job.mask and self.digest(job.mask),
            "overlay": job.overlay
            and [job.overlay.content, self.digest(job.overlay.path), job.overlay.style, *map(self.digest, self.fonts)],
        }
        text = json.dumps(contents, sort_keys=True).encode()
        key = hashlib.blake2b(text, digest_size=KEY_DIGITS // 2).hexdigest()
        stem = re.sub(r"[^\w-]", "_", job.id)[:40]  # letters of any script; a file system allows 255 bytes
        return KeyedJob(job, key, tuple(numbered(f"{stem}-{key}.png", asked.count)))

    def _adapter(self, use: AdapterUse) -> list[str | float]:
        """What of it a picture depends on."""
        beside = extra_file(use.path)
        return [self.digest(adapter_file(use.path)), use.weight, *([self.digest(beside)] if beside else [])]

    def load(self, job: Job) -> EditRequest:
        """The request, with images opened and the overlay laid on.

        Raises:
            RejectedImage, BadRow, InputError: a file cannot be used.
        """
        images = [open_image(path) for path in job.images]
        mask = None
        if job.mask:
            mask = open_mask(job.mask)
            check_mask_shape(mask, images[0], job.mask)
            mask = fit_mask(mask, Size.of(images[0]), stretched=True)
        if job.overlay:
            images[0] = self._laid_over(images[0], job)
        request = job.request(images, mask)
        if request.mode in KEEPING and not job.overlay:
            request = replace(request, original=open_transparent(job.images[0]))
        return request

    def sources(self, job: Job) -> list[tuple[str, str]]:
        """Name and digest of every file that the picture was made of."""
        return [(path.name, self.digest(path)) for path in job.files]

    def overlay_settings(self, job: Job) -> dict[str, Any]:
        """What a picture says of what was laid over its source: nothing, or how, and the fonts of a text."""
        if not job.overlay:
            return {}
        fonts = {"fonts": list(map(self.digest, self.fonts))} if job.overlay.content == "overlay_text" else {}
        return {"overlay": {"content": job.overlay.content, **job.overlay.style, **fonts}}

    def _laid_over(self, photo: Image.Image, job: Job) -> Image.Image:
        """As the builder of datasets does it; where and how is drawn by the contents, so that all rows agree."""
        assert job.overlay
        digests = f"{self.digest(job.images[0])}/{self.digest(job.overlay.path)}"
        values = {"content": job.overlay.content, "cells": job.overlay.style}
        return self._overlays.lay_over(photo, Item(job.number, digests, (job.overlay.path,), values))

    @functools.cached_property
    def _overlays(self) -> MakeOverlay:
        style = Style(**parse_style(DEFAULT_STYLE))
        return MakeOverlay(style, self.fonts, tuple(map(self.digest, self.fonts)), "add", None, None, seed=0)
