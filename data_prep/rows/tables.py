"""Dataset files of every format -> one plain dict per row. What the columns mean is for `data_prep.rows.rows` to say."""

import codecs
import csv
import difflib
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

import pyarrow as pa
from pyarrow import parquet

from data_prep.errors import InputError

REQUIRED = ("prompt", "image", "edit_image")
REQUIRED_OF_ALL = ("prompt", "image")
"""What a row has that makes a picture from its prompt alone."""
COLUMNS = (
    *(*REQUIRED, "bridge_image", "ref_gt", "back_mask"),
    *("negative_prompt", "split", "tag", "group", "weight", "id"),
)
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


OTHERS_SAY = {
    **dict.fromkeys(("target", "output", "output_image", "after", "edited", "edited_image", "result"), "image"),
    **dict.fromkeys(
        ("source", "source_image", "input", "input_image", "before", "original", "reference"), "edit_image"
    ),
    **dict.fromkeys(("instruction", "caption", "text", "edit"), "prompt"),
    **dict.fromkeys(("mask", "background_mask"), "back_mask"),
}
"""What other datasets call a column -> what it is called here."""


class BadRow(ValueError):
    """Why one row is rejected; the others are not concerned."""


RawRow = dict[str, Any] | BadRow
"""Column -> value as the file has it, or the reason why the row cannot be read."""


class CheckColumns(Protocol):
    """Called with the names of a table's columns before its first row; in JSONL with those of each row."""

    def __call__(self, names: list[str], where: str, *, complete: bool) -> None:
        """`complete` is False for one row of a JSONL file, which others may complete. Raises `InputError`."""
        ...


def read_table(source: str, required: tuple[str, ...] = REQUIRED) -> Iterator[RawRow]:
    """Streams the raw rows of a dataset file, folder or hub id.

    Args:
        source: file, folder or hub id.
        required: columns that must be there.

    Raises:
        InputError: no such dataset, not in its format, or an unknown or missing column.
    """
    path, check = Path(source), partial(check_columns, required=required)
    if path.is_dir():
        return _read_folder(path, check)
    if path.suffix.lower() in READERS or path.exists():
        return read_file(path, check)
    if not HUB_ID.fullmatch(source):
        raise InputError(f"there is no dataset at {source}: data.dataset must be a file, a folder or a hub id")
    return _read_hub(source, check)


def read_file(path: Path, check: CheckColumns) -> Iterator[RawRow]:
    """Streams the raw rows of a table file, whatever its columns are called. Only a .json file is held in memory.

    Args:
        path: a .json, .jsonl, .csv, .tsv or .parquet file.
        check: may refuse the columns.

    Raises:
        InputError: no such file, not in its format, or refused by `check`.
    """
    if not path.exists():
        raise InputError(f"there is no dataset at {path}")
    read = READERS.get(path.suffix.lower())
    if read is None or not path.is_file():
        raise InputError(f"cannot read the dataset {path}: its name must end with one of {', '.join(READERS)}")
    try:
        yield from read(path, check)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None


def _read_json(path: Path, check: CheckColumns) -> Iterator[RawRow]:
    with _open_text(path) as file:
        try:
            rows = json.load(file)
        except (json.JSONDecodeError, RecursionError) as error:  # the latter: lists in lists in lists
            raise InputError(f"{path} is not JSON ({error}); one object per line belongs in a .jsonl file") from None
    if not isinstance(rows, list):
        raise InputError(f"{path} must hold a JSON list of rows, not {type(rows).__name__}")
    if not rows:
        return
    names: dict[str, None] = {}
    for number, values in enumerate(rows, start=1):
        if isinstance(values, dict) and not values.keys() <= names.keys():
            check(list(values), f"{path}, row {number}", complete=False)
            names |= dict.fromkeys(values)
    check(list(names), str(path), complete=True)
    for values in rows:
        yield _object(values)


def _read_jsonl(path: Path, check: CheckColumns) -> Iterator[RawRow]:
    with _open_text(path) as file:
        for number, line in enumerate(filter(str.strip, file), start=1):
            try:
                values = _object(json.loads(line))
                if isinstance(values, dict):
                    check(list(values), f"{path}, row {number}", complete=False)
                yield values
            except (json.JSONDecodeError, RecursionError) as error:
                reason = (
                    f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else error
                )
                yield BadRow(f"not JSON: {reason}")


