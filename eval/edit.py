"""Edits one image.

python eval/edit.py --model models/tiny --adapter runs/demo/lbm/checkpoints/step-000400 \
    --image photograph.png --prompt "Remove the sticker from the photograph." --steps 4 --seed 1 --out result.png

The PNG carries everything that is needed to make it again, under the key `qwen-image-edit`.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json

import torch
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from data_prep.errors import InputError, exit_codes
from data_prep.files import atomic_file
from data_prep.geometry import Size
from data_prep.images import RejectedImage, file_digest, open_image
from data_prep.model_dir import ModelDirectory
from eval.editor import Editor, EditRequest, EditResult
from eval.metadata import choose_geometry, read_metadata

PNG_KEY = "qwen-image-edit"


def main(arguments: argparse.Namespace) -> None:
    """Makes the edit and writes the PNG.

    Raises:
        InputError: an argument is wrong, or a file is not what it should be.
    """
    if arguments.out.suffix.lower() != ".png":
        raise InputError(f"--out must end in .png, which can carry the settings, got {arguments.out}")
    try:
        images = [open_image(path) for path in arguments.image]
    except RejectedImage as error:
        raise InputError(str(error)) from error
    request = EditRequest(
        prompt=arguments.prompt,
        images=images,
        steps=arguments.steps,
        seed=arguments.seed,
        negative_prompt=arguments.negative_prompt,
        cfg_scale=arguments.cfg_scale,
        size=arguments.size,
    )
    model = ModelDirectory.resolve(arguments.model)
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    metadata = read_metadata(arguments.adapter) if arguments.adapter else {}
    geometry = choose_geometry(metadata, arguments.max_pixels, arguments.vision_pixels)
    editor = Editor(model, arguments.adapter, device, dtype, geometry, arguments.strength)
    result = editor.edit(request, show_step)
    write_png(result, arguments.image, arguments.out)
    settings = result.settings
    size = f"{settings['width']}x{settings['height']}"
    print(f"{arguments.out}: {size}, {settings['steps']} steps, seed {settings['seed']}, {result.seconds:.1f} s")


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


def parse_size(text: str) -> Size:
    """`768x512`, width first."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"must look like 768x512, got {text!r}")
    return Size(int(height), int(width))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description="Edits one image with a base model and an adapter, and writes a PNG that says how it was made.",
        epilog="An adapter's file says whether it is a bridge or flow matching, and the sizes that it was trained at.",
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="folder or hub id in the layout of Qwen/Qwen-Image-Edit-2511")
    add("--adapter", type=Path, metavar="PATH", help="checkpoint folder or safetensors file; none: the base model")
    add("--strength", type=float, default=1.0, metavar="X", help="of the adapter; 0 is the base model (default 1)")
    add("--image", type=Path, required=True, action="append", metavar="FILE", help="to edit; up to three times")
    add("--prompt", required=True, metavar="TEXT", help="the instruction")
    add("--negative-prompt", default=" ", metavar="TEXT", help="what guidance leads away from (flow matching)")
    add("--steps", type=int, metavar="N", help="default: 4 for a bridge, 40 for flow matching")
    add("--cfg-scale", type=float, metavar="X", help="guidance of flow matching, 1 for none (default 4)")
    add("--seed", type=int, default=0, metavar="N", help="of the noise (default 0)")
    add("--size", type=parse_size, metavar="WxH", help="in multiples of 32 (default: as the first image)")
    add("--max-pixels", type=int, metavar="N", help="largest area of the result (default: as the adapter was trained)")
    add("--vision-pixels", type=int, metavar="N", help="area that the text encoder sees (default: as trained)")
    add("--device", default="cuda" if cuda else "cpu", metavar="NAME", help="default: cuda if there is one, else cpu")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16" if cuda else "float32", help="of the weights")
    add("--out", type=Path, required=True, metavar="FILE", help="the PNG to write")
    return parser.parse_args()


if __name__ == "__main__":
    with exit_codes():
        main(parse_arguments())
