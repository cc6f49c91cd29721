"""The identity of a record: a hash of everything that its tensors depend on, and of nothing else."""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data_prep.cache.ranks import Ranks
from data_prep.cache.reader import CacheHeader
from data_prep.jobs.prefetch import ahead
from data_prep.jobs.progress import progress
from data_prep.rows.images import RejectedImage, file_digest
from data_prep.rows.rows import EMPTY_PROMPT, RejectedRow, Row


class Failure(NamedTuple):
    """Which file, and why."""

    path: str
    reason: str

    @classmethod
    def of(cls, error: RejectedImage) -> "Failure":
        """The same without a traceback, so that it can be written as JSON."""
        return cls(str(error.path), error.reason)

    def reject(self, row: Row) -> RejectedRow:
        """The report on a row that failed for this reason."""
        return RejectedRow(row.number, row.id, self.path, self.reason)


@dataclass
class KeyedRow:
    """A row and the key of its record."""

    row: Row
    key: str


def key_rows(rows: Sequence[Row], header: CacheHeader, ranks: Ranks, workers: int) -> list[KeyedRow | RejectedRow]:
    """The key of every row, or why its files cannot be read. Each rank reads its share of them and tells the rest."""
    mine = rows[ranks.rank :: ranks.world_size]
    digest = functools.lru_cache(maxsize=100_000)(file_digest)  # rows often share a source
    shares: list[list[str | list[str]]] = ranks.exchange("keys", _share(mine, header, digest, workers, ranks.rank == 0))
    return [_keyed(row, shares[place % ranks.world_size][place // ranks.world_size]) for place, row in enumerate(rows)]


def _keyed(row: Row, answer: str | list[str]) -> KeyedRow | RejectedRow:
    return KeyedRow(row, answer) if isinstance(answer, str) else Failure(*answer).reject(row)


def _share(
    rows: Sequence[Row], header: CacheHeader, digest: Callable[[Path], str], workers: int, shown: bool
) -> list[str | Failure]:
    def answer(row: Row) -> str | Failure:
        try:
            return record_key(row, header, digest)
        except RejectedImage as error:
            return Failure.of(error)

    answers = []
    with progress("reading", len(rows), shown=shown) as advance:
        for result in ahead(answer, rows, ThreadPoolExecutor(workers), depth=4 * workers):
            answers.append(result)
            advance(1)
    return answers


def record_key(row: Row, header: CacheHeader, digest: Callable[[Path], str] = file_digest) -> str:
    """The key of a row's record: 32 hexadecimal digits.

    Raises:
        RejectedImage: a file is missing, unreadable or empty; `ref_gt` too, although no tensor depends on it.
    """
    if row.ref_gt is not None:
        digest(row.ref_gt)
    contents = {
        "header": header.to_json(),
        "prompt": row.prompt,
        "negative_prompt": (row.negative_prompt or EMPTY_PROMPT) if header.negative else None,
        "empty_prompt": EMPTY_PROMPT if header.caption_dropout else None,
        "image": digest(row.image),
        "edit_image": [digest(path) for path in row.edit_image],
        "bridge_image": row.bridge_image,
        "back_mask": digest(row.back_mask) if row.back_mask else None,
    }
    return hashlib.blake2b(json.dumps(contents, sort_keys=True).encode(), digest_size=16).hexdigest()