def _object(values: Any) -> RawRow:
    return values if isinstance(values, dict) else BadRow(f"not an object but {type(values).__name__}")


def _read_csv(path: Path, check: CheckColumns, delimiter: str = ",") -> Iterator[RawRow]:
    with _open_text(path) as file:
        header = file.readline()
        file.seek(0)
        # spreadsheets of countries with a decimal comma write semicolons, whatever the file is called
        table = csv.DictReader(file, delimiter=max((delimiter, *",;\t"), key=header.count))
        names = list(table.fieldnames or ())
        if repeated := [name for name in names if names.count(name) > 1]:
            raise InputError(f"{path} has several columns called {repeated[0]!r}: rename or remove all but one")
        check(names, str(path), complete=True)
        while True:
            try:
                values = next(table)
            except StopIteration:
                return
            except csv.Error as error:
                yield BadRow(f"not CSV: {error}")
                continue
            yield BadRow("more cells than the header has columns") if None in values else values


def _read_parquet(path: Path, check: CheckColumns) -> Iterator[RawRow]:
    try:
        with parquet.ParquetFile(path) as file:
            check(file.schema_arrow.names, str(path), complete=True)
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise InputError(f"{path} is not a Parquet file: {error}") from None


def _read_folder(path: Path, check: CheckColumns) -> Iterator[RawRow]:
    import datasets  # here and below: a second that only these two kinds of dataset need

    try:
        return _read_splits(datasets.load_from_disk(str(path)), str(path), check)
    except FileNotFoundError:
        raise InputError(f"the folder {path} was not written by datasets.save_to_disk; name a dataset file") from None


def _read_hub(name: str, check: CheckColumns) -> Iterator[RawRow]:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    try:
        return _read_splits(datasets.load_dataset(name), name, check)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise InputError(f"there is no file {name}, and the hub has no dataset of this name: {error}") from None


def _read_splits(loaded: Any, name: str, check: CheckColumns) -> Iterator[RawRow]:
    """The rows of every split of a `datasets` dataset; the split's name is the default of the column `split`."""
    splits = loaded if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}
    for split, table in splits.items():
        check(table.column_names, name, complete=True)
        embedded = [column for column, feature in table.features.items() if not _is_text(feature)]
        if embedded:
            raise InputError(
                f"the column {embedded[0]!r} of {name} holds {table.features[embedded[0]]}: rows name image files, "
                "so save the images to files and store their paths"
            )
        for values in table:
            yield {"split": split, **values}


def _is_text(feature: Any) -> bool:
    """Text, a number, or a list of texts, as opposed to `datasets.Image` and other structures."""
    return type(getattr(feature, "feature", feature)).__name__ == "Value"


READERS: dict[str, Callable[[Path, CheckColumns], Iterator[RawRow]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".tsv": partial(_read_csv, delimiter="\t"),
}


def _open_text(path: Path) -> IO[str]:
    """UTF-8; bytes that are not become surrogates, which `_text` finds in the one row that has them."""
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or _is_half_zero(start):
        raise InputError(f"{path} is UTF-16 text: save it as UTF-8")
    return open(path, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _is_half_zero(start: bytes) -> bool:
    """What Latin letters look like in UTF-16 without a byte-order mark."""
    return len(start) > 1 and any(start[::2]) != any(start[1::2])


def check_columns(names: list[str], where: str, *, complete: bool = True, required: tuple[str, ...] = REQUIRED) -> None:
    """The columns of a dataset file. A misspelt optional one would be ignored without a word, so an unknown one is an error.

    Args:
        names: the columns.
        where: the file, for the message.
        complete: whether the required ones must be among them.
        required: which these are.

    Raises:
        InputError: an unknown column, or a required one is missing.
    """
    for name in names:
        if name not in COLUMNS:
            nearest = [OTHERS_SAY[name.lower()]] if name.lower() in OTHERS_SAY else None
            nearest = nearest or difflib.get_close_matches(name, COLUMNS, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"rename or remove it (known: {', '.join(COLUMNS)})"
            raise InputError(f"unknown column {name!r} in {where}: {hint}")
    missing = [name for name in required if name not in names]
    if complete and missing:
        more = "; only training with flow matching (loss=flow) takes text to image" if missing == ["edit_image"] else ""
        raise InputError(f"{where} has no column {missing[0]!r}: {', '.join(required)} are required{more}")
