"""Phase 1: rows become records of a cache folder and an index, once. Running again encodes only what is missing or changed.

Latents and embeddings have keys: hashes of the *contents* of what they depend on (images and mask, or images and
instruction) and of encoders, sizes, dtypes and schema. A record is found by its key, so that a moved folder or a reordered
file costs nothing, datasets share what they have in common, a new instruction does not run the VAE, and nothing made by
another model or geometry is ever reused.

Rank 0 says what is missing, and the ranks share it by position. Records are written in shards that appear whole, by
renaming; after a kill, those that are there count as done. At the end rank 0 writes the index. Records that no row wants
any more are ignored and not deleted, since another run that shares the folder may be reading them, and going back to an
earlier dataset or setting then costs nothing; `data_prep/run.py cache prune` makes room.
"""

import hashlib
import itertools
import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import torch

from data_prep.cache.digests import FileDigests
from data_prep.cache.encoding import Encoders, Lacking, PreparedRow, encode_rows, encode_white, prepare_row
from data_prep.cache.index import (
    CacheFolder,
    CacheHeader,
    DatasetDigest,
    read_index,
    row_json,
    write_index,
)
from data_prep.cache.keys import Failure, KeyedRow, key_rows, prompts
from data_prep.cache.ranks import Ranks
from data_prep.cache.reader import file_size, mark_used, target_size
from data_prep.cache.shards import (
    LATENTS_SCHEMA,
    SUB_NOISE_SCHEMA,
    TEXT_SCHEMA,
    read_arrow,
    to_arrow,
    write_arrow,
)
from data_prep.errors import InputError
from data_prep.files import remove_leftovers, write_text
from data_prep.jobs.prefetch import ahead
from data_prep.jobs.progress import progress
from data_prep.model.geometry import Size
from data_prep.rows.rows import RejectedRow, Row

BUILDING = ".building"
"""Suffix of the file that says that a build is running, below the folder `work`."""


@dataclass
class CacheSummary:
    """What `build_cache` did, the same on every rank."""

    dataset: str
    """The digest of the rows, for `CacheReader`."""
    num_rows: int
    """Rows that the cache now serves."""
    num_encoded: int
    """Rows of which this call encoded something, over all ranks; the others were there."""
    rejected: list[RejectedRow]
    """Rows left out, in dataset order."""
    seconds: float

    def __str__(self) -> str:
        rejected = f", {len(self.rejected)} rejected" if self.rejected else ""
        return f"{self.num_rows} rows cached ({self.num_encoded} encoded now{rejected}) in {self.seconds:.1f} s"


