"""What training and caching will make of the usable rows: buckets, groups, disk; and how their values spread."""

import functools
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.cache.sizes import has_own_source, num_tokens, record_bytes, text_length
from data_prep.check.measures.column_store import FIELDS, TRAINED, VALIDATED, Columns
from data_prep.model.geometry import Geometry, Size

TEXT_WIDTH = 3584
"""Width of Qwen2.5-VL-7B's hidden states."""
VISION_SIDE = 28
"""Pixels of the side of one of its vision tokens."""
QUANTILES = (0, 5, 50, 95, 100)


@dataclass(frozen=True)
class Bucket:
    """Training rows that can share a batch."""

    target: Size
    references: tuple[Size, ...]
    rows: int

    @property
    def name(self) -> str:
        """`512x512+512x512`: height x width of the target, then of each reference, in pixels."""
        return "+".join(map(str, (self.target, *self.references)))


@dataclass(frozen=True)
class Groups:
    """An epoch at one group size. Every row is drawn once."""

    size: int
    """Places that are filled from one bucket: `train.group_size`, or the micro-batch."""
    groups: int
    empty_places: int
    """Empty places in the last groups of the buckets: a step with some is a mean over fewer rows."""
    small_buckets: int
    """Buckets with fewer rows than a group has places."""


@dataclass(frozen=True)
class Layout:
    """The training rows as training groups them."""

    buckets: tuple[Bucket, ...]
    """The fullest first."""
    cache_bytes: int
    """Bytes of the cache for the rows to train on and to validate with."""

    @property
    def rows(self) -> int:
        """That are trained."""
        return sum(bucket.rows for bucket in self.buckets)

    def groups(self, size: int) -> Groups:
        """An epoch of `data_prep.cache.order.Order`."""
        counts = [bucket.rows for bucket in self.buckets]
        groups = sum(-(-count // size) for count in counts)
        return Groups(size, groups, groups * size - sum(counts), sum(count < size for count in counts))


def lay_out(
    columns: Columns, geometry: Geometry, text_width: int = TEXT_WIDTH, vision_side: int = VISION_SIDE
) -> Layout:
    """Buckets and disk. Rows are taken by their sizes, of which even a large dataset has few.

    Args:
        text_width: width of the text encoder's hidden states.
        vision_side: pixels of the side of one vision token.
    """
    target_size, reference_sizes = functools.cache(geometry.target_size), functools.cache(geometry.reference_sizes)
    buckets: dict[tuple[Size, tuple[Size, ...]], int] = defaultdict(int)
    total = 0
    for group in _groups(columns):
        target, references = target_size(group.target), reference_sizes(group.references, group.target, group.bridge)
        if group.trained:
            buckets[target, references] += group.trained
        own = 1 + has_own_source(target, references)
        latents = own * num_tokens(target) + sum(map(num_tokens, references))
        image_text = text_length(0, group.references, geometry, vision_side)
        total += group.cached * record_bytes(latents, image_text, text_width) + record_bytes(0, group.words, text_width)
    found = [Bucket(*key, count) for key, count in buckets.items()]
    return Layout(tuple(sorted(found, key=lambda bucket: (-bucket.rows, bucket.name))), total)


@dataclass(frozen=True)
class _Group:
    """Rows whose pictures have the same sizes."""

    target: Size
    references: tuple[Size, ...]
    bridge: int
    trained: int
    cached: int
    words: int
    """Tokens of all cached prompts."""


def _groups(columns: Columns) -> list[_Group]:
    cached = columns.in_split(TRAINED, VALIDATED)
    trained, tokens = columns.in_split(TRAINED)[cached], columns["tokens"][cached]
    sizes, bridges = columns["sizes"][cached], columns["bridge"][cached]
    alike = np.column_stack([sizes.reshape(len(sizes), math.prod(FIELDS["sizes"].shape)), bridges])
    keys = np.ascontiguousarray(alike).view(np.dtype((np.void, alike.itemsize * alike.shape[1])))[:, 0]
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    num_cached, num_trained, words = (np.bincount(group, w, len(first)) for w in (None, trained, tokens))
    found = []
    for place, index in enumerate(first):
        target, *references = (Size(*size) for size in sizes[index].tolist() if size[0])
        numbers = (int(each[place]) for each in (num_trained, num_cached, words))
        found.append(_Group(target, tuple(references), int(bridges[index]), *numbers))
    return found


def spreads(columns: Columns, geometry: Geometry) -> dict[str, np.ndarray]:
    """The values to draw histograms of, of usable rows: sides in pixels, width over height, tokens, pixels, per cent.

    The shift is in pixels of the target as it is trained; rows whose source and target cannot be compared are left out.
    """
    usable = columns["usable"]
    sizes, drift = columns["sizes"][usable, 0].astype(np.float32), columns["drift"][usable]
    area = sizes[:, 0] * sizes[:, 1]
    compared = np.isfinite(drift[:, 0])
    scale = np.minimum(1, np.sqrt(geometry.max_pixels / np.maximum(area, 1)))[compared]
    return {
        "side": np.sqrt(area),
        "aspect": sizes[:, 1] / np.maximum(sizes[:, 0], 1),
        "tokens": columns["tokens"][usable].astype(np.float32),
        "shift": np.hypot(drift[compared, 0], drift[compared, 1]) * scale,
        "zoom": 100 * drift[compared, 2],
    }


def quantiles(values: np.ndarray) -> dict[str, Any] | None:
    """Their number, and the values under which 0, 5, 50, 95 and 100 % of them are."""
    if not len(values):
        return None
    points = np.percentile(values, QUANTILES)
    return {"count": len(values), **{f"p{q}": round(float(p), 3) for q, p in zip(QUANTILES, points, strict=True)}}
