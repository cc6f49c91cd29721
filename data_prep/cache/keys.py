"""The identity of a record: a hash of everything that its tensors depend on, and of nothing else.

Latents do not depend on instructions, nor embeddings on targets and masks: each has a key of its own.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.cache.digests import FileDigests
from data_prep.cache.index import BUILD, CacheHeader
from data_prep.cache.ranks import Ranks
from data_prep.cache.reader import CacheReader
from data_prep.errors import InputError
from data_prep.jobs.prefetch import ahead
from data_prep.jobs.progress import progress
from data_prep.rows.images import RejectedImage, file_digest
from data_prep.rows.rows import EMPTY_PROMPT, RejectedRow, Row

Digest = Callable[[Path], str]


class Failure(NamedTuple):
    """Which file, and why."""

    path: str
    """Empty for a prompt."""
    reason: str
    lasting: bool = True
    """Whether the same contents fail again."""

    @classmethod
    def of(cls, error: RejectedImage) -> "Failure":
        """The same without a traceback, so that it can be written as JSON."""
        return cls(str(error.path), error.reason, error.lasting)

    def reject(self, row: Row) -> RejectedRow:
        """The report on a row that failed for this reason."""
        return RejectedRow(row.number, row.id, self.path or str(row.image), self.reason)


@dataclass
class KeyedRow:
    """A row and the keys of what is stored of it."""

    row: Row
    key: str
    """Key of the whole record."""
    latents: str
    """Key of its images' latents and its mask."""
    texts: dict[str, str]
    """Key of the embedding of each of its prompts, by the index's column: `prompt`, `empty_prompt`, …"""


