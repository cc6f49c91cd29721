"""Dataset files of every format -> one plain dict per row. What the columns mean is for `data_prep.rows` to say."""

import csv
import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
from pyarrow import parquet

from data_prep.errors import InputError

REQUIRED = ("prompt", "image", "edit_image")
COLUMNS = (*REQUIRED, "bridge_image", "ref_gt", "back_mask", "negative_prompt", "split", "tag", "group", "id")
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class BadRow(ValueError):
    """Why one row is rejected; the others are not concerned."""


RawRow = dict[str, Any] | BadRow
"""Column -> value as the file has it, or the reason why the row cannot be read."""


def read_table(source: str) -> Iterator[RawRow]:
    """Streams the raw rows of a dataset file, folder or hub id.

    Raises:
        InputError: no such dataset, not in its format, or an unknown or missing column.
    """
    path = Path(source)
    if path.is_dir():
        return _read_folder(path)
    read = READERS.get(path.suffix.lower())
    if read is not None and path.is_file():
        return read(path)
    if path.exists():
        raise InputError(f"cannot read the dataset {source}: its name must end with one of {', '.join(READERS)}")
    if read is not None or not HUB_ID.fullmatch(source):
        raise InputError(f"there is no dataset at {source}: data.dataset must be a file, a folder or a hub id")
    return _read_hub(source)


def _read_json(path: Path) -> Iterator[RawRow]:
    with _open_text(path) as file:
        try:
            rows = json.load(file)
        except json.JSONDecodeError as error:
            raise InputError(f"{path} is not JSON ({error}); one object per line belongs in a .jsonl file") from None
    if not isinstance(rows, list):
        raise InputError(f"{path} must hold a JSON list of rows, not {type(rows).__name__}")
    if not rows:
        return
    check_columns({name for values in rows if isinstance(values, dict) for name in values}, str(path))
    for values in rows:
        yield _object(values)


def _read_jsonl(path: Path) -> Iterator[RawRow]:
    with _open_text(path) as file:
        for number, line in enumerate(filter(str.strip, file), start=1):
            try:
                values = _object(json.loads(line))
                if isinstance(values, dict):
                    check_columns(values, f"{path}, row {number}", required=())
                yield values
            except json.JSONDecodeError as error:
                yield BadRow(f"not JSON: {error}")


def _object(values: Any) -> RawRow:
    return values if isinstance(values, dict) else BadRow(f"not an object but {type(values).__name__}")


def _read_csv(path: Path) -> Iterator[RawRow]:
    with _open_text(path) as file:
        table = csv.DictReader(file)
        check_columns(table.fieldnames or (), str(path))
        while True:
            try:
                values = next(table)
            except StopIteration:
                return
            except csv.Error as error:
                yield BadRow(f"not CSV: {error}")
                continue
            yield BadRow("more cells than the header has columns") if None in values else values


def _read_parquet(path: Path) -> Iterator[RawRow]:
    try:
        with parquet.ParquetFile(path) as file:
            check_columns(file.schema_arrow.names, str(path))
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise InputError(f"{path} is not a Parquet file: {error}") from None


def _read_folder(path: Path) -> Iterator[RawRow]:
    import datasets  # here and below: a second that only these two kinds of dataset need

    try:
        return _read_splits(datasets.load_from_disk(str(path)), str(path))
    except FileNotFoundError:
        raise InputError(f"the folder {path} was not written by datasets.save_to_disk; name a dataset file") from None


def _read_hub(name: str) -> Iterator[RawRow]:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    try:
        return _read_splits(datasets.load_dataset(name), name)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise InputError(f"there is no file {name}, and the hub gives no dataset of this name: {error}") from None


def _read_splits(loaded: Any, name: str) -> Iterator[RawRow]:
    """The rows of every split of a `datasets` dataset; the split's name is the default of the column `split`."""
    splits = loaded if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}
    for split, table in splits.items():
        check_columns(table.column_names, name)
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


READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _open_text(path: Path) -> IO[str]:
    """UTF-8; bytes that are not become surrogates, which `_text` finds in the one row that has them."""
    return open(path, encoding="utf-8-sig", errors="surrogateescape", newline="")


def check_columns(names: Iterable[str], where: str, required: Iterable[str] = REQUIRED) -> None:
    """A misspelt optional column would be ignored without a word, so an unknown name is an error."""
    names = list(names)
    for name in names:
        if name not in COLUMNS:
            nearest = difflib.get_close_matches(name, COLUMNS, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"rename or remove it (known: {', '.join(COLUMNS)})"
            raise InputError(f"unknown column {name!r} in {where}: {hint}")
    missing = [name for name in required if name not in names]
    if missing:
        raise InputError(f"{where} has no column {missing[0]!r}: {', '.join(REQUIRED)} are required")
