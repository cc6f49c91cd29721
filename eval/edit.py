"""Edits one image, or a table of them.

    python eval/edit.py --model models/tiny --adapter runs/demo/lbm --image photograph.png \
        --prompt "Remove the sticker from the photograph." --steps 4 --seed 1 --out result.png

    python eval/edit.py --model models/tiny --adapter runs/demo/lbm --csv jobs.csv --out results

A PNG says how it was made: `--repeat result.png` makes it again. docs/editing.md explains modes, columns and settings.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
__import__("data_prep")  # without the environment, it says how to enter it

import os
from typing import Annotated, Any

import typer

from data_prep.cli import run_command
from data_prep.errors import InputError, Interrupted, is_out_of_memory
from data_prep.jobs.progress import step_progress
from data_prep.model.geometry import Size, fit_mask
from data_prep.rows.images import RejectedImage, check_mask_shape, file_digest, open_image, open_mask, open_transparent
from eval.request.options import ModelOptions, PlaceOptions, given_knobs, knob_options, with_options
from eval.request.provenance import numbered, write_png
from eval.request.repeat import Repeat, read_repeat
from eval.request.request import KEEPING, EditRequest
from eval.tables.command import TableOptions, edit_table


@with_options(knob_options(), ModelOptions, PlaceOptions, TableOptions)
def edit(
    wanted: Any,
    model: ModelOptions,
    place: PlaceOptions,
    table: TableOptions,
    *,
    image: Annotated[
        list[Path] | None, typer.Option(help="Image to edit. Repeatable: further images are references, three in all.")
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="Inpainting mask of the image's shape: white is edited, black is kept.")
    ] = None,
    repeat: Annotated[
        Path | None, typer.Option(help="Take all settings from this result. Give --image and --mask again.")
    ] = None,
    out: Annotated[Path, typer.Option(help="PNG file to write (result-1.png, … for several), or a folder with --csv.")],
) -> None:
    """Edits an image, or every row of a table, by an instruction. The PNGs that it writes record how they were made.

    The adapter's file says which sampler it needs and at which sizes it was trained.
    """
    knobs = given_knobs(wanted)
    if table.csv:
        if image or mask or repeat:
            raise InputError(
                "the table of --csv names its own images and masks: leave out --image, --mask and --repeat"
            )
        edit_table(table, knobs, model, place, out)
        return
    table.check_unused()
    made = read_repeat(repeat, knobs) if repeat else None
    if made:
        knobs = made.knobs
        model, place = made.completed(model, place)
    try:
        edit_image(image or [], mask, knobs, made, model, place, out)
    except KeyboardInterrupt:
        raise Interrupted("the edit is not kept, and the same command begins it again") from None


def edit_image(
    image: list[Path],
    mask: Path | None,
    knobs: dict[str, Any],
    made: Repeat | None,
    model: ModelOptions,
    place: PlaceOptions,
    out: Path,
) -> None:
    """Edits one image, and writes one PNG or several.

    Raises:
        InputError: something of it is wrong; nothing has been loaded or written then.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("one image is edited by one process: launch several processes only with --csv")
    check_output(out)
    check_kept(out, knobs.get("count", 1), [*image, *([mask] if mask else []), *([made.path] if made else [])])
    try:
        images = [open_image(path) for path in image]
        opened = open_mask(mask) if mask else None
        if mask and opened and images:
            check_mask_shape(opened, images[0], mask)
            opened = fit_mask(opened, Size.of(images[0]), stretched=True)
        keeping = knobs.get("mode") in KEEPING and image
        original = open_transparent(image[0]) if keeping else None
        sources = [(path.name, file_digest(path)) for path in [*image, *([mask] if mask else [])]]
    except RejectedImage as error:
        raise InputError(str(error)) from None
    if made:
        made.check_images(images, opened)
    values: dict[str, Any] = {"prompt": "", **knobs}
    request = EditRequest(images=images, mask=opened, original=original, **values)
    from eval.bases.auto import open_model  # torch, after all that

    editor = open_model(model, place.place())
    editor.check(request)
    for note in editor.notes(request):
        print(f"note: {note}", file=sys.stderr)
    if made:
        made.check_models(editor.identity(request), editor.folder)
    try:
        with step_progress("steps") as show_step:
            results = editor.edit(request, show_step)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"{error}\nout of memory: use a smaller --size, --offload or --weights", file=sys.stderr)
        raise typer.Exit(1) from None
    for name, result in zip(numbered(out.name, request.count), results, strict=True):
        write_png(result, sources, out.with_name(name))
        settings = result.settings
        done = f"{settings['width']}x{settings['height']}, {settings['steps']} steps, seed {result.seed}"
        print(f"{out.with_name(name)}: {done}, {result.seconds:.1f} s")


def check_output(out: Path) -> None:
    """Finds that a PNG cannot be written before it is made, and makes nothing."""
    if out.suffix.lower() != ".png":
        raise InputError(f"--out must end in .png, which can carry the settings, got {out}")
    folder = next(path for path in out.absolute().parents if path.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"--out {out} cannot be written: {folder} is not a folder that you may write to")
    if out.is_dir():
        raise InputError(f"--out {out} is a folder: name a file")


def check_kept(out: Path, count: int, inputs: list[Path]) -> None:
    """Finds that a result would take the place of what it is made of.

    Raises:
        InputError: a PNG to write is one of the inputs, under this name or another.
    """
    for path in [out.with_name(name) for name in numbered(out.name, count)]:
        for source in inputs:
            if path.exists() and source.exists() and path.samefile(source):
                raise InputError(
                    f"--out {out} would overwrite {source}, which the edit is made of: choose another name"
                )


if __name__ == "__main__":
    run_command(edit)
