"""A Hugging Face dataset with pictures in it -> dataset: each picture is saved once, as a file."""

import itertools
import os
import shutil
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from data_prep.builders.common.columns import ColumnOption, make_column_map
from data_prep.builders.common.dataset import build_dataset
from data_prep.builders.common.prompts import PromptOption, Templates, TemplatesOption, make_templates
from data_prep.builders.hf.extraction import ORIGINALS, PICTURES, SaveRow
from data_prep.builders.hf.hub import Source, check_picture_columns, rows_of
from data_prep.builders.hf.pictures import MaskStyle
from data_prep.cli import CORES, Engine, OnError, Out, Processes, Seed
from data_prep.errors import InputError
from data_prep.jobs.engines import make_engine
from data_prep.jobs.items import Item
from data_prep.rows.rows import RejectedRow
from data_prep.rows.tables import BadRow

PLAIN = (str, int, float, list, type(None))
"""Cells that JSON can hold; others, such as dates, count as text."""

LAYOUTS: dict[str | None, tuple[str, ...]] = {
    "instructpix2pix": ("edit_image=original_image|input_image", "image=edited_image", "prompt=edit_prompt"),
    # The mask is a copy of the source with a hole (dataset card of osunlp/MagicBrush: "white region"; its copies have
    # transparency there). The source of a later turn is the target of the turn before, so that a session is one group.
    "magicbrush": (
        "edit_image=source_img", "image=target_img", "back_mask=mask_img", "prompt=instruction",
        "id=img_id", "id=turn_index", "group=img_id",
    ),
}  # fmt: skip
LAYOUT_MASKS: dict[str | None, MaskStyle] = {"magicbrush": "hole"}
LayoutName = Literal["instructpix2pix", "magicbrush"]


def command(
    dataset: Annotated[str, typer.Option(help="Folder (save_to_disk, imagefolder, Parquet), file or hub id.")],
    out: Out,
    name: Annotated[str | None, typer.Option(help="Name of the dataset's configuration, if it has several.")] = None,
    split: Annotated[str | None, typer.Option(help="Read only this split.", show_default="all")] = None,
    data_files: Annotated[
        list[str] | None, typer.Option(help="Read only this file of the dataset. Repeatable.")
    ] = None,
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Stream a hub dataset instead of downloading all of it.")
    ] = False,
    limit: Annotated[int | None, typer.Option(help="Read at most this many rows.", min=1, show_default="all")] = None,
    layout: Annotated[LayoutName | None, typer.Option(help="Known dataset whose column names this one has.")] = None,
    column: ColumnOption = None,
    mask: Annotated[
        MaskStyle | None,
        typer.Option(
            help="What the masks mark. background: white is preserved. edit: white is edited. hole: what is transparent, or "
            "pure white if nothing is, is edited.",
            show_default="background; magicbrush: hole",
        ),
    ] = None,
    prompt: PromptOption = None,
    templates: TemplatesOption = None,
    seed: Seed = 0,
    processes: Processes = CORES,
    engine: Engine = "local",
    on_error: OnError = "raise",
) -> None:
    """Makes a dataset from a Hugging Face dataset that contains images. Each image is saved once, below OUT/images.

    Ordinary PNG and JPEG files are saved unchanged, all others as PNG. --layout knows the columns of InstructPix2Pix and
    MagicBrush. --column NAME=COLUMN names other columns, as in the command "table", and overrides --layout.
    Rows with the same original image share a group. The splits validation, val, dev, test and eval become "validation".

    python data_prep/run.py hf --dataset osunlp/MagicBrush --layout magicbrush --streaming --limit 1000 --out data
    """
    given = make_templates(prompt, templates, seed)
    source = Source(
        os.path.abspath(dataset) if os.path.exists(dataset) else dataset, name, split, tuple(data_files or ())
    )
    tables = source.streams() if streaming else source.splits()
    columns = {part: _columns(table, source, layout, column or [], given) for part, table in tables.items()}
    fingerprints = () if streaming else tuple(table._fingerprint for table in tables.values())
    make = SaveRow(source, fingerprints, columns, mask or LAYOUT_MASKS.get(layout, "background"), given)
    out = Path(os.path.abspath(out))
    items = _streamed_items(tables, make, out) if streaming else _local_items(tables, source)
    total = None if streaming else min(sum(map(len, tables.values())), limit or 10**18)
    workers = make_engine(engine, processes, preload=["numpy", "PIL.Image"])
    try:
        build_dataset(itertools.islice(items, limit), make, out, workers, title="hf", total=total, on_error=on_error)
    finally:
        shutil.rmtree(out / ORIGINALS, ignore_errors=True)


def _columns(
    table: Any, source: Source, layout: str | None, options: list[str], templates: Templates | None
) -> dict[str, tuple[str, ...]]:
    """Dataset column -> columns of `table`."""
    own = {option.partition("=")[0] for option in options} | ({"prompt"} if templates else set())
    known = [each for each in LAYOUTS.get(layout, ()) if each.partition("=")[0] not in own]
    column_map = make_column_map([*known, *options], templates is not None)
    if table.column_names is None:
        raise InputError(f"the columns of {source.dataset} are not known before it is read: leave out --streaming")
    columns = column_map.resolve(table.column_names, source.dataset)
    if templates is not None:
        templates.check_fields(table.column_names)
    check_picture_columns(table, [each for name in PICTURES for each in columns.get(name, ())], source.dataset)
    return columns


def _local_items(tables: dict[str, Any], source: Source) -> Iterator[Item]:
    """Rows by their index: workers read them."""
    places = ((split, index) for split, table in tables.items() for index in range(len(table)))
    for number, (split, index) in enumerate(places, start=1):
        yield Item(number, f"{split}-{index:08d}", (Path(source.dataset),), {"split": split, "index": index})


def _streamed_items(tables: dict[str, Any], make: SaveRow, out: Path) -> Iterator[Item | RejectedRow]:
    """Rows as they come, their pictures saved already."""
    rows = ((split, *row) for split, table in tables.items() for row in enumerate(_stream(table, make.needed(split))))
    for number, (split, index, cells) in enumerate(rows, start=1):
        id, dataset = f"{split}-{index:08d}", Path(make.source.dataset)
        try:
            placed = make.place(cells, split, id, out)
        except BadRow as error:
            yield RejectedRow(number, id, str(dataset), str(error))
            continue
        plain = {name: value if isinstance(value, PLAIN) else str(value) for name, value in placed.items()}
        digest = blake2b(repr(cells).encode(errors="surrogateescape"), digest_size=16).hexdigest()  # of pictures too
        yield Item(number, id, (dataset,), {"split": split, "cells": plain, "digest": digest})


def _stream(table: Any, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    return rows_of(table.select_columns(list(columns)))
