"""The cache on disk: records that any dataset may use, and one index for each dataset.

A cache is a folder:

    indexes/<dataset>-<header>.arrow   what a dataset is: one line per row, in dataset order, naming the records that hold it
    latents/<hash>.arrow               what the VAE made of rows' images: `data_prep.cache.shards.LATENTS_SCHEMA`
    texts/<hash>.arrow                 what the text encoder made of instructions: `TEXT_SCHEMA`
    sub_noise/                         latents of pure white, one file per size
    digests.arrow                      hashes of image files, by their path, size and time

An index is the truth about its dataset: it is written last, atomically, with the header that says what every record depends
on. Records are plain Arrow files: `datasets.load_dataset("arrow", data_files="…/latents/*.arrow")` reads them too.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from data_prep.cache.shards import read_table, write_arrow
from data_prep.errors import InputError
from data_prep.model.geometry import Geometry
from data_prep.rows.augmentation import Augmentation
from data_prep.rows.rows import Row

SCHEMA_VERSION = 2
"""Raise it when the meaning of a stored value changes: every record is then encoded anew."""
LOCATION = pa.struct([("shard", pa.string()), ("place", pa.int32())])
LATER = ("weight", "max_pixels", "augmentation")
DEFAULTS = {item.name: item.default for item in fields(Row)}
"""Default values of a row's fields. The fields in `LATER` are younger than the datasets' digests."""
PROMPTS = ("prompt", "empty_prompt", "negative_prompt", "preserve_prompt")
"""Columns of the index that say where embeddings are."""
INDEX_SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "id": pa.string(),
        "bucket": pa.string(),
        "text_tokens": pa.int32(),
        "latents": LOCATION,
        **dict.fromkeys(PROMPTS, LOCATION),
        "row": pa.large_string(),
        "weight": pa.float64(),
    }
)
"""`text_tokens` are those of the longest embedding. `weight` says how often a row is drawn; indexes of earlier versions have
none, for they draw all alike."""
LINES_PER_BATCH = 65_536
BUILD = "run with phases=[cache,train], which encodes only what is missing"
REBUILD = "rebuild it with phases=[cache,train], or name another folder with cache.dir="


@dataclass(frozen=True)
class CacheHeader:
    """All that a record depends on besides its own row. Another header is another index."""

    fingerprint: str
    """Fingerprint of the weights and settings of the VAE and the text encoder."""
    geometry: Geometry
    dtype: str = "bfloat16"
    """What tensors are stored as."""
    caption_dropout: bool = False
    """Whether records have `empty_prompt_emb`."""
    negative: bool = False
    """Whether records have `negative_prompt_emb`."""
    schema_version: int = SCHEMA_VERSION
    encoder_dtype: str = ""
    """What the encoders computed in. Empty for an index from before this was known, which no build takes up again."""
    preserve: tuple[str, ...] = ()
    """Instructions of which each row has one more embedding, `preserve_prompt_emb`."""

    def to_json(self) -> str:
        """One canonical line: equal headers give equal text."""
        return json.dumps(self._values(), sort_keys=True)

    def _values(self) -> dict[str, Any]:
        """Without what says nothing: an index of an earlier version is that of the same header."""
        return {name: value for name, value in asdict(self).items() if name != "preserve" or value}

    def identity_json(self) -> str:
        """The same of what checkpoints know of their data. `encoder_dtype` is none of it: older runs continue."""
        return json.dumps({k: v for k, v in self._values().items() if k != "encoder_dtype"}, sort_keys=True)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "CacheHeader":
        """From the parsed `to_json`."""
        preserve = tuple(values.get("preserve", ()))
        return cls(**{**values, "geometry": Geometry(**values["geometry"]), "preserve": preserve})


class UnreadableIndex(InputError):
    """An index is damaged, or of another version.

    Args:
        schema: its version; None if it is damaged.
    """

    def __init__(self, message: str, schema: int | None = None):
        super().__init__(message)
        self.schema = schema

    @property
    def is_newer(self) -> bool:
        """Whether a later version of this program can read it."""
        return self.schema is not None and self.schema > SCHEMA_VERSION


class CacheFolder:
    """Where the parts of a cache are."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.indexes = self.path / "indexes"
        self.latents = self.path / "latents"
        self.texts = self.path / "texts"
        self.white = self.path / "sub_noise"
        self.digests = self.path / "digests.arrow"
        self.work = self.path / "work"

    def index(self, dataset: str, header: CacheHeader) -> Path:
        """The file of a dataset's index."""
        return self.indexes / f"{dataset}-{_digest(header.to_json())}.arrow"

    def sub_noise(self, header: CacheHeader, height: int, width: int) -> Path:
        """The file of white's latents; sizes are those of the latents. Only encoder and dtypes matter, not the rows."""
        text = f"{header.schema_version} {header.fingerprint} {header.dtype} {header.encoder_dtype}".rstrip()
        return self.white / f"{height}x{width}-{_digest(text)}.arrow"

    @property
    def earlier(self) -> list[Path]:
        """Folders of caches that an earlier version wrote here, each with one index and shards of its own."""
        return [folder for folder in (self.path, *self.path.glob("*")) if (folder / "index.arrow").is_file()]


