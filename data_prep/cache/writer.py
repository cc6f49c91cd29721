"""Phase 1: rows become a cache folder, once. Running again encodes only what is missing or changed.

Every row has a key: a hash of the *contents* of its images and mask, its prompt, and the header (encoders, geometry,
dtype, schema). A record is found by its key, so that a moved folder or a reordered file costs nothing, two rows with
the same contents share a record, and nothing made by another model or geometry is ever reused.

The work is cut over ranks by position in the list of missing keys, which all ranks compute alike. Records are written
in shards that appear whole, by renaming; after a kill, those that are there count as done. At the end rank 0 writes the
index. Records that no row wants any more are ignored and not deleted, since another run that shares the folder may be
reading them, and going back to an earlier dataset or setting then costs nothing; delete the folder to have the space.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import torch

from data_prep.cache.encoding import Encoders, PreparedRow, encode_rows, encode_white, prepare_row
from data_prep.cache.keys import Failure, KeyedRow, key_rows
from data_prep.cache.ranks import Ranks
from data_prep.cache.reader import CacheFolder, CacheHeader, target_size, write_index
from data_prep.cache.shards import SHARD_SCHEMA, SUB_NOISE_SCHEMA, read_arrow, to_arrow, write_arrow
from data_prep.errors import BadPrompt, InputError
from data_prep.files import remove_leftovers, write_text
from data_prep.jobs.prefetch import ahead
from data_prep.jobs.progress import progress
from data_prep.model.geometry import Geometry, Size
from data_prep.rows.images import RejectedImage
from data_prep.rows.rows import RejectedRow, Row


@dataclass
class CacheSummary:
    """What `build_cache` did, the same on every rank."""

    num_rows: int
    """Rows that the cache now serves."""
    num_encoded: int
    """Records encoded by this call, over all ranks; the others were there."""
    rejected: list[RejectedRow]
    """Rows left out, in dataset order."""
    seconds: float

    def __str__(self) -> str:
        rejected = f", {len(self.rejected)} rejected" if self.rejected else ""
        return f"{self.num_rows} rows cached ({self.num_encoded} encoded now{rejected}) in {self.seconds:.1f} s"


@dataclass(frozen=True)
class _Location:
    """Where a record is."""

    shard: str
    place: int
    bucket: str


def build_cache(
    rows: Iterable[Row | RejectedRow],
    geometry: Geometry,
    load_encoders: Callable[[], Encoders],
    folder: str | Path,
    *,
    fingerprint: str,
    rejected_path: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    batch_size: int = 4,
    shard_size: int = 64,
    caption_dropout: bool = False,
    negative: bool = False,
    on_error: Literal["raise", "skip"] = "raise",
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
    workers: int = 8,
) -> CacheSummary:
    """Makes `folder` the cache of `rows`. Every rank calls it with the same arguments but `rank`.

    Args:
        rows: from `read_rows`; the rejected ones are reported with those that fail here.
        geometry: sizes of everything.
        load_encoders: called once, and only if this rank has something to encode.
        folder: on a disk that all ranks share.
        fingerprint: of the weights that `load_encoders` loads.
        rejected_path: the report, one JSON object per rejected row: row, id, path, reason.
        dtype: what tensors are stored as.
        batch_size: images of one size per call of the VAE.
        shard_size: records per file, which is the most work that a kill can cost a rank.
        caption_dropout: also encode an empty instruction with each row's images.
        negative: also encode each row's negative prompt.
        on_error: with "raise", rejected rows stop the build: unreadable files before anything is encoded, broken
            images and bad prompts after the good rows are encoded, whose shards stay. The index is then not written.
        rank: this process, from 0.
        world_size: processes that share the work.
        barrier: returns when every rank has called it.
        workers: threads that read images.

    Raises:
        InputError: there are rejected rows and `on_error` is "raise", or there is no usable row.
    """
    start = time.monotonic()
    store = CacheFolder(folder)
    header = CacheHeader(fingerprint, geometry, str(dtype).removeprefix("torch."), caption_dropout, negative)
    all_rows = list(rows)
    if not all_rows:
        raise InputError("there are no rows to cache: check data.dataset and the column split")
    ranks = Ranks(rank, world_size, barrier, store.work / _job_id(all_rows, header))
    rejected = [row for row in all_rows if isinstance(row, RejectedRow)]
    good_rows = [row for row in all_rows if isinstance(row, Row)]

    def report() -> None:
        rejected.sort(key=lambda row: row.number)
        if rank == 0:
            _write_report(rejected, Path(rejected_path))
        if rejected and (on_error == "raise" or len(rejected) == len(all_rows)):
            barrier()  # the first process to fail may take the others with it
            raise InputError(_refusal(rejected, len(all_rows), rejected_path))

    existing = _scan(store, header)  # before the first exchange: until then no rank writes shards
    answers = key_rows(good_rows, header, ranks, workers)
    keyed = [answer for answer in answers if isinstance(answer, KeyedRow)]
    rejected += [answer for answer in answers if isinstance(answer, RejectedRow)]
    report()

    first_rows = {each.key: each for each in reversed(keyed)}  # one row of each key: the first
    missing = [each for each in keyed if each is first_rows[each.key] and each.key not in existing]
    encoding = _Encoding(load_encoders, store, header, batch_size, shard_size, workers, shown=rank == 0)
    broken: dict[str, Failure] = {}
    for share in ranks.exchange("broken", encoding.run(missing[rank::world_size])):
        broken.update({key: Failure(*failure) for key, failure in share.items()})
    rejected += [broken[each.key].reject(each.row) for each in keyed if each.key in broken]
    report()

    served = [each for each in keyed if each.key not in broken]
    if rank == 0:
        _publish(served, store, header)
    ranks.forget("keys", "broken")
    return CacheSummary(len(served), len(missing) - len(broken), rejected, time.monotonic() - start)


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

    def run(self, missing: list[KeyedRow]) -> dict[str, Failure]:
        """Writes a shard for every `shard_size` records. Returns the keys of those whose images or prompts cannot be used."""
        if not missing:
            return {}
        encoders = self.load_encoders()
        broken: dict[str, Failure] = {}
        prepared = ahead(self._prepare, missing, ThreadPoolExecutor(self.workers), depth=self.shard_size)
        with progress("caching", len(missing), shown=self.shown) as advance:
            for start in range(0, len(missing), self.shard_size):
                keys = [each.key for each in missing[start : start + self.shard_size]]
                results = dict(zip(keys, prepared, strict=False))  # takes as many as there are keys
                broken.update({key: result for key, result in results.items() if isinstance(result, Failure)})
                broken.update(
                    self._write([each for each in results.values() if isinstance(each, PreparedRow)], encoders)
                )
                advance(len(keys))
        return broken

    def _prepare(self, keyed: KeyedRow) -> PreparedRow | Failure:
        try:
            return prepare_row(keyed.key, keyed.row, self.header.geometry)
        except RejectedImage as error:
            return Failure.of(error)

    def _write(self, prepared: list[PreparedRow], encoders: Encoders) -> dict[str, Failure]:
        """White's latents first: a record that is there can rely on them. Returns the keys of rows with a bad prompt."""
        for size in {Size.of(each.target) for each in prepared}:
            path = self.store.sub_noise(self.header, *size.latent)
            if not path.exists():
                white = encode_white(size, encoders.vae).to(getattr(torch, self.header.dtype))
                write_arrow(path, [{"sub_noise": to_arrow(white)}], SUB_NOISE_SCHEMA)
        answers = encode_rows(prepared, encoders, self.header, self.batch_size)
        if values := [answer for answer in answers if not isinstance(answer, BadPrompt)]:
            name = hashlib.blake2b("".join(value["key"] for value in values).encode(), digest_size=8).hexdigest()
            write_arrow(self.store.shard(name), values, SHARD_SCHEMA)
        return {
            each.key: Failure(str(each.row.image), str(answer))
            for each, answer in zip(prepared, answers, strict=True)
            if isinstance(answer, BadPrompt)
        }


