"""How large the rows of a dataset are, without encoding them: from a finished cache, or from the images' headers."""

import functools
import itertools
import random
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from data_prep.cache.index import REBUILD, CacheFolder, find_index
from data_prep.cache.keys import preserve_prompt
from data_prep.cache.order import draws_per_epoch
from data_prep.errors import InputError
from data_prep.model.geometry import LATENT_CELL, Geometry, Size
from data_prep.rows.images import FORMATS, MAX_ASPECT
from data_prep.rows.rows import RejectedRow, Row

TOKEN_SIDE = 16
"""Pixels of a token's side: 8 of a latent cell, 2 cells."""
TOKENS_PER_IMAGE, TOKENS_PER_ROW, BYTES_PER_TOKEN = 7, 5, 3
"""The edit template's own words, after its 64 dropped tokens, and UTF-8 bytes of a prompt per token (English has about
4, Chinese 3 to 5)."""
VALUES_PER_TOKEN = 64
"""Numbers per token of an image's latents: 16 channels, 2 x 2 cells."""
TURNED = range(5, 9)
"""EXIF orientations that swap height and width."""


def num_tokens(size: Size) -> int:
    """Tokens of an image of this size, in pixels."""
    return (size.height // TOKEN_SIDE) * (size.width // TOKEN_SIDE)


def has_own_source(target: Size, references: Sequence[Size]) -> bool:
    """Whether the bridge's source has latents beside the references': it is at the target's size, and none of them is. Text to
    image has no source."""
    return bool(references) and target not in references


@dataclass(frozen=True)
class RowSize:
    """One row. Sizes are in pixels, of the images or of what is already cached: a geometry is idempotent."""

    target: Size
    references: tuple[Size, ...]
    text_tokens: int
    """Length of the longest prompt embedding, instruction and images as Qwen2.5-VL sees them."""
    bridge: int | None = None
    """Which reference the bridge starts from, for sizes of images; None for what is already cached."""
    max_pixels: int | None = None
    """Largest area of its target, where it has one of its own."""
    weight: float = 1.0
    """How often it is drawn, in proportion to the others."""


@dataclass(frozen=True)
class Bucket:
    """Rows that can share a batch."""

    target: Size
    references: tuple[Size, ...]
    text_tokens: int
    """Text tokens of the row with the longest text."""
    share: float
    """Share of all draws, in (0, 1]; the share of the rows if all are drawn equally often."""

    @property
    def image_tokens(self) -> int:
        """Tokens of the target and all references."""
        return num_tokens(self.target) + sum(map(num_tokens, self.references))

    @property
    def length(self) -> int:
        """Tokens that attention sees."""
        return self.text_tokens + self.image_tokens


@dataclass(frozen=True)
class DatasetSizes:
    """The rows that were looked at, and how many there are."""

    rows: tuple[RowSize, ...]
    num_rows: int
    origin: str
    """Where this is from, in words."""
    cached: bool = False
    """Whether these are records."""

    @functools.cached_property
    def _groups(self) -> dict[tuple[Size, tuple[Size, ...], int | None, int | None], list[tuple[int, float]]]:
        """The text lengths and weights of the rows of each size: a large dataset has few sizes."""
        groups: dict[tuple[Size, tuple[Size, ...], int | None, int | None], list[tuple[int, float]]] = {}
        for row in self.rows:
            key = row.target, row.references, row.bridge, row.max_pixels
            groups.setdefault(key, []).append((row.text_tokens, row.weight))
        return groups

    @functools.cached_property
    def drawn_per_epoch(self) -> float:
        """Share of the rows that an epoch of `data_prep.cache.order` draws: 1 where all weigh the same."""
        rates = draws_per_epoch(np.array([row.weight for row in self.rows]))
        return 1.0 if rates is None else float(rates.mean())

    def buckets(self, geometry: Geometry) -> list[Bucket]:
        """The buckets under a geometry, the longest sequence first."""
        groups: dict[tuple[Size, tuple[Size, ...]], list[tuple[int, float]]] = {}
        for (target, references, bridge, max_pixels), texts in self._groups.items():
            own = geometry.within(max_pixels)
            sizes = own.target_size(target), own.reference_sizes(references, target, bridge)
            groups.setdefault(sizes, []).extend(texts)
        total = sum(row.weight for row in self.rows)
        found = [
            Bucket(*sizes, max(length for length, _ in texts), sum(weight for _, weight in texts) / total)
            for sizes, texts in groups.items()
        ]
        return sorted(found, key=lambda bucket: -bucket.length)


def record_bytes(latent_tokens: int, text_tokens: int, text_width: int, num_prompts: int = 1) -> int:
    """What a cached record takes on disk, in 16 bits a value.

    Args:
        latent_tokens: latent tokens of the target, the references, and the source where none of these is of the target's size.
        text_tokens: length of the prompt embeddings.
        text_width: width of the text encoder's hidden states.
        num_prompts: embeddings per row: one more with caption dropout, and one more where instructions are preserved.
    """
    return 2 * (latent_tokens * VALUES_PER_TOKEN + num_prompts * text_tokens * text_width)


def cache_bytes(data: DatasetSizes, geometry: Geometry, text_width: int, num_prompts: int = 1) -> int:
    """What all records take, each with the longest text of its bucket. Arguments as in `record_bytes`."""
    per_row = sum(
        bucket.share
        * record_bytes(
            bucket.image_tokens + has_own_source(bucket.target, bucket.references) * num_tokens(bucket.target),
            bucket.text_tokens,
            text_width,
            num_prompts,
        )
        for bucket in data.buckets(geometry)
    )
    return round(per_row * data.num_rows)


def cached_sizes(
    folder: str | Path,
    dataset: str | None = None,
    fingerprint: str | None = None,
    geometry: Geometry | None = None,
    caption_dropout: bool = False,
    preserve: tuple[str, ...] = (),
) -> DatasetSizes:
    """The sizes of all records of a dataset in a cache; no records are read. Arguments as `find_index` has them.

    Raises:
        InputError: as `find_index`, or it lacks the instructions to preserve.
    """
    index = find_index(CacheFolder(folder), dataset, fingerprint, geometry, caption_dropout, preserve=preserve)
    if preserve and index.header.preserve != preserve:
        raise InputError(f"the cache at {folder} lacks what data.preserve_prompts asks for: {REBUILD}")
    lines, largest = index.lines, index.header.geometry.max_pixels
    latents = {bucket: _bucket_sizes(bucket) for bucket in lines.column("bucket").unique().to_pylist()}

    @functools.cache  # a large dataset has few of them
    def one(bucket: str, tokens: int, weight: float) -> RowSize:
        target, references = latents[bucket]
        area = target.height * target.width
        return RowSize(target, references, tokens, None, area if area > largest else None, weight)

    weights = lines.column("weight").to_pylist() if "weight" in lines.column_names else [1.0] * len(lines)
    rows = map(one, lines.column("bucket").to_pylist(), lines.column("text_tokens").to_pylist(), weights)
    return DatasetSizes(tuple(rows), len(lines), f"the cache at {folder}", cached=True)


def _bucket_sizes(bucket: str) -> tuple[Size, tuple[Size, ...]]:
    """Pixels of the target and the references."""
    latent = [Size(*map(int, part.split("x"))) for part in bucket.split("+")]
    target, *references = (Size(size.height * LATENT_CELL, size.width * LATENT_CELL) for size in latent)
    return target, tuple(references)


def estimated_sizes(
    rows: Iterable[Row | RejectedRow],
    geometry: Geometry,
    vision_side: int = 28,
    limit: int = 500,
    preserve: Sequence[str] = (),
) -> DatasetSizes:
    """The sizes of rows that are not cached yet, from their images' headers, with the text's length estimated.

    Unusable rows are left out; caching reports them.

    Args:
        vision_side: pixels of the side of one vision token in the text.
        limit: about how many to look at: some rows, evenly spread, at all areas and in all versions.
        preserve: instructions of which each row has one more embedding.

    Raises:
        InputError: no row can be used.
    """
    usable = [row for row in rows if isinstance(row, Row)]
    sample = _sample(usable, limit)
    sizes = [size for row in sample if (size := _row_size(row, geometry, vision_side, preserve))]
    if not sizes:
        raise InputError(f"none of the images of {len(sample)} rows can be read: check data.dataset and data.root")
    looked = f"{len(sizes)} of {len(usable)} rows" if len(sizes) != len(usable) else f"{len(sizes)} rows"
    return DatasetSizes(tuple(sizes), len(usable), f"the image headers of {looked}; text lengths estimated")


def _sample(rows: Sequence[Row], limit: int) -> list[Row]:
    """One of every few rows with all of its versions, which follow each other; which one is drawn, for a fixed step would meet
    the same kind of row again and again where kinds take turns."""
    whole = [list(versions) for _, versions in itertools.groupby(rows, key=lambda row: row.number)]
    step, rng = max(1, -(-len(rows) // limit)), random.Random(0)
    return [row for start in range(0, len(whole), step) for row in rng.choice(whole[start : start + step])]


def _row_size(row: Row, geometry: Geometry, vision_side: int, preserve: Sequence[str]) -> RowSize | None:
    sizes = [image_size(path) for path in (row.image, *row.edit_image)]
    target, *references = sizes
    if target is None or None in references:
        return None
    texts = [row.prompt, preserve_prompt(row, preserve)] if preserve else [row.prompt]
    words = max(map(estimated_tokens, texts))
    sizes = [size for size in references if size]
    if row.augmentation:  # where its crop lies depends on the mask, which is not read
        target = _cropped(target, row.augmentation.side)
        sizes[row.bridge_image : row.bridge_image + 1] = [
            _cropped(size, row.augmentation.side) for size in sizes[row.bridge_image : row.bridge_image + 1]
        ]
    tokens = text_length(words, sizes, geometry, vision_side)
    return RowSize(target, tuple(sizes), tokens, row.bridge_image, row.max_pixels, row.weight)


def _cropped(size: Size, side: float) -> Size:
    return Size(max(1, round(size.height * side)), max(1, round(size.width * side)))


def estimated_tokens(text: str) -> int:
    """Estimated tokens of an instruction, without a tokenizer."""
    return -(-len(text.encode()) // BYTES_PER_TOKEN)


def text_length(words: int, references: Iterable[Size], geometry: Geometry, vision_side: int = 28) -> int:
    """Tokens of the prompt embeddings: the instruction's, the template's, and the images' as Qwen2.5-VL sees them.

    Args:
        words: tokens of the instruction.
        references: sizes of the images.
        geometry: says how large they are seen.
        vision_side: pixels of the side of one vision token.
    """
    seen = [geometry.vision_size(size) for size in references]
    vision = sum(max(1, round(s.height / vision_side)) * max(1, round(s.width / vision_side)) for s in seen)
    return vision + words + TOKENS_PER_ROW + TOKENS_PER_IMAGE * len(seen)


def image_size(path: Path) -> Size | None:
    """The upright size of an image file from its header, or None if it cannot be used."""
    try:
        with warnings.catch_warnings(), Image.open(path, formats=FORMATS) as image:
            warnings.simplefilter("ignore")
            decoded_for_exif = image.format == "PNG" and "exif" not in image.info  # Pillow would look behind the pixels
            turned = not decoded_for_exif and image.getexif().get(ExifTags.Base.Orientation) in TURNED
            size = Size(image.width, image.height) if turned else Size.of(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return size if max(size) <= MAX_ASPECT * min(size) else None
