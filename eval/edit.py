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

from data_prep.cli import OnError, run_command
from data_prep.errors import InputError
from data_prep.model.geometry import Size
from data_prep.rows.images import RejectedImage, check_mask_shape, file_digest, open_image, open_mask
from eval.request.options import (
    DEVICE,
    DTYPE,
    Adapters,
    Compile,
    DepthModel,
    Device,
    DtypeName,
    EncoderDevice,
    Gguf,
    MaxPixels,
    Offload,
    VaeTiling,
    VisionPixels,
    option,
    parse_control,
    parse_focus,
    parse_size,
)
from eval.request.placement import Placement, WeightsName, make_placement
from eval.request.provenance import write_png
from eval.request.repeat import Repeat, read_repeat
from eval.request.request import AspectName, Control, EditRequest, Focus, ModeName, SamplerName
from eval.request.sizes import SizeLimits
from eval.tables.command import WINDOW, Base, Table, edit_table
from eval.tables.job_files import numbered
from eval.tables.runner import is_out_of_memory


def edit(
    *,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder (as named, or below $MODEL_DIR) or hub id of the base model.", show_default="required"
        ),
    ] = None,
    adapter: Adapters = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="To edit; further ones are references, three in all.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The instruction.")] = None,
    mode: Annotated[
        ModeName | None, typer.Option(help="What is done; docs/editing.md explains each.", show_default="edit")
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="Of the image's shape: white where the edit may go, black is kept.")
    ] = None,
    feather: Annotated[
        float | None, typer.Option(help="Width of the mask's soft rim, pixels of the result.", show_default="8")
    ] = None,
    focus: Annotated[
        Focus | None,
        typer.Option(
            parser=option(parse_focus),
            metavar="X,Y,R",
            help="For mode focus: where the edit may go, in shares of the picture.",
            show_default="0.5,0.5,0.25",
        ),
    ] = None,
    control: Annotated[
        list[Control] | None,
        typer.Option(
            parser=option(parse_control),
            metavar="KIND[:STRENGTH]",
            help="For mode control: a map of the image (canny, lines, depth) as a reference; repeatable.",
        ),
    ] = None,
    depth_model: DepthModel = None,
    strength: Annotated[
        float | None,
        typer.Option(help="How far from the source, over 0 to 1, in modes that have it.", show_default="by the mode"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Of the sampler.", show_default="4 for a bridge, 40 for flow matching")
    ] = None,
    cfg_scale: Annotated[
        float | None, typer.Option(help="Guidance of flow matching, 1 for none.", show_default="4 for flow matching")
    ] = None,
    sampler: Annotated[SamplerName | None, typer.Option(show_default="as the adapter was trained")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the noise.", show_default="0")] = None,
    count: Annotated[
        int | None, typer.Option(help="Pictures, with the seeds seed, seed + 1, …", show_default="1")
    ] = None,
    size: Annotated[
        Size | None,
        typer.Option(
            parser=option(parse_size), metavar="WxH", help="In multiples of 32.", show_default="as the first image"
        ),
    ] = None,
    aspect: Annotated[
        AspectName | None, typer.Option(help="Shape of the result.", show_default="as the first image")
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What guidance leads away from.", show_default="nothing")
    ] = None,
    max_pixels: MaxPixels = None,
    vision_pixels: VisionPixels = None,
    device: Device = DEVICE,
    dtype: Annotated[
        DtypeName | None, typer.Option(help="Of the weights.", show_default="bfloat16 on cuda, float32 on cpu")
    ] = None,
    encoder_device: EncoderDevice = None,
    offload: Offload = "none",
    weights: Annotated[
        WeightsName | None,
        typer.Option(help="Of the transformer's layers: as --dtype, or rounded to fewer bits.", show_default="full"),
    ] = None,
    gguf: Gguf = None,
    vae_tiling: VaeTiling = False,
    compile: Compile = False,
    repeat: Annotated[
        Path | None, typer.Option(help="Take all settings from this picture; --image and --mask are given again.")
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(help="Edit every row of a table: CSV, TSV, JSON, JSONL or Parquet.")
    ] = None,
    root: Annotated[
        Path | None, typer.Option(help="Folder that the table's paths start from.", show_default="the table's")
    ] = None,
    coco: Annotated[
        Path | None, typer.Option(help="COCO file whose ids image_id holds; not needed for 123 -> 000000000123.jpg.")
    ] = None,
    font: Annotated[
        list[Path] | None, typer.Option(help="Of overlay_text; repeatable.", show_default="DejaVu Sans")
    ] = None,
    ignore_columns: Annotated[bool, typer.Option("--ignore-columns", help="Do without unknown columns.")] = False,
    batch_size: Annotated[int, typer.Option(help="Rows of one size that are sampled together.", min=1)] = 1,
    window: Annotated[
        int, typer.Option(help="With --offload model, rows that are encoded, then sampled, then decoded.", min=1)
    ] = WINDOW,
    on_error: OnError = "raise",
    out: Annotated[
        Path, typer.Option(help="The PNG to write (result-1.png, … if there are several); with --csv a folder.")
    ],
) -> None:
    """Edits an image by an instruction, or every row of a table, and writes PNGs that say how they were made.

    An adapter's file says how it must be sampled, and the sizes that it was trained at.
    """
    knobs: dict[str, Any] = {
        "prompt": prompt,
        "mode": mode,
        "adapters": tuple(adapter or ()) or None,
        "negative_prompt": negative_prompt,
        "feather": feather,
        "focus": focus,
        "controls": tuple(control or ()) or None,
        "steps": steps,
        "cfg_scale": cfg_scale,
        "strength": strength,
        "sampler": sampler,
        "seed": seed,
        "count": count,
        "size": size,
        "aspect": aspect,
    }
    knobs = {name: value for name, value in knobs.items() if value is not None}
    made = read_repeat(repeat, knobs) if repeat else None
    model = model or (made.model if made else None)
    if model is None:
        raise InputError("--model is missing: name the base model's folder or hub id")
    if made:
        made.check_gguf(gguf)
        knobs = made.knobs
    placed: dict[str, Any] = {
        "dtype": dtype or (made.dtype if made else DTYPE),
        "encoder_device": encoder_device,
        "offload": offload,
        "weights": weights or (made.weights if made else "full"),
        "gguf": gguf,
        "vae_tiling": vae_tiling or (made.vae_tiling if made else False),
        "compile": compile or (made.compile if made else False),
    }
    depth_model = depth_model or (made.depth_model if made else None)
    base = Base(model, depth_model, SizeLimits(max_pixels, vision_pixels), made.geometry if made else None)
    if csv:
        if image or mask or repeat:
            raise InputError("--csv names its images and masks itself: leave out --image, --mask and --repeat")
        table = Table(csv, root, coco, tuple(font or ()), ignore_columns)
        edit_table(table, knobs, base, device, placed, batch_size, window, on_error, out)
        return
    if root or coco or font or ignore_columns or batch_size > 1 or window != WINDOW:
        raise InputError(
            "--root, --coco, --font, --ignore-columns, --batch-size and --window are for tables: give --csv"
        )
    edit_image(image or [], mask, knobs, made, base, make_placement(device, **placed), out)


def edit_image(
    image: list[Path],
    mask: Path | None,
    knobs: dict[str, Any],
    made: Repeat | None,
    base: Base,
    placement: Placement,
    out: Path,
) -> None:
    """Edits one image, and writes one PNG or several.

    Raises:
        InputError: something of it is wrong; nothing has been loaded or written then.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("one image is edited by one process: launch several with --csv alone")
    check_output(out)
    check_kept(out, knobs.get("count", 1), [*image, *([mask] if mask else []), *([made.path] if made else [])])
    try:
        images = [open_image(path) for path in image]
        opened = open_mask(mask) if mask else None
        if mask and opened and images:
            check_mask_shape(opened, images[0], mask)
        sources = [(path.name, file_digest(path)) for path in [*image, *([mask] if mask else [])]]
    except RejectedImage as error:
        raise InputError(str(error)) from None
    if made:
        made.check_images(images, opened)
    values: dict[str, Any] = {"prompt": "", **knobs}
    request = EditRequest(images=images, mask=opened, **values)
    editor = base.open(placement)
    editor.check(request)
    for note in editor.notes(request):
        print(f"note: {note}", file=sys.stderr)
    if made:
        made.check_models(editor.identity(request), editor.folder)
    try:
        results = editor.edit(request, show_step)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"{error}\nout of memory: a smaller --size, --offload or --weights needs less", file=sys.stderr)
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
        raise InputError(f"--out {out} cannot be written: {folder} is no folder that may be written to")
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


def show_step(done: int, total: int) -> None:
    """Counts steps on a terminal."""
    if sys.stderr.isatty():
        print(f"step {done} of {total}", end="\r" if done < total else "\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(edit)