def build_cache(
    rows: Iterable[Row | RejectedRow],
    header: CacheHeader,
    load_encoders: Callable[[], Encoders],
    folder: str | Path,
    *,
    rejected_path: str | Path,
    name: str = "",
    batch_size: int = 4,
    shard_size: int = 64,
    on_error: Literal["raise", "skip"] = "raise",
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
    job: str | None = None,
    workers: int = 8,
    check_keys: Callable[[Sequence[str]], None] = lambda keys: None,
) -> CacheSummary:
    """Makes `folder` serve `rows`. Every rank calls it with the same arguments but `rank`.

    Args:
        rows: from `read_rows`; the rejected ones are reported with those that fail here.
        header: sizes, encoders and number types of all records, and which embeddings they have. `encoder_dtype` must be set.
        load_encoders: called once, and only if this rank has something to encode.
        folder: on a disk that all ranks share.
        rejected_path: the report, one JSON object per rejected row: row, id, path, reason.
        name: name of the dataset, for people who look at what the folder holds.
        batch_size: images of one size per call of the VAE.
        shard_size: rows per file, which is the most work that a kill can cost a rank.
        on_error: with "raise", rejected rows stop the build: unreadable files before anything is encoded, broken
            images and bad prompts after the good rows are encoded, whose shards stay. The index is then not written.
        rank, world_size: this process, from 0, and how many share the work.
        barrier: returns when every rank has called it.
        job: tells the messages of these ranks from those of other builds in the folder; None: a hash of the rows, which
            is enough where no two builds of the same rows run at once.
        workers: threads that read images.
        check_keys: called with the keys of all rows before anything is encoded, where something has to be and no row may be
            left out. What it raises ends the build.

    Raises:
        InputError: there are rejected rows and `on_error` is "raise", or there is no usable row.
    """
    start = time.monotonic()
    store, all_rows = CacheFolder(folder), list(rows)
    if not all_rows:
        raise InputError("there are no rows to cache: check data.dataset and the column split")
    good_rows = [row for row in all_rows if isinstance(row, Row)]
    dataset = str(DatasetDigest(good_rows))
    job = job or store.index(dataset, header).stem
    ranks = Ranks(rank, world_size, barrier, store.work / job)
    rejections = _Rejections(ranks, len(all_rows), Path(rejected_path), on_error)
    rejections.found += [row for row in all_rows if isinstance(row, RejectedRow)]

    with _building(store.work / f"{job}-{uuid.uuid4().hex}{BUILDING}") as touch:
        keyed = rejections.sort_out(key_rows(good_rows, header, ranks, workers, FileDigests(store.digests)))
        touch()
        stored = _Stored(store, header)
        known = _finished(store, dataset, header, keyed, on_error) if rank == 0 else None
        lacking = stored.lacking(keyed) if rank == 0 and known is None else []
        [(missing, known_failures), *_] = ranks.exchange("missing", (lacking, known or {}))
        if missing and on_error == "raise":
            check_keys([each.key for each in keyed])
        encoding = _Encoding(load_encoders, store, header, batch_size, shard_size, workers, rank == 0, touch)
        work = [_lacking(keyed[place], latents, texts, header) for place, latents, texts in missing[rank::world_size]]
        failures: dict[str, Failure] = {}
        for share in (known_failures, *ranks.exchange("failures", encoding.run(work))):
            failures.update({key: Failure(*failure) for key, failure in share.items()})
        served = rejections.without(keyed, failures)

        if known is not None:
            mark_used(store.index(dataset, header))
        elif rank == 0:
            stored.publish(served, dataset, name, failures)
        ranks.forget()
    kept = {id(each) for each in served}
    num_encoded = sum(id(keyed[place]) in kept for place, *_ in missing)
    return CacheSummary(dataset, len(served), num_encoded, rejections.found, time.monotonic() - start)


@contextmanager
def _building(marker: Path) -> Iterator[Callable[[], None]]:
    """Says with a file, whose time `touch()` makes the present, that a build relies on the records that are there.

    Every process has a file of its own: the first to leave takes none from the others, nor from another build.
    """
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.touch()
    try:
        yield marker.touch
    finally:
        marker.unlink(missing_ok=True)


@dataclass
class _Rejections:
    """Rows that cannot be used."""

    ranks: Ranks
    num_rows: int
    """Number of rows of the dataset."""
    path: Path
    on_error: Literal["raise", "skip"]
    found: list[RejectedRow] = field(default_factory=list)

    def sort_out(self, answers: Iterable[KeyedRow | RejectedRow]) -> list[KeyedRow]:
        """The rows that can be read; the others are rejected. Raises as `report`."""
        keyed = []
        for answer in answers:
            if isinstance(answer, KeyedRow):
                keyed.append(answer)
            else:
                self.found.append(answer)
        self.report()
        return keyed

    def without(self, keyed: list[KeyedRow], failures: dict[str, Failure]) -> list[KeyedRow]:
        """The rows of which nothing failed; the others are rejected. Raises as `report`."""
        served = []
        for each in keyed:
            reasons = [failures[key] for key in (each.latents, *each.texts.values()) if key in failures]
            if reasons:
                self.found.append(reasons[0].reject(each.row))
            else:
                served.append(each)
        self.report()
        return served

    def report(self) -> None:
        """Writes the report, and ends the build if it must.

        Raises:
            InputError: there are rejected rows and none may be, or there is no other row.
        """
        rejected = self.found
        rejected.sort(key=lambda row: row.number)
        if self.ranks.rank == 0:
            lines = [json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in rejected]
            write_text(self.path, "".join(lines))
        if not rejected or (self.on_error == "skip" and len(rejected) < self.num_rows):
            return
        self.ranks.forget()  # waits: the first process to fail may take the others with it
        way_out = "fix them" if len(rejected) == self.num_rows else "fix them or set data.on_error=skip"
        raise InputError(
            f"{rejected[0]}. {len(rejected)} of {self.num_rows} rows cannot be used, all listed in {self.path}: {way_out}"
        )


