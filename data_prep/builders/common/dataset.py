"""What all builders share: items become rows, rows become a dataset file and a report of what was left out."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from data_prep.cli import OnErrorName
from data_prep.errors import InputError
from data_prep.files import atomic_file, make_folder, write_text
from data_prep.jobs.items import PARTS_FOLDER, Done, Engine, Item, Result, run_items
from data_prep.rows.rows import RejectedRow, parse_row

DATASET_FILE, REJECTED_FILE = "dataset.jsonl", "rejected.jsonl"
PATH_COLUMNS = ("image", "edit_image", "ref_gt", "back_mask")


class MakeRows(Protocol):
    """What a builder does to an item, in worker processes: a frozen dataclass; what its `repr` does not show, results
    may not depend on."""

    def __call__(self, item: Item, out: Path) -> list[dict[str, Any]]:
        """The rows of the dataset file that this item gives, with paths as `Path`; pictures are saved below `out`.

        Raises `RejectedImage` or `BadRow` for an item that cannot be used.
        """
        ...


@dataclass(frozen=True)
class _Build:
    """A builder's work, with paths as the dataset file has them."""

    make: MakeRows
    out: Path = field(repr=False)

    def __call__(self, item: Item) -> Result:
        rows = [_written(row, self.out) for row in self.make(item, self.out)]
        for row in rows:
            parse_row(item.number, item.id, row, self.out)  # what training would refuse is rejected here
        paths = {path for row in rows for name in PATH_COLUMNS if name in row for path in _as_list(row[name])}
        return Result(rows, tuple(Path(path) for path in sorted(paths) if not os.path.isabs(path)))


def build_dataset(
    items: Iterable[Item | RejectedRow],
    make: MakeRows,
    out: Path,
    engine: Engine,
    *,
    title: str,
    total: int | None = None,
    on_error: OnErrorName = "raise",
    no_row: str = "items gave no row",
    writes: Sequence[str] = (),
) -> int:
    """Writes `out/dataset.jsonl` and `out/rejected.jsonl`, in the order of the items, and says what was done.

    Paths are relative to `out` where they are below it, so that the folder can be moved, and absolute elsewhere.

    Args:
        items: what there is to do; the rejected are reported.
        make: turns one item into rows.
        out: the dataset's folder, which is made; absolute paths in rows that are below it become relative.
        engine: who does it.
        title: for the progress bar.
        total: the number of items, if it is known.
        on_error: with "raise", rejected items are an error at the end, when the good rows are written.
        no_row: what is said after the number of items of which `make` made no row.
        writes: folders below `out` that pictures are saved to; nothing may be read from there.

    Returns:
        The number of rows.

    Raises:
        InputError: there are no rows, or rejected ones and `on_error` is "raise"; or somebody's file would be replaced.
    """
    out = Path(os.path.abspath(out))
    for folder in (out, *(out / name for name in writes)):
        make_folder(folder)
    made = _Made(out, title)
    made.check()
    num_rows, num_empty, num_rejected, first = 0, 0, 0, None
    seen: set[int] = set()  # hashes of ids: strings would take several times the memory
    answers = run_items(_foreign(items, out, writes), _Build(make, out), out / PARTS_FOLDER, engine, title, total)
    with lines_file(out / DATASET_FILE, made.note) as write_row, lines_file(out / REJECTED_FILE) as write_rejected:
        for answer in answers:
            num_empty += isinstance(answer, Done) and not answer.value
            for row in _unique(answer, seen):
                if isinstance(row, RejectedRow):
                    num_rejected, first = num_rejected + 1, first or row
                    write_rejected(row.to_json())
                else:
                    num_rows += 1
                    write_row(row)
    print(f"{num_rows} rows in {out / DATASET_FILE}")
    if num_empty:
        print(f"{num_empty} {no_row}")
    if not num_rows and not first:
        raise InputError(f"no row was made: {num_empty} {no_row}")
    tell_rejected(first, num_rejected, out / REJECTED_FILE, "raise" if not num_rows else on_error)
    return num_rows


def tell_rejected(first: RejectedRow | None, number: int, report: Path, on_error: OnErrorName) -> None:
    """The last word of a command that left something out.

    Raises:
        InputError: something was left out, and `on_error` is "raise".
    """
    if first and on_error == "raise":
        raise InputError(
            f"{first}. {number} could not be used, all listed in {report}: fix or remove them, or add --on-error skip"
        )
    if first:
        print(f"{number} could not be used and are listed in {report}")


@contextmanager
def lines_file(
    path: Path, written: Callable[[Path], None] = lambda _: None
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A JSONL file, whole or absent. Half characters, as in file names that are not UTF-8, are escaped.

    `written` is called with the temporary file, when all is in it and before it takes its place.
    """
    with atomic_file(path) as temporary:
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
            yield lambda values: print(json.dumps(values, ensure_ascii=False), file=file)
        written(temporary)


@dataclass(frozen=True)
class _Made:
    """Which command made the dataset file of a folder, and what it looked like then: a file that somebody else wrote or
    changed is not replaced."""

    out: Path
    command: str

    def check(self) -> None:
        """Raises InputError if the dataset file is not this command's own."""
        path = self.out / DATASET_FILE
        if path.exists() and _file_digest(path) not in self._digests():
            raise InputError(
                f"{path} exists and was not made by this command, or was changed since: move it, or choose another --out"
            )

    def note(self, new: Path) -> None:
        """Notes what the dataset file is going to be. The one before stays known: it is there until the new one is."""
        digests = [*self._digests()[-1:], _file_digest(new)]
        write_text(self._note, json.dumps({"command": self.command, "dataset": digests}))

    @property
    def _note(self) -> Path:
        return self.out / PARTS_FOLDER / "made.json"

    def _digests(self) -> list[str]:
        made = json.loads(self._note.read_text(encoding="utf-8")) if self._note.exists() else {}
        return made["dataset"] if made.get("command") == self.command else []


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _foreign(items: Iterable[Item | RejectedRow], out: Path, writes: Sequence[str]) -> Iterator[Item | RejectedRow]:
    """The items, as long as they read nothing from where results are written: those would take their inputs' places."""
    folders = [out / name for name in writes]
    for item in items:
        for path in item.files if isinstance(item, Item) else ():
            for folder in folders:
                if path.is_relative_to(folder):
                    raise InputError(f"{path} is an input, but this command writes to {folder}: choose another --out")
        yield item


def _unique(answer: Done | RejectedRow, seen: set[int]) -> Iterator[dict[str, Any] | RejectedRow]:
    """The rows of an answer, but not a second one with an id that was there."""
    if isinstance(answer, RejectedRow):
        yield answer
        return
    for row in answer.value:
        if hash(row["id"]) in seen:
            reason = f"the id {row['id']!r} is already used by an earlier row"
            yield RejectedRow(answer.item.number, row["id"], str(answer.item.files[0]), reason)
        else:
            seen.add(hash(row["id"]))
            yield row


def _written(row: dict[str, Any], out: Path) -> dict[str, Any]:
    """The row with paths as text, without what is empty."""
    row = {name: value for name, value in row.items() if value not in (None, "", [], ())}
    for name in PATH_COLUMNS:
        if name in row:
            paths = [str(path.relative_to(out) if path.is_relative_to(out) else path) for path in _as_list(row[name])]
            row[name] = paths if len(paths) > 1 else paths[0]
    return row


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
