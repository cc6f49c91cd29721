"""Datasets for the tests of `check`: clean pairs of photographs, and known faults."""

import io
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from data_prep.check.check import command
from scripts import photographs
from tests.commands import run_script

Pair = tuple[Image.Image, Image.Image]
Rows = list[dict[str, Any]]


def view(photograph: Image.Image, size: int, x: float, y: float, scale: float = 1.0) -> Image.Image:
    """What a camera above (x, y) sees, in `size` x `size` pixels; with a larger scale things are larger."""
    left, top = x - size / 2 / scale, y - size / 2 / scale
    data = (1 / scale, 0, left, 0, 1 / scale, top)
    return photograph.transform((size, size), Image.Transform.AFFINE, data, Image.Resampling.BICUBIC)


def moved_pair(photograph: Image.Image, size: int, shift: tuple[float, float], zoom: float, rng: random.Random) -> Pair:
    """Two views of one photograph: the second one's content is `1 + zoom` times as large, then shifted, by pixels."""
    factor = 1.5 * size / min(photograph.size)
    if factor > 1:
        photograph = ImageOps.scale(photograph, factor, Image.Resampling.LANCZOS)
    x, y = (rng.uniform(0.62 * size, side - 0.62 * size) for side in photograph.size)
    second = view(photograph, size, x - shift[0] / (1 + zoom), y - shift[1] / (1 + zoom), 1 + zoom)
    return view(photograph, size, x, y), second


def edit(name: str, pair: Pair, rng: random.Random) -> Pair:
    """One of `EDITS`, done to the source or to the target."""
    source, target = pair
    if name == "blur":
        return source.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, target.width / 128))), target
    if name == "noise":
        noise = np.random.default_rng(rng.randrange(10**9)).normal(0, rng.uniform(3, 20), (*source.size[::-1], 3))
        return Image.fromarray((np.asarray(source) + noise).clip(0, 255).astype(np.uint8)), target
    if name == "jpeg":
        file = io.BytesIO()
        source.save(file, "JPEG", quality=rng.randint(15, 40))
        return Image.open(file).convert("RGB"), target
    if name == "sepia":
        return source, ImageOps.colorize(target.convert("L"), "#201000", "#ffe0b0")
    if name == "brightness":
        return source, ImageEnhance.Brightness(target).enhance(rng.choice([0.6, 1.4]))
    if name == "relight":
        light = np.linspace(rng.uniform(0.5, 0.9), rng.uniform(1.1, 1.4), target.width)[None, :, None]
        return source, Image.fromarray((np.asarray(target) * light).clip(0, 255).astype(np.uint8))
    place = patch_place(target, rng)
    target = target.copy()
    if name == "paste":
        other = photographs.load(rng.choice(photographs.TRAIN))
        target.paste(ImageOps.fit(other, (place[2] - place[0], place[3] - place[1])), place)
    else:
        ImageDraw.Draw(target).ellipse(place, fill=rng.choice(["#e6194b", "#3cb44b", "white", "black"]))
    return source, target


def patch_place(image: Image.Image, rng: random.Random) -> tuple[int, int, int, int]:
    """A box of a quarter to half of the sides."""
    width, height = (rng.randint(side // 4, side // 2) for side in image.size)
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    return left, top, left + width, top + height


EDITS = ("blur", "noise", "jpeg", "sepia", "brightness", "relight", "paste", "ellipse")
LOCAL = ("paste", "ellipse")


def clean_rows(folder: Path, number: int, seed: int = 0) -> Rows:
    """Pairs of 64 to 128 pixels without faults: every fifth is held out, and of photographs that the others lack."""
    rng, rows = random.Random(seed), []
    pictures = {path: photographs.load(path) for path in photographs.TRAIN + photographs.HELD_OUT}
    for index in range(number):
        held_out = index % 5 == 4
        photograph = pictures[rng.choice(photographs.HELD_OUT if held_out else photographs.TRAIN)]
        crop = photographs.random_crop(photograph, rng.choice([64, 96, 128]), rng)
        name = EDITS[index % len(EDITS)]
        source, target = edit(name, (crop, crop), rng)
        row = save_pair(folder, f"clean{index}", source, target)
        if name in LOCAL:
            row["back_mask"] = save_mask(folder, f"clean{index}", source, target)
        rows.append(
            {**row, "prompt": f"{name} the picture, number {index}", "split": "validation" if held_out else "train"}
        )
    return rows


def save_pair(folder: Path, name: str, source: Image.Image, target: Image.Image) -> dict[str, Any]:
    """Writes both and returns their row, without a prompt."""
    source.save(folder / f"{name}_source.png")
    target.save(folder / f"{name}_target.png")
    return {"id": name, "image": f"{name}_target.png", "edit_image": f"{name}_source.png"}


def save_mask(folder: Path, name: str, source: Image.Image, target: Image.Image, swapped: bool = False) -> str:
    """White where nothing changes, or where it does."""
    equal = (np.asarray(source) == np.asarray(target)).all(axis=2)
    Image.fromarray(equal != swapped).convert("L").save(folder / f"{name}_mask.png")
    return f"{name}_mask.png"


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """The dataset file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_check(dataset: Path, *options: str | Path, code: int = 0) -> dict[str, Any]:
    """The command, which ends with this code. Returns `check.json`."""
    out = dataset.with_name("check")
    done = run_script(
        "data_prep/run.py", "check", "--dataset", dataset, "--out", out, "--processes", "1", *options, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    return json.loads((out / "check.json").read_text())


def check_here(dataset: Path, **options: Any) -> dict[str, Any]:
    """The command without a start of Python. Returns `check.json`."""
    out = dataset.with_name("check")
    command(dataset=str(dataset), out=out, processes=1, **options)
    return json.loads((out / "check.json").read_text())


def found(report: dict[str, Any]) -> set[tuple[int, str]]:
    """Row numbers and kinds of findings."""
    return {(finding["row"], finding["kind"]) for finding in report["findings"]}