def key_rows(
    rows: Sequence[Row], header: CacheHeader, ranks: Ranks, workers: int, digests: FileDigests
) -> list[KeyedRow | RejectedRow]:
    """The keys of every row, or why its files cannot be read. Each rank reads its share of them and tells the rest.

    Rank 0 saves what all have read.
    """
    answers = _share(rows[ranks.rank :: ranks.world_size], header, digests, workers, ranks.rank == 0)
    shares = ranks.exchange("keys", {"answers": answers, "digests": digests.new})
    if ranks.rank == 0:
        digests.save({file: digest for share in shares for file, digest in share["digests"].items()})
    return [
        _keyed(row, shares[place % ranks.world_size]["answers"][place // ranks.world_size])
        for place, row in enumerate(rows)
    ]


def _keyed(row: Row, answer: dict[str, Any] | list[Any]) -> KeyedRow | RejectedRow:
    return KeyedRow(row, **answer) if isinstance(answer, dict) else Failure(*answer).reject(row)


def _share(
    rows: Sequence[Row], header: CacheHeader, digests: FileDigests, workers: int, shown: bool
) -> list[dict[str, Any] | Failure]:
    digest = functools.lru_cache(maxsize=100_000)(digests)  # rows often share a source

    def answer(row: Row) -> dict[str, Any] | Failure:
        try:
            return {
                "key": record_key(row, header, digest),
                "latents": latents_key(row, header, digest),
                "texts": {name: text_key(row, text, header, digest) for name, text in prompts(row, header).items()},
            }
        except RejectedImage as error:
            return Failure.of(error)

    answers = []
    with progress("reading", len(rows), shown=shown) as advance:
        for result in ahead(answer, rows, ThreadPoolExecutor(workers), depth=4 * workers):
            answers.append(result)
            advance(1)
    return answers


def prompts(row: Row, header: CacheHeader) -> dict[str, str]:
    """What is encoded of a row's instructions, by the index's column."""
    return dict(_prompts(row, header))


def _prompts(row: Row, header: CacheHeader) -> Iterator[tuple[str, str]]:
    yield "prompt", row.prompt
    if header.caption_dropout:
        yield "empty_prompt", EMPTY_PROMPT
    if header.negative:
        yield "negative_prompt", row.negative_prompt or EMPTY_PROMPT
    if header.preserve:
        yield "preserve_prompt", preserve_prompt(row, header.preserve)


def preserve_prompt(row: Row, instructions: Sequence[str]) -> str:
    """Which of the instructions a row has: they take turns, and its own is passed over; the empty one if there is no other."""
    others = [each for each in instructions if each != row.prompt] or [EMPTY_PROMPT]
    return others[row.number % len(others)]


def check_files(reader: CacheReader, workers: int = 8) -> None:
    """Refuses a cache of pictures that have other contents now. One process is enough.

    A file whose size and time are known is not read, one that was only rewritten is read once, and one that is not there
    cannot contradict its record.

    Args:
        reader: cache reader of the dataset.
        workers: threads that look at files.

    Raises:
        InputError: some file of a row has changed since the row was encoded.
    """
    digests = FileDigests(reader.folder.digests)
    digest = functools.lru_cache(maxsize=100_000)(digests)

    def changed(row: Row, key: str) -> bool:
        try:
            return record_key(replace(row, ref_gt=None), reader.header, digest) != key
        except RejectedImage:
            return False

    def answer(pair: tuple[Row, str]) -> Row | None:
        return pair[0] if changed(*pair) else None

    pairs = zip(reader.rows, reader.keys, strict=True)
    found = [row for row in ahead(answer, pairs, ThreadPoolExecutor(workers), depth=4 * workers) if row]
    digests.save(digests.new)
    if found:
        raise InputError(
            f"the images of {len(found)} of {len(reader)} rows have changed since they were cached at {reader.folder.path}, "
            f"the first is row {found[0].number} ({found[0].image}): {BUILD}"
        )


def record_key(row: Row, header: CacheHeader, digest: Digest = file_digest) -> str:
    """The key of all that is stored of a row: 32 hexadecimal digits. Checkpoints remember it, to know their data again.

    Raises:
        RejectedImage: a file is missing, unreadable or empty; `ref_gt` too, although no tensor depends on it.
    """
    if row.ref_gt is not None:
        digest(row.ref_gt)
    return _hash(
        {
            "header": header.identity_json(),
            "prompt": row.prompt,
            "negative_prompt": (row.negative_prompt or EMPTY_PROMPT) if header.negative else None,
            "empty_prompt": EMPTY_PROMPT if header.caption_dropout else None,
            **_images(row, digest),
            **({"max_pixels": row.max_pixels} if row.max_pixels else {}),
            **({"preserve_prompt": preserve_prompt(row, header.preserve)} if header.preserve else {}),
        }
    )


def latents_key(row: Row, header: CacheHeader, digest: Digest = file_digest) -> str:
    """The key of a row's latents and mask.

    Raises:
        RejectedImage: a file is missing, unreadable or empty.
    """
    geometry = header.geometry.within(row.max_pixels)
    sizes = {"max_pixels": geometry.max_pixels, "reference_pixels": geometry.reference_pixels}
    return _hash({**_encoder(header), **sizes, **_images(row, digest)})


def text_key(row: Row, prompt: str, header: CacheHeader, digest: Digest = file_digest) -> str:
    """The key of the embedding of one instruction, which sees the row's sources; where these are cropped, target and mask
    decide on the crop.

    Raises:
        RejectedImage: a file is missing, unreadable or empty.
    """
    images = _images(row, digest) if row.augmentation else {"edit_image": [digest(path) for path in row.edit_image]}
    return _hash(
        {
            **_encoder(header),
            "vision_pixels": header.geometry.vision_pixels,
            "prompt": prompt,
            **images,
        }
    )


def _encoder(header: CacheHeader) -> dict[str, Any]:
    names = "schema_version", "fingerprint", "dtype", "encoder_dtype"
    return {name: getattr(header, name) for name in names}


def _images(row: Row, digest: Digest) -> dict[str, Any]:
    return {
        "image": digest(row.image),
        "edit_image": [digest(path) for path in row.edit_image],
        "bridge_image": row.bridge_image,
        "back_mask": digest(row.back_mask) if row.back_mask else None,
        **({"augmentation": asdict(row.augmentation)} if row.augmentation else {}),
    }


def _hash(contents: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(contents, sort_keys=True).encode(), digest_size=16).hexdigest()
