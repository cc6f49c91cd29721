"""The cache on disk, and how training reads it.

A cache is a folder:

    index.arrow           what the dataset is: one line per row, in dataset order, naming the record that holds it
    shards/<hash>.arrow   records, in the order in which they were encoded: `data_prep.cache.shards.SHARD_SCHEMA`
    sub_noise/            latents of pure white, one file per size

The index is the truth: it is written last, atomically, with the header that says what every record depends on. Shards
are plain Arrow files, readable without this project by `datasets.load_dataset("arrow", data_files="…/shards/*.arrow")`.
"""

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor

from data_prep.cache.shards import SHARD_SCHEMA, from_arrow, read_arrow, write_arrow
from data_prep.errors import InputError
from data_prep.model.geometry import Geometry, Size

SCHEMA_VERSION = 2
"""Raise it when the meaning of a stored value changes: every record is then encoded anew."""
INDEX_SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "id": pa.string(),
        "bucket": pa.string(),
        "shard": pa.string(),
        "place": pa.int32(),
        "row": pa.string(),
    }
)
OPEN_SHARDS = 64
REBUILD = "rebuild it with phases=[cache,train], or name another folder with cache.dir="


@dataclass(frozen=True)
class CacheHeader:
    """All that a record depends on besides its own row. Another header is another cache."""

    fingerprint: str
    """Of the weights and settings of the VAE and the text encoder."""
    geometry: Geometry
    dtype: str
    """What tensors are stored as, e.g. `bfloat16`."""
    caption_dropout: bool
    """Whether records have `empty_prompt_emb`."""
    negative: bool
    """Whether records have `negative_prompt_emb`."""
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """One canonical line: equal headers give equal text."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "CacheHeader":
        """From the parsed `to_json`."""
        return cls(**{**values, "geometry": Geometry(**values["geometry"])})


class CacheFolder:
    """Where the parts of a cache are."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.index = self.path / "index.arrow"
        self.shards = self.path / "shards"
        self.white = self.path / "sub_noise"
        self.work = self.path / "work"

    def shard(self, name: str) -> Path:
        """The file of a shard."""
        return self.shards / f"{name}.arrow"

    def sub_noise(self, header: CacheHeader, height: int, width: int) -> Path:
        """The file of white's latents; sizes are those of the latents. Only encoder and dtype matter, not the rows."""
        text = f"{header.schema_version} {header.fingerprint} {header.dtype}"
        encoder = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        return self.white / f"{height}x{width}-{encoder}.arrow"


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
    source_latents: Tensor
    """(16, h, w): the bridge's start image at the target's size."""
    edit_latents: list[Tensor]
    """One (16, h_i, w_i) per reference image."""
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


def bucket_name(target_latents: Tensor, edit_latents: Sequence[Tensor]) -> str:
    """`64x48+64x48+32x32`: latent height x width of the target, then of each reference."""
    return "+".join(f"{latents.shape[-2]}x{latents.shape[-1]}" for latents in (target_latents, *edit_latents))


def target_size(bucket: str) -> Size:
    """The latent size of the targets of a bucket."""
    return Size(*map(int, bucket.split("+")[0].split("x")))


def write_index(folder: CacheFolder, header: CacheHeader, lines: list[dict[str, Any]]) -> None:
    """Publishes a view of the records: one line per row, in dataset order, with the columns of `INDEX_SCHEMA`."""
    write_arrow(folder.index, lines, INDEX_SCHEMA.with_metadata({"header": header.to_json()}))


def read_index(folder: CacheFolder) -> tuple[CacheHeader, pa.RecordBatch]:
    """The header and the lines of a finished cache.

    Raises:
        InputError: there is no finished cache, it is damaged, or it has another schema.
    """
    try:
        index = read_arrow(folder.index)
    except FileNotFoundError:
        raise InputError(f"no finished cache at {folder.path}: run with phases=[cache,train]") from None
    except pa.ArrowInvalid as error:
        raise InputError(f"the cache index {folder.index} is damaged ({error}): {REBUILD}") from None
    values = json.loads(index.schema.metadata[b"header"])
    if values["schema_version"] != SCHEMA_VERSION:
        raise InputError(
            f"the cache at {folder.path} has schema {values['schema_version']}, this version reads {SCHEMA_VERSION}: "
            + REBUILD
        )
    return CacheHeader.from_json(values), index


class CacheReader:
    """A finished cache as a sequence of records in dataset order, memory-mapped: only what is asked for is read."""

    def __init__(self, folder: str | Path, *, fingerprint: str | None = None, geometry: Geometry | None = None):
        """Opens a cache.

        Args:
            folder: what `build_cache` wrote.
            fingerprint: the encoders' fingerprint that the caller's model has; None: not checked.
            geometry: the geometry that the caller's config has; None: not checked.

        Raises:
            InputError: no finished cache there, or one of another schema, model or geometry, or with missing shards.
        """
        self.folder = CacheFolder(folder)
        self.header, self._index = read_index(self.folder)
        self._check("model", fingerprint, self.header.fingerprint)
        self._check("geometry", geometry, self.header.geometry)
        self.buckets = self._group()
        """Bucket -> indices of its records, in dataset order."""
        self._check_shards()
        self._shard = functools.lru_cache(maxsize=OPEN_SHARDS)(lambda name: read_arrow(self.folder.shard(name)))
        self._sub_noise = functools.cache(self._read_sub_noise)

    @property
    def keys(self) -> list[str]:
        """The records' content keys, in dataset order."""
        return self._index.column("key").to_pylist()

    def __len__(self) -> int:
        return self._index.num_rows

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        line = {name: self._index.column(name)[index].as_py() for name in INDEX_SCHEMA.names}
        shard = self._shard(line["shard"])
        values = {name: shard.column(name)[line["place"]] for name in SHARD_SCHEMA.names}
        optional = {name: values[name] for name in ("mask", "empty_prompt_emb", "negative_prompt_emb")}
        target_latents = from_arrow(values["target_latents"])
        return Record(
            id=line["id"],
            key=line["key"],
            bucket=line["bucket"],
            row=json.loads(line["row"]),
            target_latents=target_latents,
            source_latents=from_arrow(values["source_latents"]),
            edit_latents=[from_arrow(value) for value in values["edit_latents"]],
            prompt_emb=from_arrow(values["prompt_emb"]),
            sub_noise=self._sub_noise(*target_latents.shape[-2:]),
            **{name: from_arrow(value) if value.is_valid else None for name, value in optional.items()},
        )

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def _group(self) -> dict[str, list[int]]:
        buckets: dict[str, list[int]] = {}
        for index, bucket in enumerate(self._index.column("bucket").to_pylist()):
            buckets.setdefault(bucket, []).append(index)
        return buckets

    def _check(self, what: str, expected: Any, found: Any) -> None:
        if expected is not None and expected != found:
            raise InputError(
                f"the cache at {self.folder.path} was written with another {what} ({found}, now {expected}): {REBUILD}"
            )

    def _check_shards(self) -> None:
        wanted = set(self._index.column("shard").unique().to_pylist())
        missing = [name for name in sorted(wanted) if not self.folder.shard(name).is_file()]
        if missing:
            raise InputError(f"the cache at {self.folder.path} has lost its shard {missing[0]}: {REBUILD}")

    def _read_sub_noise(self, height: int, width: int) -> Tensor:
        path = self.folder.sub_noise(self.header, height, width)
        if not path.is_file():
            raise InputError(f"the cache at {self.folder.path} has lost {path.name}: {REBUILD}")
        return from_arrow(read_arrow(path).column("sub_noise")[0])
