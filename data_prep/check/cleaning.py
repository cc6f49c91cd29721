"""A dataset file without the rows that have errors, beside the old one and never over it."""

import filecmp
import json
import math
import os
from pathlib import Path
from typing import Any

from data_prep.builders.common.relocation import moved_row
from data_prep.errors import InputError
from data_prep.files import atomic_file
from data_prep.rows.rows import Row, is_absent, read_rows
from data_prep.rows.tables import REQUIRED_OF_ALL, read_table


def cleaned_path(dataset: str, folder: Path) -> Path:
    """`pairs.cleaned.jsonl` for `pairs.csv`; for a dataset of the hub, which has no beside, in `folder`."""
    path = beside(dataset, ".cleaned.jsonl")
    return path if Path(dataset).exists() else folder / path.name


def beside(dataset: str, ending: str) -> Path:
    """`pairs` with that ending, in the folder of `pairs.csv`; in this folder for a dataset of the hub."""
    path = Path(dataset) if Path(dataset).name else Path.cwd()  # "." has no name
    return path.with_name(path.stem + ending) if path.exists() else Path(path.name + ending)


def write_cleaned(dataset: str, root: Path | None, has_error: bytearray, path: Path) -> int:
    """Writes the rows without errors as they are, but for empty cells, and paths that would lead elsewhere from there.

    Args:
        dataset: file, folder or hub id.
        root: where relative paths start, and will start from the new file too; None: each beside its own file.
        has_error: for each row, 1 if it is left out.
        path: path of the new file.

    Returns:
        The number of rows.

    Raises:
        InputError: no row is left, or there is another file at `path`.
    """
    kept, folder = 0, Path(os.path.abspath(path)).parent
    with atomic_file(path) as temporary:
        with open(temporary, "w", encoding="utf-8") as file:
            for row, values, error in zip(
                read_rows(dataset, root, text_to_image=True),
                read_table(dataset, REQUIRED_OF_ALL),
                has_error,
                strict=True,
            ):
                if not error:
                    assert isinstance(row, Row)
                    assert isinstance(values, dict)
                    present = {name: _plain(value) for name, value in values.items() if not is_absent(value)}
                    new = moved_row(row, present, folder) if root is None else present
                    print(json.dumps(new, ensure_ascii=False), file=file)
                    kept += 1
        if not kept:
            raise InputError(f"no row of {dataset} is without errors: there is nothing to write to {path}")
        if path.exists() and not filecmp.cmp(temporary, path, shallow=False):
            raise InputError(f"{path} exists with other rows: rename or remove it")
    return kept


def _plain(value: Any) -> Any:
    """Whole numbers as such: pandas makes 1.0 of 1 in a column with gaps."""
    return int(value) if isinstance(value, float) and math.isfinite(value) and value.is_integer() else value
