"""The command line's part that edits tables: everything is checked, then done."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from data_prep.cli import OnErrorName
from data_prep.errors import InputError
from eval.request.options import ModelOptions, PlaceOptions, given_options

WINDOW = 16
"""Rows for which each part of an offloaded model comes to the device once: their embeddings take about 0.3 GB there."""
BatchSize = Annotated[
    int, typer.Option(help="Batch size: number of rows of one size that are sampled together.", min=1, max=1024)
]
Window = Annotated[
    int,
    typer.Option(
        help="Number of rows to encode, then sample, then decode together with --offload model.", min=1, max=10_000
    ),
]


@dataclass(frozen=True)
class TableOptions:
    """A table of edits, and how its rows are done."""

    csv: Annotated[
        Path | None, typer.Option(help="Edit every row of this table (CSV, TSV, JSON, JSONL or Parquet).")
    ] = None
    root: Annotated[
        Path | None, typer.Option(help="Folder that the paths in the table start from.", show_default="the table's")
    ] = None
    coco: Annotated[
        Path | None,
        typer.Option(help="COCO file for the table's image ids. Names like 000000000123.jpg are found without it."),
    ] = None
    font: Annotated[
        list[Path] | None,
        typer.Option(
            help="Font file for overlay_text. Repeatable: each row draws one of those that contain its characters.",
            show_default="DejaVu Sans",
        ),
    ] = None
    ignore_columns: Annotated[bool, typer.Option("--ignore-columns", help="Ignore unknown columns of the table.")] = (
        False
    )
    batch_size: BatchSize = 1
    window: Window = WINDOW
    on_error: Annotated[
        OnErrorName, typer.Option(help="Exit code if some rows cannot be edited: 2 (raise) or 0 (skip).")
    ] = "raise"

    def check_unused(self) -> None:
        """Without a table.

        Raises:
            InputError: an option is for one.
        """
        if given := given_options(self):
            raise InputError(f"{', '.join(given)} is only for tables: add --csv, or leave it out")


def edit_table(table: TableOptions, knobs: dict[str, Any], model: ModelOptions, place: PlaceOptions, out: Path) -> None:
    """Edits every row of a table; under `accelerate launch` each process takes its share, on a device of its own.

    Raises:
        InputError: the table or an option is wrong, before anything is loaded; or some rows failed, after all others are
            done.
        typer.Exit: with code 1, some rows failed by a mistake of the program, whatever `on_error` says.
    """
    from data_prep.builders.coco.annotations import image_names
    from data_prep.builders.overlay.overlay_table import Photographs
    from eval.tables.table import check_knobs, read_jobs

    assert table.csv
    check_knobs(knobs)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: with --csv it is the folder of results")
    names = image_names(table.coco) if table.coco else {}
    root = Path(os.path.abspath(table.root or table.csv.parent))
    if not root.is_dir():
        raise InputError(f"--root {root} is not a folder")
    jobs = read_jobs(table.csv, root, Photographs(root, names), knobs, table.ignore_columns)
    from eval.tables.engine import Engine, check_done  # torch, after all that

    engine = Engine.start(model, place, table.window)
    summary = engine.edit(jobs, out, table.batch_size, tuple(table.font or ()))
    if summary:
        check_done(summary, out, table.on_error)
