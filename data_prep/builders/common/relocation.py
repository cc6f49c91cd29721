"""Rows for a dataset file in another folder than the one they come from."""

import json
import os
from pathlib import Path
from typing import Any

from data_prep.builders.common.dataset import PATH_COLUMNS
from data_prep.rows.rows import Row


def moved_row(row: Row, values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The columns of a row, with paths that lead from the new file's folder to the same pictures.

    Args:
        row: what `values` mean.
        values: column -> cell, as the old file has them, without the empty ones.
        folder: folder of the new file, absolute.
    """
    paths = {name: _from_folder(values[name], getattr(row, name), folder) for name in PATH_COLUMNS if name in values}
    return values | paths


def _from_folder(value: Any, meant: Path | tuple[Path, ...], folder: Path) -> Any:
    """`value` itself if it means the same, seen from the folder."""
    several = isinstance(meant, tuple)
    paths = meant if several else (meant,)
    given = _cells(value)
    if [Path(os.path.normpath(folder / text)) for text in given] == list(paths):
        return value
    new = [str(path.relative_to(folder) if path.is_relative_to(folder) else path) for path in paths]
    return new if several and len(new) > 1 else new[0]


def _cells(value: Any) -> list[str]:
    """The paths in a cell that is known to hold some: one, a list, or a list as JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = json.loads(value)
    return value if isinstance(value, list) else [value]
