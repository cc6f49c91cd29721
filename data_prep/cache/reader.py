"""How training reads a cache: the records of one dataset, in its order."""

import contextlib
import functools
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from data_prep.cache.index import REBUILD, CacheFolder, find_index, row_from_json
from data_prep.cache.shards import LATENTS_SCHEMA, from_arrow, read_arrow
from data_prep.errors import InputError
from data_prep.model.geometry import Geometry, Size
from data_prep.rows.rows import Row

OPEN_SHARDS = 64
"""Files of latents, and as many of texts."""
SECONDS_BETWEEN_MARKS = 3600
"""How often a dataset that is being read is marked as used, so that `cache prune --older-than` keeps it."""


@dataclass
class Record:
    """One cached example. Latents are normalised by the VAE's mean and std; h x w is the size of the target's."""

    id: str
    key: str
    """The hash that identifies its contents."""
    bucket: str
    """Records of one bucket can be stacked: see `bucket_name`."""
    row: dict[str, Any]
    """The row of the dataset file: prompt, paths of images, number, split."""
    target_latents: Tensor
    """(16, h, w)"""
    source_latents: Tensor | None
    """(16, h, w): the bridge's start image at the target's size, which may be one of `edit_latents` itself; None for text to
    image."""
    edit_latents: list[Tensor]
    """One (16, h_i, w_i) per reference image; none for text to image."""
    prompt_emb: Tensor
    """(L, D), without padding."""
    sub_noise: Tensor
    """(16, h, w): latents of pure white, one tensor shared by all records of this size."""
    mask: Tensor | None = None
    """(1, h, w) in [0, 1], 1 = background to preserve."""
    empty_prompt_emb: Tensor | None = None
    """(L', D): the same images with an empty instruction, for caption dropout."""
    negative_prompt_emb: Tensor | None = None
    """(L'', D): the same images with the negative prompt, for classifier-free guidance."""
    preserve_prompt_emb: Tensor | None = None
    """(L*, D): the same images with an instruction for which the base model's answer is kept."""


def bucket_name(target_latents: Tensor, edit_latents: Sequence[Tensor]) -> str:
    """`64x48+64x48+32x32`: latent height x width of the target, then of each reference."""
    return "+".join(f"{latents.shape[-2]}x{latents.shape[-1]}" for latents in (target_latents, *edit_latents))


def target_size(bucket: str) -> Size:
    """The latent size of the targets of a bucket."""
    return Size(*map(int, bucket.split("+")[0].split("x")))