def _job_id(rows: list[Row | RejectedRow], header: CacheHeader) -> str:
    """Keeps the messages of two jobs that share a cache folder apart."""
    digest = hashlib.blake2b(header.to_json().encode(), digest_size=8)
    for row in rows:
        digest.update(repr(row).encode())
    return digest.hexdigest()


def _scan(store: CacheFolder, header: CacheHeader) -> dict[str, _Location]:
    """Where every record is, by key. A damaged shard counts as absent, and so do records whose white is lost."""
    locations: dict[str, _Location] = {}
    for path in sorted(store.shards.glob("*.arrow")):
        try:
            shard = read_arrow(path)
        except pa.ArrowInvalid:
            continue
        if shard.schema.equals(SHARD_SCHEMA):
            keys, buckets = shard.column("key").to_pylist(), shard.column("bucket").to_pylist()
            for place, (key, bucket) in enumerate(zip(keys, buckets, strict=True)):
                locations[key] = _Location(path.stem, place, bucket)
    white = {
        bucket: store.sub_noise(header, *target_size(bucket)).exists()
        for bucket in {each.bucket for each in locations.values()}
    }
    return {key: location for key, location in locations.items() if white[location.bucket]}


def _publish(served: list[KeyedRow], store: CacheFolder, header: CacheHeader) -> None:
    """Writes the index, and clears away what killed processes left half written."""
    locations = _scan(store, header)
    lines = []
    for each in served:
        row = json.dumps(asdict(each.row), default=str, ensure_ascii=False)
        lines.append({"key": each.key, "id": each.row.id, "row": row, **asdict(locations[each.key])})
    write_index(store, header, lines)
    remove_leftovers(store.shards)
    remove_leftovers(store.white)


def _write_report(rejected: list[RejectedRow], path: Path) -> None:
    write_text(path, "".join(json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in rejected))


def _refusal(rejected: list[RejectedRow], num_rows: int, report: str | Path) -> str:
    way_out = "mend them" if len(rejected) == num_rows else "mend them or set data.on_error=skip"
    return f"{rejected[0]}. {len(rejected)} of {num_rows} rows cannot be used, all listed in {report}: {way_out}"