Missing = tuple[int, bool, list[str]]
"""A row's place, whether its latents are missing, and the columns of its missing embeddings; a list in JSON."""


def _lacking(keyed: KeyedRow, latents: bool, texts: list[str], header: CacheHeader) -> Lacking:
    instructions = prompts(keyed.row, header)
    wanted = {keyed.texts[name]: instructions[name] for name in texts}
    return Lacking(keyed.row, keyed.latents if latents else None, wanted)


@dataclass
class _Encoding:
    """One rank's part of the encoding."""

    load_encoders: Callable[[], Encoders]
    store: CacheFolder
    header: CacheHeader
    batch_size: int
    shard_size: int
    workers: int
    shown: bool
    touch: Callable[[], None]

    def run(self, work: list[Lacking]) -> dict[str, Failure]:
        """Writes shards for every `shard_size` rows. Returns the keys of what cannot be encoded."""
        if not work:
            return {}
        encoders = self.load_encoders()
        failures: dict[str, Failure] = {}
        prepared = ahead(self._prepare, work, ThreadPoolExecutor(self.workers), depth=self.shard_size)
        with progress("caching", len(work), shown=self.shown) as advance:
            for _ in range(0, len(work), self.shard_size):
                rows = list(itertools.islice(prepared, self.shard_size))
                failures.update(self._write(rows, encoders))
                advance(len(rows))
        return failures

    def _prepare(self, lacking: Lacking) -> PreparedRow:
        return prepare_row(lacking, self.header.geometry)

    def _write(self, prepared: list[PreparedRow], encoders: Encoders) -> dict[str, Failure]:
        """White's latents first: a record that is there can rely on them."""
        dtype = getattr(torch, self.header.dtype)
        for size in {Size.of(each.images.target) for each in prepared if each.images}:
            path = self.store.sub_noise(self.header, *size.latent)
            if not path.exists():
                white = encode_white(size, encoders.vae).to(dtype)
                write_arrow(path, [{"sub_noise": to_arrow(white)}], SUB_NOISE_SCHEMA)
        encoded = encode_rows(prepared, encoders, dtype, self.batch_size)
        _write_shard(self.store.texts, encoded.texts, TEXT_SCHEMA)
        _write_shard(self.store.latents, encoded.latents, LATENTS_SCHEMA)
        self.touch()
        return {key: failure for each in prepared for key, failure in each.failures.items()} | encoded.failures


def _write_shard(folder: Path, values: list[dict[str, Any]], schema: pa.Schema) -> None:
    if values:
        name = hashlib.blake2b("".join(value["key"] for value in values).encode(), digest_size=8).hexdigest()
        write_arrow(folder / f"{name}.arrow", values, schema)