class Index(NamedTuple):
    """One dataset in a cache."""

    path: Path
    header: CacheHeader
    name: str
    """Name of the dataset, for people."""
    sizes: dict[str, int]
    """Bytes of every file of records that its lines name, by `latents/<hash>.arrow`."""
    failures: dict[str, list[Any]]
    """Keys of what cannot be encoded, and why (a `data_prep.cache.keys.Failure`): their rows are left out."""
    lines: pa.Table
    """`INDEX_SCHEMA`, memory-mapped."""

    @property
    def dataset(self) -> str:
        """The digest of its rows."""
        return self.path.stem.split("-")[0]


class DatasetDigest:
    """Which dataset it is: a hash of what its rows say, not of their files' contents."""

    def __init__(self, rows: Iterable[Row] = ()):
        self.num_rows = 0
        self._hash = hashlib.blake2b(digest_size=8)
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> None:
        """The next row."""
        self.num_rows += 1
        self._hash.update(row_json(row).encode() + b"\n")

    def __str__(self) -> str:
        return self._hash.hexdigest()


def row_json(row: Row) -> str:
    """A row as a line of JSON, the paths absolute. What earlier versions did not know is left out where it is not used."""
    unused = {name for name in LATER if getattr(row, name) == DEFAULTS[name]}
    return json.dumps({name: value for name, value in vars(row).items() if name not in unused}, default=_plain)


def _plain(value: Any) -> Any:
    return asdict(value) if isinstance(value, Augmentation) else str(value)


def row_from_json(text: str) -> Row:
    """What `row_json` wrote."""
    values = json.loads(text)
    paths = {name: values[name] and Path(values[name]) for name in ("image", "ref_gt", "back_mask")}
    augmentation = values.get("augmentation") and Augmentation(**values["augmentation"])
    own = {**paths, "edit_image": tuple(map(Path, values["edit_image"])), "augmentation": augmentation}
    return Row(**{**values, **own})


def write_index(
    folder: CacheFolder,
    dataset: str,
    header: CacheHeader,
    name: str,
    sizes: dict[str, int],
    lines: Iterable[dict[str, Any]],
    failures: Mapping[str, Sequence[Any]] | None = None,
) -> None:
    """Publishes a view of the records: one line per row, in dataset order, with the columns of `INDEX_SCHEMA`."""
    metadata = {
        "header": header.to_json(),
        "name": name,
        "sizes": json.dumps(sizes),
        "failures": json.dumps(failures or {}),
    }
    write_arrow(folder.index(dataset, header), lines, INDEX_SCHEMA.with_metadata(metadata), LINES_PER_BATCH)


