"""A table with columns of any names -> dataset: its pictures stay where they are, and are decoded once."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from data_prep.builders.common.columns import ColumnMap, ColumnOption, make_column_map, map_cells, text_fields
from data_prep.builders.common.dataset import PATH_COLUMNS, build_dataset
from data_prep.builders.common.picture_check import check_pictures
from data_prep.builders.common.prompts import PromptOption, Templates, TemplatesOption, make_templates
from data_prep.cli import CORES, Engine, OnError, Out, Processes, Seed
from data_prep.errors import InputError
from data_prep.jobs.engines import make_engine
from data_prep.jobs.items import Item
from data_prep.rows.rows import RejectedRow, Row, is_absent, parse_row
from data_prep.rows.tables import COLUMNS, BadRow, RawRow, read_file


def command(
    table: Annotated[Path, typer.Option(help="Table of paths: a .csv, .tsv, .jsonl, .json or .parquet file.")],
    out: Out,
    root: Annotated[
        Path | None, typer.Option(help="Folder that relative paths start from.", show_default="the table's folder")
    ] = None,
    column: ColumnOption = None,
    prompt: PromptOption = None,
    templates: TemplatesOption = None,
    seed: Seed = 0,
    processes: Processes = CORES,
    engine: Engine = "local",
    on_error: OnError = "raise",
) -> None:
    """Makes a dataset from a CSV, TSV, JSONL, JSON or Parquet file of paths, whatever its columns are called.

    --column NAME=COLUMN says which column is the dataset's image (target), edit_image (source), prompt, back_mask, ref_gt,
    negative_prompt, bridge_image, split, tag, group, weight or id. Columns that already have these names need no --column.
    Give --column edit_image=… up to three times for several sources, of which the second and third may be empty. Several
    --column id=… are joined by "-". --prompt or --templates make the instructions from {COLUMN} fields instead.
    Images stay where they are. Each is decoded once, so that every row of the dataset can be used.

    python data_prep/run.py table --table edits.csv --out data --column image=after --column edit_image=before
    --prompt "Remove the {object}"
    """
    given = make_templates(prompt, templates, seed)
    header = _Header(make_column_map(column or (), given is not None), given)
    rows = read_file(table, header)
    if (first := next(rows, None)) is None:
        raise InputError(f"the table {table} has no rows")
    folder = Path(os.path.abspath(table.parent if root is None else root))
    if not folder.is_dir():
        raise InputError(f"--root {root} is not a folder")
    items = _items(chain([first], rows), header, folder, str(table))
    workers = make_engine(engine, processes, preload=["numpy", "PIL.Image"])
    build_dataset(items, CheckRow(), out, workers, title="table", on_error=on_error)


@dataclass(frozen=True)
class CheckRow:
    """Decodes the pictures of a row."""

    def __call__(self, item: Item, out: Path) -> list[dict[str, Any]]:
        row = dict(item.values)
        for name in PATH_COLUMNS:
            if name in row:
                row[name] = [Path(path) for path in row[name]] if name == "edit_image" else Path(row[name])
        check_pictures(row)
        return [row]


@dataclass
class _Header:
    """Finds the dataset's columns in the table's, when the reader has seen them."""

    map: ColumnMap
    templates: Templates | None
    columns: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __call__(self, names: list[str], where: str, *, complete: bool) -> None:
        if not complete:
            self.columns = self.columns or self.map.unchecked()
            return
        self.columns = self.map.resolve(names, where)
        used = {column for own in self.columns.values() for column in own}
        if self.templates is not None:
            self.templates.check_fields(names)
            used |= self.templates.fields()
        if unused := [name for name in names if name not in used]:
            print(f"columns that are not used: {', '.join(unused)}")

    def row_of(self, number: int, cells: dict[str, Any], root: Path) -> tuple[Row, dict[str, Any]]:
        """The row, and its cells under the dataset's names."""
        values, default_id = map_cells(cells, self.columns), f"row-{number:06d}"
        if self.templates is not None:
            id = default_id if is_absent(values.get("id")) else str(values["id"])
            values["prompt"] = self.templates.fill(id, text_fields(cells))
        try:
            return parse_row(number, default_id, values, root), values
        except BadRow as error:
            raise BadRow(f"{error}{self._origin(str(error))}") from None

    def _origin(self, message: str) -> str:
        """What the column at fault is called in the table."""
        name = message.split(" ", 1)[0].split("=", 1)[0]
        own = self.columns.get(name, (name,))
        return "" if own == (name,) else f" ({name} is the column {' or '.join(own)})"


def _items(rows: Iterator[RawRow], header: _Header, root: Path, table: str) -> Iterator[Item | RejectedRow]:
    for number, cells in enumerate(rows, start=1):
        try:
            if isinstance(cells, BadRow):
                raise cells
            row, values = header.row_of(number, cells, root)
        except BadRow as error:
            yield RejectedRow(number, f"row-{number:06d}", table, str(error))
            continue
        files = [row.image, *row.edit_image, *filter(None, (row.ref_gt, row.back_mask))]
        # what the table does not say is left to the defaults of a dataset file
        said = [name for name in ("id", *COLUMNS) if name in ("id", "prompt") or not is_absent(values.get(name))]
        yield Item(number, row.id, tuple(files), {name: _as_json(getattr(row, name)) for name in said})


def _as_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return [str(path) for path in value]
    return str(value) if isinstance(value, Path) else value
