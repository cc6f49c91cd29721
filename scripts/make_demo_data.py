"""Cuts real photographs into pairs for two edits that only the instruction distinguishes, and writes dataset files.

    python scripts/make_demo_data.py --out runs/demo/data [--train 300] [--validation 8] [--size 128] [--selection]

Every source is a crop with a sticker on it. "remove the sticker" has the clean crop as its target and a mask of what
must stay; "turn it into an old sepia print" keeps the sticker and changes every colour. Crops of the held-out photographs
appear only in validation.json. With --selection, that file has crops of two training photographs instead, which are then not
trained on: use it to choose settings. The held-out photographs are then not read.

With --products N, it makes no pairs but writes photographs and stickers for each split, in folders from which
`data_prep/run.py synth --recipes cutout` makes products on white.
"""

import argparse
import json
import math
import random
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
__import__("data_prep")  # without the environment, it says how to enter it

import numpy as np
from PIL import Image, ImageDraw

from scripts import photographs

REMOVE = "Remove the sticker from the photograph."
RECOLOUR = "Turn it into an old sepia print."
SEPIA = np.array([[0.393, 0.769, 0.189], [0.349, 0.686, 0.168], [0.272, 0.534, 0.131]])
COLOURS = ["#e6194b", "#ffe119", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#42d4f4", "#f032e6"]


def sticker(size: int, rng: random.Random) -> Image.Image:
    """A two-coloured round or star-shaped label with a white rim, RGBA, `size` pixels wide."""
    scale = 4  # drawn large and reduced, for smooth edges
    label = Image.new("RGBA", (size * scale, size * scale))
    draw = ImageDraw.Draw(label)
    outer, inner = rng.sample(COLOURS, 2)
    middle, radius = size * scale / 2, size * scale / 2 - 1
    if rng.random() < 0.5:
        draw.ellipse([middle - radius, middle - radius, middle + radius, middle + radius], fill="white")
        draw.ellipse([middle - 0.86 * radius] * 2 + [middle + 0.86 * radius] * 2, fill=outer)
    else:
        points = rng.randint(6, 9)
        turn = rng.random() * math.pi
        for reach, colour in ((1.0, "white"), (0.86, outer)):
            corners = [
                (middle + r * radius * math.sin(angle), middle + r * radius * math.cos(angle))
                for i in range(2 * points)
                for angle, r in [(turn + i * math.pi / points, reach * (1 if i % 2 else 0.78))]
            ]
            draw.polygon(corners, fill=colour)
    draw.ellipse([middle - 0.45 * radius] * 2 + [middle + 0.45 * radius] * 2, fill=inner)
    return label.resize((size, size), Image.Resampling.LANCZOS)


def sepia(picture: Image.Image) -> Image.Image:
    """The usual sepia matrix, with a little less contrast."""
    toned = np.asarray(picture, dtype=np.float64) @ SEPIA.T
    return Image.fromarray(np.clip(20 + 0.85 * toned, 0, 255).astype(np.uint8))


def make_pairs(photograph: Image.Image, name: str, folder: Path, size: int, rng: random.Random) -> list[dict]:
    """Writes one crop's files and returns its two rows, without their split."""
    clean = photographs.random_crop(photograph, size, rng)
    label = sticker(rng.randint(size // 4, size * 2 // 5), rng)
    place = (rng.randint(0, size - label.width), rng.randint(0, size - label.height))
    source, mask = clean.copy(), Image.new("L", clean.size, 255)
    source.paste(label, place, label)
    mask.paste(0, place, label.getchannel("A").point(lambda alpha: 255 if alpha else 0))
    files = {"clean": clean, "source": source, "sepia": sepia(source), "mask": mask}
    for kind, picture in files.items():
        picture.save(folder / f"{name}_{kind}.png")
    edit = {"edit_image": f"{name}_source.png"}
    return [
        {
            "id": f"{name}_remove",
            "prompt": REMOVE,
            "image": f"{name}_clean.png",
            "back_mask": f"{name}_mask.png",
            **edit,
        },
        {"id": f"{name}_recolour", "prompt": RECOLOUR, "image": f"{name}_sepia.png", **edit},
    ]


def write_products(out: Path, splits: dict[str, list[Path]], number: int, size: int, seed: int) -> None:
    """`SPLIT/photographs` and `SPLIT/products`; a quarter of the products, at least one, is held out."""
    held_out = max(1, number // 4)
    for split, paths in splits.items():
        rng = random.Random(f"{seed}/{split}/products")
        folders = [out / split / kind for kind in ("photographs", "products")]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        for path in paths:
            photographs.load(path).save(folders[0] / f"{path.stem}.png")
        for i in range(held_out if split == "validation" else number - held_out):
            sticker(size, rng).save(folders[1] / f"sticker-{i:02d}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo/data"))
    parser.add_argument(
        "--train",
        type=int,
        default=300,
        help="Number of crops of the training photographs, each of which makes two rows.",
    )
    parser.add_argument(
        "--validation",
        type=int,
        default=8,
        help="Number of crops of the held-out photographs, each of which makes two rows.",
    )
    parser.add_argument(
        "--selection",
        action="store_true",
        help="Hold two training photographs back as validation, to choose settings on.",
    )
    parser.add_argument(
        "--products",
        type=int,
        help="Write photographs and this many stickers instead of pairs. A quarter is held out.",
    )
    parser.add_argument("--size", type=int, default=128, help="Side of the images in pixels, a multiple of 32.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    validation = photographs.SELECTION if args.selection else photographs.HELD_OUT
    train = [path for path in photographs.TRAIN if path not in validation]
    args.out.mkdir(parents=True, exist_ok=True)
    if args.products:
        write_products(args.out, {"train": train, "validation": validation}, args.products, args.size, args.seed)
        return
    for split, paths, count in (("train", train, args.train), ("validation", validation, args.validation)):
        rng = random.Random(f"{args.seed}/{split}")
        pictures = {path.stem: photographs.load(path) for path in paths}
        rows = []
        for i in range(count):
            stem = list(pictures)[i % len(pictures)]
            pairs = make_pairs(pictures[stem], f"{split}_{i:04d}_{stem}", args.out, args.size, rng)
            rows += [pair | {"split": split} for pair in pairs]
        (args.out / f"{split}.json").write_text(json.dumps(rows, indent=1))
        print(f"{args.out / split}.json: {len(rows)} rows from {len(pictures)} photographs")


if __name__ == "__main__":
    main()