def read_index(path: Path) -> Index:
    """An index, whose lines stay on the disk.

    Raises:
        UnreadableIndex: it is damaged, or of another version.
        FileNotFoundError: it is not there.
    """
    try:
        lines = read_table(path)
        metadata = {name.decode(): value.decode() for name, value in (lines.schema.metadata or {}).items()}
        values = json.loads(metadata["header"])
    except (pa.ArrowInvalid, KeyError, ValueError) as error:
        raise UnreadableIndex(f"the cache index {path} is damaged ({error}): {REBUILD}") from None
    schema = values.get("schema_version")
    if schema != SCHEMA_VERSION:
        folder = path.parents[1]
        message = f"the cache at {folder} has schema {schema}, this version reads {SCHEMA_VERSION}: {REBUILD}"
        raise UnreadableIndex(message, schema)
    for name in sorted(set(PROMPTS) - set(lines.column_names)):  # of an earlier version
        lines = lines.append_column(name, pa.nulls(lines.num_rows, LOCATION))
    header, failures = CacheHeader.from_json(values), json.loads(metadata.get("failures", "{}"))
    return Index(path, header, metadata["name"], json.loads(metadata["sizes"]), failures, lines)


class Indexes(NamedTuple):
    """The indexes of a folder that can be read, and those that cannot. An index that vanishes meanwhile is neither."""

    readable: list[Index]
    unreadable: dict[Path, UnreadableIndex]


def read_indexes(paths: Iterable[Path]) -> Indexes:
    """Sorts out what `read_index` cannot read."""
    found = Indexes([], {})
    for path in paths:
        try:
            found.readable.append(read_index(path))
        except UnreadableIndex as error:
            found.unreadable[path] = error
        except FileNotFoundError:
            continue
    return found


def find_index(
    folder: CacheFolder,
    dataset: str | None = None,
    fingerprint: str | None = None,
    geometry: Geometry | None = None,
    caption_dropout: bool = False,
    negative: bool = False,
    encoder_dtype: str | None = None,
    preserve: tuple[str, ...] = (),
) -> Index:
    """The index of a dataset.

    Args:
        dataset: its digest; None: the only one that there is.
        fingerprint, geometry, encoder_dtype: those of the header; None: any.
        caption_dropout, negative, preserve: what records should have. An index that has more, or less, is taken where none is
            exact.

    Among several that fit the choice depends on their headers alone.

    Raises:
        InputError: there is no index of this dataset, or only for another model, geometry or dtype, or only a damaged one.
    """
    everything = sorted(folder.indexes.glob("*-*.arrow"))
    mine = [path for path in everything if dataset in (None, path.stem.split("-")[0])]
    if not everything:
        reason = " that this version reads" if folder.earlier else ""
        raise InputError(f"no finished cache{reason} at {folder.path}: {BUILD}")
    if not mine:
        names = sorted({index.name or index.dataset for index in read_indexes(everything).readable})
        others = f", but of {', '.join(names)}" if names else ""
        raise InputError(f"the cache at {folder.path} has no index of this dataset as its file is now{others}: {BUILD}")
    found, unreadable = read_indexes(mine)
    if not found:
        raise next(iter(unreadable.values()), InputError(f"the cache at {folder.path} has lost its index: {BUILD}"))
    words = {"fingerprint": "model", "geometry": "geometry", "encoder_dtype": "model.dtype"}
    for what, expected in zip(words, (fingerprint, geometry, encoder_dtype), strict=True):
        fitting = [index for index in found if expected in (None, getattr(index.header, what))]
        if not fitting:
            was = getattr(found[0].header, what) or "not known"
            raise InputError(
                f"the cache at {folder.path} was written with another {words[what]} ({was}, now {expected}): {REBUILD}"
            )
        found = fitting
    if len({index.dataset for index in found}) > 1:
        names = ", ".join(sorted({index.name or index.dataset for index in found}))
        raise InputError(f"the cache at {folder.path} has several datasets ({names}): name the one to read")

    def preference(index: Index) -> tuple[bool, int, str]:
        """Nothing that changes while ranks look one after the other, such as times."""
        has = index.header.caption_dropout, index.header.negative, index.header.preserve == preserve
        return has == (caption_dropout, negative, True), sum(has), index.header.to_json()

    return max(found, key=preference)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
