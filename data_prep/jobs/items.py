"""Work on many files by many processes: in order, whatever their number, and continued where it was interrupted.

An item is one unit of a long job: a pair, a photograph, a row. Items are cut into parts at places that depend on their ids
alone, so that one more item changes one part. What a part gives is written to one file that appears whole. Running again
takes what is there, as long as neither the work and its code, nor the item, nor its files and results have changed since.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from data_prep.files import make_folder, write_text
from data_prep.jobs.progress import progress
from data_prep.rows.images import RejectedImage
from data_prep.rows.rows import RejectedRow
from data_prep.rows.tables import BadRow

PARTS_FOLDER = ".parts"
"""Below the folder that a command writes: where the answers of its parts are kept."""
PART_SIZE = 16
"""Items of a part, on average: the most work that a kill can cost a process."""

LIBRARIES = ("numpy", "scipy", "pillow", "scikit-image", "imagehash", "pycocotools", "fonttools")
"""Whose versions results may depend on."""


@dataclass(frozen=True)
class Item:
    """One unit of work."""

    number: int
    """Place in the input, from 1, for reports. It does not change what is made."""
    id: str
    """Unique, and the same in every run: results, and the names of the files that are made, depend on it."""
    files: tuple[Path, ...] = ()
    """What is read, made absolute. When one of them changes its size or its time, the item is done again."""
    values: Any = None
    """Anything else that the work needs, as JSON has it."""

    def __post_init__(self):
        object.__setattr__(self, "files", tuple(Path(os.path.abspath(path)) for path in self.files))


class Work(Protocol):
    """What is done to each item, in worker processes: a frozen dataclass, whose `repr` says all that results depend on."""

    def __call__(self, item: Item) -> "Result":
        """Raises `RejectedImage` or `BadRow` for an item that cannot be used."""
        ...


@dataclass(frozen=True)
class Result:
    """What the work gives for one item."""

    value: Any
    """As JSON has it."""
    files: tuple[Path, ...] = ()
    """What was written, relative to the parts' parent folder. If one of them is gone or changed, the item is done again."""


@dataclass(frozen=True)
class Done:
    """An item and what was made of it."""

    item: Item
    value: Any


class Engine(Protocol):
    """An ordered `map` over many processes."""

    def __call__(self, function: Callable[["Part"], str], parts: Iterable["Part"]) -> Iterator[str]: ...


@dataclass(frozen=True)
class Part:
    """Some items in a row, and where their results are kept."""

    entries: tuple[Item | RejectedRow, ...]
    """The rejected ones are passed through, to stay in order."""
    path: Path

    @property
    def items(self) -> list[Item]:
        """What there is to do."""
        return [entry for entry in self.entries if isinstance(entry, Item)]


def run_items(
    items: Iterable[Item | RejectedRow], work: Work, folder: Path, engine: Engine, title: str, total: int | None = None
) -> Iterator[Done | RejectedRow]:
    """Does the work on all items. Yields an answer for each, in order.

    Args:
        items: a stream; what could not even become an item passes through.
        work: called in the workers.
        folder: where parts are kept; on a disk that all workers share.
        engine: who does it.
        title: for the progress bar.
        total: the number of items, if it is known.

    Raises:
        InputError: the folder cannot be written to.
    """
    folder = Path(os.path.abspath(folder))  # workers of a cluster start elsewhere
    make_folder(folder)
    parts: list[Part] = []  # those that the engine has taken and not yet given back

    def taken() -> Iterator[Part]:
        for part in _cut(items, work, folder):
            parts.append(part)
            yield part

    with progress(title, total) as advance:
        for text in engine(partial(do_part, work), taken()):
            part = parts.pop(0)
            answers = iter(map(json.loads, _lines(text)))
            for entry in part.entries:
                if isinstance(entry, RejectedRow):
                    yield entry
                    continue
                answer = next(answers)
                if "reason" in answer:
                    yield RejectedRow(entry.number, entry.id, answer["path"], answer["reason"])
                else:
                    yield Done(entry, answer["value"])
            advance(len(part.entries))


def do_part(work: Work, part: Part) -> str:
    """The answers of a part as JSON lines: those that are kept, and new ones. Rejected items are tried anew each time."""
    before = _read(part.path)
    kept = {line["key"]: line for line in before if _is_there(line, part.path.parents[1])}
    keys = map(_key, part.items)
    lines = [
        kept.get(key) or {"key": key, **_answer(work, item, part.path)}
        for key, item in zip(keys, part.items, strict=True)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if lines != before:
        write_text(part.path, text)
    return text


def _cut(items: Iterable[Item | RejectedRow], work: Work, folder: Path) -> Iterator[Part]:
    """Cuts after ids whose hash is 0 modulo PART_SIZE, and at four times the size."""
    entries: list[Item | RejectedRow] = []
    for entry in items:
        entries.append(entry)
        ends = int.from_bytes(_digest(entry.id.encode(errors="backslashreplace"))[:4]) % PART_SIZE == 0
        if ends or len(entries) == 4 * PART_SIZE:
            yield _part(entries, work, folder)
            entries = []
    if entries:
        yield _part(entries, work, folder)


def _part(entries: list[Item | RejectedRow], work: Work, folder: Path) -> Part:
    """Its name says all that its results depend on but for what `_key` says of each item."""
    ids = [entry.id for entry in entries]
    name = _digest(json.dumps([_code(), repr(work), ids]).encode()).hex()
    return Part(tuple(entries), folder / f"{name}.jsonl")


@cache
def _code() -> str:
    """Changes with the code of data_prep and the libraries that compute: what older ones made is not mixed with new."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return f"{digest.hexdigest()} {[version(library) for library in LIBRARIES]}"


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _lines(text: str) -> list[str]:
    """Not `splitlines`, which cuts at Unicode's other line ends too."""
    return text.split("\n")[:-1]


def _stamp(path: Path) -> tuple[int, int] | None:
    """Changes when the file does; None if it cannot be looked at, which the work will report."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _key(item: Item) -> str:
    """Changes with what is asked of an item."""
    return _digest(
        json.dumps([item.id, [(str(path), _stamp(path)) for path in item.files], item.values]).encode()
    ).hex()


def _read(path: Path) -> list[dict[str, Any]]:
    """The answers in a part's file; none of a file that is missing or damaged."""
    try:
        return [json.loads(line) for line in _lines(path.read_text(encoding="utf-8"))]
    except (FileNotFoundError, ValueError):
        return []


def _is_there(answer: dict[str, Any], out: Path) -> bool:
    """Whether an item was done, and what was written then is as it was."""
    files = answer.get("files", {}).items()
    return "reason" not in answer and all(stamp and _stamp(out / name) == tuple(stamp) for name, stamp in files)


def _answer(work: Work, item: Item, part: Path) -> dict[str, Any]:
    try:
        result = work(item)
    except RejectedImage as error:
        return {"path": str(error.path), "reason": error.reason}
    except BadRow as error:
        return {"path": str(item.files[0]) if item.files else item.id, "reason": str(error)}
    return {"value": result.value, "files": {str(file): _stamp(part.parents[1] / file) for file in result.files}}
