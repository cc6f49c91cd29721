"""A dataset's rows -> the same rows with masks: from the difference of source and target, or given ones reworked."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from PIL import Image, ImageOps

from data_prep.builders.common.dataset import DATASET_FILE, build_dataset
from data_prep.builders.common.results import save_result
from data_prep.builders.mask.difference import Difference, soft_mask
from data_prep.cli import CORES, Engine, OnError, Out, Processes
from data_prep.errors import InputError
from data_prep.jobs.engines import make_engine
from data_prep.jobs.items import Item
from data_prep.rows.images import check_mask_shape, open_image, open_mask
from data_prep.rows.rows import RejectedRow, Row, read_rows
from data_prep.rows.tables import BadRow

Origin = Literal["difference", "given"]
MIDDLE = 128
"""Given masks are edited below this, unless they say otherwise."""


def command(
    dataset: Annotated[Path, typer.Option(help="Dataset file to read. It is not changed.")],
    out: Out,
    root: Annotated[
        Path | None, typer.Option(help="Folder that relative paths start from.", show_default="the dataset's folder")
    ] = None,
    origin: Annotated[
        Origin,
        typer.Option(
            "--from", help="Make masks from the difference of source and target, or from the masks given in the rows."
        ),
    ] = "difference",
    low: Annotated[
        float, typer.Option(help="Colour difference (Delta E) that counts as edited next to one above --high.")
    ] = Difference.low,
    high: Annotated[
        float,
        typer.Option(help="Colour difference (Delta E) that always counts as edited. Black and white differ by 100."),
    ] = Difference.high,
    speck: Annotated[int, typer.Option(help="Drop edited areas with fewer pixels than this.")] = Difference.speck,
    close: Annotated[
        int, typer.Option(help="Fill gaps in the edited area that are up to twice this many pixels wide.")
    ] = Difference.close,
    dilate: Annotated[
        int | None,
        typer.Option(
            help="Grow the edited area by this many pixels. A negative number shrinks it.",
            show_default="4 for differences, 0 for given masks",
        ),
    ] = None,
    feather: Annotated[
        int, typer.Option(help="Width of the soft edge around the edited area (feathering), in pixels.")
    ] = 0,
    invert: Annotated[
        bool, typer.Option("--invert", help="Invert the given masks, which are white where the image was edited.")
    ] = False,
    binarise: Annotated[
        int | None,
        typer.Option(
            help="Threshold for given masks, 1–255: below it they become black, from it on white.",
            show_default="kept soft",
        ),
    ] = None,
    processes: Processes = CORES,
    engine: Engine = "local",
    on_error: OnError = "raise",
) -> None:
    """Writes a dataset of the same rows with new masks (black = edited, white = background) of the targets' sizes.

    --from difference: the bridge source is fitted to the target's size, as in training, and compared with the target by
    colour (Delta E of CIE LAB, 1976), so that JPEG artefacts do not count as an edit. A pair without a difference is
    rejected. If everything differs, the mask is all black, which changes nothing in training.

    --from given: the masks are fitted to the targets' sizes, and inverted with --invert. With --dilate, --feather or
    --binarise they are first made black and white, at the threshold of --binarise or at 128.

    python data_prep/run.py mask --dataset photos/dataset.jsonl --out photos/masked --feather 8
    """
    if origin == "difference" and (invert or binarise is not None):
        raise InputError("--invert and --binarise are for given masks: add --from given, or leave them out")
    if feather < 0:
        raise InputError(f"--feather must be 0 or more, got {feather}")
    if binarise is not None and not 1 <= binarise <= 255:
        raise InputError(f"--binarise must be in 1 to 255, got {binarise}")
    if dataset.exists() and (out / DATASET_FILE).exists() and dataset.samefile(out / DATASET_FILE):
        raise InputError(f"the new dataset would overwrite {dataset}: give another folder as --out")
    if dilate is None:
        dilate = 4 if origin == "difference" else 0
    if origin == "difference":
        make = DifferenceMask(Difference(low, high, speck, close), dilate, feather)
    else:
        make = GivenMask(dilate, feather, invert, binarise)
    preload = ["numpy", "PIL.Image", "scipy.ndimage", "skimage.color", "skimage.filters", "skimage.morphology"]
    workers = make_engine(engine, processes, preload=preload)
    rows = mask_items(read_rows(str(dataset), root), given=origin == "given")
    build_dataset(rows, make, out, workers, title="mask", on_error=on_error, writes=("masks",))


def mask_items(rows: Iterator[Row | RejectedRow], *, given: bool) -> Iterator[Item | RejectedRow]:
    """Rows as items, with what is read of them."""
    for row in rows:
        if isinstance(row, RejectedRow):
            yield row
            continue
        files = (row.image, row.back_mask) if given else (row.image, row.edit_image[row.bridge_image])
        yield Item(row.number, row.id, tuple(path for path in files if path), _values(row))


@dataclass(frozen=True)
class DifferenceMask:
    """The row with the mask of what differs between its bridge source and its target."""

    difference: Difference
    dilate: int
    feather: int

    def __call__(self, item: Item, out: Path) -> list[dict[str, Any]]:
        row = _row(item.values)
        target = open_image(row["image"])
        source = open_image(row["edit_image"][item.values["bridge_image"]])
        edited = self.difference(ImageOps.fit(source, target.size, Image.Resampling.LANCZOS), target)
        if not edited.any():
            raise BadRow("source and target differ only by noise: there is no edit to mask")
        return [row | {"back_mask": _saved(soft_mask(edited, self.dilate, self.feather), item, out)}]


@dataclass(frozen=True)
class GivenMask:
    """The row with its mask reworked."""

    dilate: int
    feather: int
    invert: bool
    binarise: int | None

    def __call__(self, item: Item, out: Path) -> list[dict[str, Any]]:
        row = _row(item.values)
        if not row["back_mask"]:
            raise BadRow("the row has no back_mask: leave out --from given to derive one from the difference")
        target, mask = open_image(row["image"]), open_mask(row["back_mask"])
        check_mask_shape(mask, target, row["back_mask"])
        mask = ImageOps.fit(mask, target.size, Image.Resampling.BILINEAR)
        if self.invert:
            mask = ImageOps.invert(mask)
        if self.dilate or self.feather or self.binarise:
            mask = soft_mask(np.asarray(mask) < (self.binarise or MIDDLE), self.dilate, self.feather)
        return [row | {"back_mask": _saved(mask, item, out)}]


def _saved(mask: Image.Image, item: Item, out: Path) -> Path:
    if mask.getextrema() == (255, 255):
        raise BadRow("the mask has no black pixels, which mark the edit: check --dilate, --invert and --binarise")
    return save_result(mask, out / "masks", item.id)


def _values(row: Row) -> dict[str, Any]:
    """The row as JSON has it."""
    return {
        "id": row.id,
        "prompt": row.prompt,
        "image": str(row.image),
        "edit_image": [str(path) for path in row.edit_image],
        "bridge_image": row.bridge_image,
        "ref_gt": row.ref_gt and str(row.ref_gt),
        "back_mask": row.back_mask and str(row.back_mask),
        "negative_prompt": row.negative_prompt,
        "split": row.split,
        "tag": row.tag,
        "group": row.group,
        "weight": row.weight if row.weight != 1 else None,
    }


def _row(values: dict[str, Any]) -> dict[str, Any]:
    """The row as builders give it."""
    return values | {
        "image": Path(values["image"]),
        "edit_image": [Path(path) for path in values["edit_image"]],
        "bridge_image": values["bridge_image"] or None,
        "ref_gt": values["ref_gt"] and Path(values["ref_gt"]),
        "back_mask": values["back_mask"] and Path(values["back_mask"]),
    }