@dataclass
class _Stored:
    """Where every record is, by key. A damaged shard counts as absent, and so do latents whose white is lost."""

    store: CacheFolder
    header: CacheHeader
    latents: dict[str, tuple[str, int, str]] = field(default_factory=dict)
    """Shard, place and bucket."""
    texts: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    """Shard, place and number of tokens."""
    _seen: set[Path] = field(default_factory=set)

    def lacking(self, keyed: list[KeyedRow]) -> list[Missing]:
        """What is missing of the rows; what several of them share, only with the first."""
        self._look()
        claimed: set[str] = set()
        found: list[Missing] = []
        for place, each in enumerate(keyed):
            latents = each.latents not in claimed and each.latents not in self.latents
            texts = []
            for name, key in each.texts.items():
                if key not in claimed and key not in self.texts:
                    texts.append(name)
                    claimed.add(key)
            if latents:
                claimed.add(each.latents)
            if latents or texts:
                found.append((place, latents, texts))
        return found

    def publish(self, served: list[KeyedRow], dataset: str, name: str, failures: dict[str, Failure]) -> None:
        """Writes the index, and clears away what killed processes left half written."""
        self._look()
        sizes = {
            f"{folder.name}/{shard}.arrow": (folder / f"{shard}.arrow").stat().st_size
            for folder, shards in (
                (self.store.latents, {self.latents[each.latents][0] for each in served}),
                (self.store.texts, {self.texts[key][0] for each in served for key in each.texts.values()}),
            )
            for shard in sorted(shards)
        }
        lasting = {key: failure for key, failure in failures.items() if failure.lasting}
        write_index(self.store, dataset, self.header, name, sizes, map(self._line, served), lasting)
        for folder in (self.store.latents, self.store.texts, self.store.white, self.store.indexes, self.store.path):
            remove_leftovers(folder)

    def _line(self, keyed: KeyedRow) -> dict[str, Any]:
        shard, place, bucket = self.latents[keyed.latents]
        texts = {name: self.texts[key] for name, key in keyed.texts.items()}
        return {
            "key": keyed.key,
            "id": keyed.row.id,
            "bucket": bucket,
            "text_tokens": max(tokens for _, _, tokens in texts.values()),
            "latents": {"shard": shard, "place": place},
            **{name: {"shard": where, "place": place} for name, (where, place, _) in texts.items()},
            "row": row_json(keyed.row),
            "weight": keyed.row.weight,
        }

    def _look(self) -> None:
        """Reads the keys of the shards that it has not seen yet."""
        for path, shard in self._unseen(self.store.latents, LATENTS_SCHEMA):
            keys, buckets = shard.column("key").to_pylist(), shard.column("bucket").to_pylist()
            white = {b: self.store.sub_noise(self.header, *target_size(b)).exists() for b in set(buckets)}
            self.latents |= {
                key: (path.stem, place, bucket)
                for place, (key, bucket) in enumerate(zip(keys, buckets, strict=True))
                if white[bucket]
            }
        for path, shard in self._unseen(self.store.texts, TEXT_SCHEMA):
            keys, shapes = shard.column("key").to_pylist(), shard.column("prompt_emb").field("shape").to_pylist()
            self.texts |= {
                key: (path.stem, place, shape[0]) for place, (key, shape) in enumerate(zip(keys, shapes, strict=True))
            }

    def _unseen(self, folder: Path, schema: pa.Schema) -> Iterator[tuple[Path, pa.RecordBatch]]:
        for path in sorted(set(folder.glob("*.arrow")) - self._seen):
            try:
                shard = read_arrow(path)
            except (pa.ArrowInvalid, FileNotFoundError):
                continue
            if shard.schema.equals(schema):
                self._seen.add(path)
                yield path, shard


def _finished(
    store: CacheFolder, dataset: str, header: CacheHeader, keyed: list[KeyedRow], on_error: Literal["raise", "skip"]
) -> dict[str, Failure] | None:
    """What cannot be encoded, if there is an index of all other records, whose files are whole as far as sizes tell.

    None if there is something to do. With `on_error="raise"` whatever failed is tried again.
    """
    try:
        index = read_index(store.index(dataset, header))
    except (FileNotFoundError, InputError):
        return None
    failures = {key: Failure(*failure) for key, failure in index.failures.items()}
    served = [each.key for each in keyed if not failures.keys() & {each.latents, *each.texts.values()}]
    if index.lines.column("key").to_pylist() != served or (failures and on_error == "raise"):
        return None
    buckets = index.lines.column("bucket").unique().to_pylist()
    whole = all(file_size(store.path / name) == size for name, size in index.sizes.items()) and all(
        store.sub_noise(header, *target_size(bucket)).exists() for bucket in buckets
    )
    return failures if whole else None