class CacheReader:
    """A dataset of a cache as a sequence of records in its order, memory-mapped: only what is asked for is read.

    It holds 8 bytes a row: everything else stays on the disk. As long as records are read, the index is marked as used.
    """

    def __init__(
        self,
        folder: str | Path,
        dataset: str | None = None,
        *,
        fingerprint: str | None = None,
        geometry: Geometry | None = None,
        caption_dropout: bool = False,
        negative: bool = False,
        encoder_dtype: str | None = None,
        preserve: tuple[str, ...] = (),
    ):
        """Opens a cache.

        Args:
            folder: what `build_cache` wrote.
            dataset: the digest of the dataset's rows; None: the only dataset that is there.
            fingerprint: the encoders' fingerprint that the caller's model has; None: not checked.
            geometry: the geometry that the caller's config has; None: not checked.
            caption_dropout, negative: whether records should have embeddings of the empty instruction, and of negative
                prompts. If there are some without, the records are read; who needs more must look at `header`.
            encoder_dtype: what the encoders computed in, e.g. `bfloat16`; None: not checked.
            preserve: the instructions of which records should have one each; likewise.

        Raises:
            InputError: no such dataset there, or only of another schema, model, geometry or dtype, or with missing records.
        """
        self.folder = CacheFolder(folder)
        index = find_index(
            self.folder, dataset, fingerprint, geometry, caption_dropout, negative, encoder_dtype, preserve
        )
        self.header, self._path, self._lines = index.header, index.path, index.lines
        self._check_files(index.sizes)
        self.buckets = group_by_bucket(index.lines)
        """Bucket -> indices of its records, an array in dataset order."""
        self._latents, self._texts = (
            functools.lru_cache(maxsize=OPEN_SHARDS)(functools.partial(self._read_shard, where))
            for where in ("latents", "texts")
        )
        self._sub_noise = functools.cache(self._read_sub_noise)
        self._mark_used()

    @property
    def keys(self) -> list[str]:
        """The records' content keys, in dataset order."""
        return self._lines.column("key").to_pylist()

    @property
    def weights(self) -> np.ndarray | None:
        """How often each record is drawn, in proportion, float64 (N,), in dataset order; None if all are drawn alike."""
        if "weight" not in self._lines.column_names:
            return None
        weights = self._lines.column("weight").to_numpy()
        return weights if len(weights) and weights.min() < weights.max() else None

    @property
    def rows(self) -> Iterator[Row]:
        """The rows of the dataset file, in its order."""
        for chunk in self._lines.column("row").chunks:
            yield from map(row_from_json, chunk.to_pylist())

    def __len__(self) -> int:
        return self._lines.num_rows

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        if time.monotonic() - self._marked > SECONDS_BETWEEN_MARKS:
            self._mark_used()
        line = {name: self._lines.column(name)[index] for name in self._lines.column_names}
        shard, place = self._latents(line["latents"]["shard"].as_py()), line["latents"]["place"].as_py()
        values = {name: shard.column(name)[place] for name in LATENTS_SCHEMA.names}
        target_latents, edit_latents = from_arrow(values["target_latents"]), [*map(from_arrow, values["edit_latents"])]
        source, bridge = values["source_latents"], values["bridge_image"].as_py()
        prompt_emb = self._embedding(line["prompt"])
        assert prompt_emb is not None
        return Record(
            id=line["id"].as_py(),
            key=line["key"].as_py(),
            bucket=line["bucket"].as_py(),
            row=json.loads(line["row"].as_py()),
            target_latents=target_latents,
            source_latents=from_arrow(source) if source.is_valid else edit_latents[bridge] if edit_latents else None,
            edit_latents=edit_latents,
            prompt_emb=prompt_emb,
            sub_noise=self._sub_noise(*target_latents.shape[-2:]),
            mask=from_arrow(values["mask"]) if values["mask"].is_valid else None,
            empty_prompt_emb=self._embedding(line["empty_prompt"]),
            negative_prompt_emb=self._embedding(line["negative_prompt"]),
            preserve_prompt_emb=self._embedding(line["preserve_prompt"]),
        )

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def _embedding(self, location: pa.StructScalar) -> Tensor | None:
        if not location.is_valid:
            return None
        shard = self._texts(location["shard"].as_py())
        return from_arrow(shard.column("prompt_emb")[location["place"].as_py()])

    def _mark_used(self) -> None:
        self._marked = time.monotonic()
        mark_used(self._path)

    def _check_files(self, sizes: dict[str, int]) -> None:
        for name, size in sizes.items():
            if file_size(self.folder.path / name) != size:
                raise self._lost(name)

    def _lost(self, name: str) -> InputError:
        return InputError(f"the cache at {self.folder.path} has lost {name}: {REBUILD}")

    def _read_shard(self, folder: str, shard: str) -> pa.RecordBatch:
        name = f"{folder}/{shard}.arrow"
        try:
            return read_arrow(self.folder.path / name)
        except FileNotFoundError:
            raise self._lost(name) from None

    def _read_sub_noise(self, height: int, width: int) -> Tensor:
        path = self.folder.sub_noise(self.header, height, width)
        if not path.is_file():
            raise self._lost(path.name)
        return from_arrow(read_arrow(path).column("sub_noise")[0])


def group_by_bucket(lines: pa.Table) -> dict[str, np.ndarray]:
    """Bucket -> indices of its lines, in order, int64; buckets in the order in which they first appear."""
    column = lines.column("bucket").combine_chunks().dictionary_encode()
    codes = column.indices.to_numpy(zero_copy_only=False)
    ends = np.bincount(codes, minlength=len(column.dictionary)).cumsum()
    indices = np.split(np.argsort(codes, kind="stable"), ends[:-1]) if len(codes) else []
    return dict(zip(column.dictionary.to_pylist(), indices, strict=True))


def file_size(path: Path) -> int | None:
    """In bytes; None if it is not there."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def mark_used(index: Path) -> None:
    """Makes the time of an index the one at which its dataset was last used, where the folder can be written to."""
    with contextlib.suppress(OSError):
        os.utime(index)
