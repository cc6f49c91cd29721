"""Edits one image.

python eval/edit.py --model models/tiny --adapter runs/demo/lbm/checkpoints/step-000400 \
    --image photograph.png --prompt "Remove the sticker from the photograph." --steps 4 --seed 1 --out result.png

The PNG carries everything that is needed to make it again, under the key `qwen-image-edit`.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
from typing import Annotated

import torch
import typer
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from data_prep.cli import run_command
from data_prep.errors import InputError
from data_prep.files import atomic_file
from data_prep.geometry import Size
from data_prep.images import RejectedImage, file_digest, open_image
from data_prep.model_dir import ModelDirectory
from eval.editor import Editor, EditRequest, EditResult
from eval.metadata import choose_geometry, read_metadata
from eval.options import DEVICE, DTYPE, CfgScale, Device, Dtype, MaxPixels, Model, Seed, VisionPixels

PNG_KEY = "qwen-image-edit"


def parse_size(text: str) -> Size:
    """`768x512`, width first."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise typer.BadParameter(f"must look like 768x512, got {text!r}")
    return Size(int(height), int(width))


def edit(
    *,
    model: Model,
    adapter: Annotated[
        Path | None, typer.Option(help="Checkpoint folder or safetensors file.", show_default="the base model")
    ] = None,
    strength: Annotated[float, typer.Option(help="Of the adapter; 0 is the base model.")] = 1.0,
    image: Annotated[list[Path], typer.Option(help="To edit; up to three times.")],
    prompt: Annotated[str, typer.Option(help="The instruction.")],
    negative_prompt: Annotated[str, typer.Option(help="What guidance leads away from (flow matching).")] = " ",
    steps: Annotated[
        int | None, typer.Option(help="Of the sampler.", show_default="4 for a bridge, 40 for flow matching")
    ] = None,
    cfg_scale: CfgScale = None,
    seed: Seed = 0,
    size: Annotated[
        Size | None,
        typer.Option(parser=parse_size, metavar="WxH", help="In multiples of 32.", show_default="as the first image"),
    ] = None,
    max_pixels: MaxPixels = None,
    vision_pixels: VisionPixels = None,
    device: Device = DEVICE,
    dtype: Dtype = DTYPE,
    out: Annotated[Path, typer.Option(help="The PNG to write.")],
) -> None:
    """Edits one image with a base model and an adapter, and writes a PNG that says how it was made.

    An adapter's file says whether it is a bridge or flow matching, and the sizes that it was trained at.
    """
    if out.suffix.lower() != ".png":
        raise InputError(f"--out must end in .png, which can carry the settings, got {out}")
    try:
        images = [open_image(path) for path in image]
    except RejectedImage as error:
        raise InputError(str(error)) from error
    request = EditRequest(prompt, images, steps, seed, negative_prompt, cfg_scale, size)
    geometry = choose_geometry(read_metadata(adapter) if adapter else {}, max_pixels, vision_pixels)
    place = torch.device(device), getattr(torch, dtype)
    editor = Editor(ModelDirectory.resolve(model), adapter, *place, geometry, strength)
    result = editor.edit(request, show_step)
    write_png(result, image, out)
    settings = result.settings
    done = f"{settings['width']}x{settings['height']}, {settings['steps']} steps, seed {settings['seed']}"
    print(f"{out}: {done}, {result.seconds:.1f} s")


def show_step(step: int, _: Tensor) -> None:
    """Counts steps on a terminal."""
    if sys.stderr.isatty():
        print(f"step {step}\r", end="", file=sys.stderr, flush=True)


def write_png(result: EditResult, sources: list[Path], out: Path) -> None:
    """Writes the image with its settings and its sources' names and digests."""
    images = [{"name": path.name, "digest": file_digest(path)} for path in sources]
    info = PngInfo()
    info.add_itxt(PNG_KEY, json.dumps(result.settings | {"images": images}, ensure_ascii=False))
    with atomic_file(out) as temporary:
        result.image.save(temporary, format="png", pnginfo=info)


if __name__ == "__main__":
    run_command(edit)
