"""Perfect pairs made of plain photographs: the edit is ours, so source, target, instruction and mask agree to the bit."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from data_prep.builders.common.dataset import build_dataset
from data_prep.builders.common.results import save_result
from data_prep.builders.split.command import HashPictures
from data_prep.builders.synth.catalog import ATTEMPTS, instruction, make_draft, parse_recipes, preserved
from data_prep.builders.synth.cutouts import cut_from, load_object
from data_prep.builders.synth.draft import CutOut, Draft, NoEdit, Scene, pick
from data_prep.builders.synth.frame import SMALLEST, STEP, framed
from data_prep.builders.synth.recipes.grade import load_cube
from data_prep.cli import CORES, Engine, OnError, Out, Processes, Seed
from data_prep.errors import InputError
from data_prep.jobs.engines import make_engine
from data_prep.jobs.items import PARTS_FOLDER, Done, Item, run_items
from data_prep.jobs.items import Engine as Runner
from data_prep.rows.duplicates import HASH_BYTES, same_content
from data_prep.rows.folders import list_images, unique_names
from data_prep.rows.images import RejectedImage, open_image

OBJECTS = 3
"""Objects, or photographs to cut them from, that a pair may choose from."""
FOLDERS = ("source", "target", "mask", "picture2", "picture3")
"""Where pictures go."""
PRELOAD = (
    "numpy",
    "PIL.Image",
    "scipy.ndimage",
    "scipy.signal",
    "skimage.segmentation",
    "skimage.color",
    "skimage.measure",
)


def command(
    images: Annotated[Path, typer.Option(help="Folder with photographs. It may contain other folders.")],
    out: Out,
    recipes: Annotated[
        str,
        typer.Option(
            help="Recipes, separated by commas: insert, remove, cutout, recolour, grade, white_balance, relight, add_rain, "
            "remove_rain (also with snow or fog), deblur, upscale, denoise, clean_jpeg, outpaint; or the groups all, "
            "weather, restore. a+b makes both edits in one pair."
        ),
    ] = "all",
    per_image: Annotated[int, typer.Option(help="Number of pairs per photograph. The recipes take turns.")] = 4,
    size: Annotated[
        int, typer.Option(help="Each pair has about size x size pixels. Photographs are never enlarged.")
    ] = 512,
    validation: Annotated[
        float, typer.Option(help="Photographs held out for validation: a share below 1, or a number.")
    ] = 0.1,
    objects: Annotated[
        Path | None,
        typer.Option(help="Folder with cut-out objects on a transparent background, named after what they show."),
    ] = None,
    lut: Annotated[Path | None, typer.Option(help="A .cube file (colour look-up table) for the recipe grade.")] = None,
    seed: Seed = 0,
    processes: Processes = CORES,
    engine: Engine = "local",
    on_error: OnError = "raise",
) -> None:
    """Makes pairs from plain photographs by pasting, removing, relighting, recolouring, grading, restoring or extending.

    Masks are exact: white where source and target are the same bit for bit. Edits that preserve nothing have no mask.
    Without --objects, objects are cut out of the other photographs. Held-out photographs lend no objects to training pairs.

    python data_prep/run.py synth --images photos --out pairs --recipes remove,insert,remove+relight --per-image 4
    """
    names = parse_recipes(recipes)
    if size < SMALLEST or size % STEP:
        raise InputError(f"--size must be a multiple of {STEP} and {SMALLEST} or more, got {size}")
    if per_image < 1:
        raise InputError(f"--per-image must be 1 or more, got {per_image}")
    if out.resolve().is_relative_to(images.resolve()):
        raise InputError(
            f"--out {out} is inside the folder of photographs, so the next run would use its images as photographs: choose "
            "another folder"
        )
    if lut:
        load_cube(lut)  # a wrong one is told before any work is done
    photographs = list_images(images)
    number = _number_held_out(len(photographs), validation)
    things = list_images(objects) if objects else None
    engine_ = make_engine(engine, processes, PRELOAD)
    originals = find_originals(photographs, images, out / PARTS_FOLDER, engine_)
    held_out = draw_held_out(originals, number, seed)
    plan = Plan(originals, images, names, per_image, seed, held_out, things, lut)
    make = MakePair(size, seed, cut=things is None)
    total, unsuited = len(photographs) * per_image, "pairs left out: the recipe does not suit the photograph"
    build_dataset(
        plan.items(), make, out, engine_, title="synth", total=total, on_error=on_error, no_row=unsuited, writes=FOLDERS
    )


@dataclass(frozen=True)
class Plan:
    """Which pairs are made."""

    originals: dict[Path, str]
    """Photographs, of `find_originals`."""
    folder: Path
    recipes: list[str]
    per_image: int
    seed: int
    held_out: frozenset[Path]
    objects: list[Path] | None
    """Cut-outs; None to cut them from photographs."""
    lut: Path | None

    def items(self) -> Iterator[Item]:
        """One for each photograph and variation. Pairs of one photograph take the recipes in turns, in an order of their own."""
        lenders = {split: self._lenders(split) for split in (False, True)}
        names = photograph_names(list(self.originals), self.folder)
        for place, (path, name) in enumerate(zip(self.originals, names, strict=True)):
            rng = random.Random(f"{self.seed}/{name}/order")
            order = rng.sample(self.recipes, len(self.recipes))
            for n in range(self.per_image):
                recipe, held_out = order[n % len(order)], path in self.held_out
                lend = self._lent(recipe, path, lenders[held_out], f"{self.seed}/{name}/{n}/objects")
                look = (self.lut,) if self.lut and "grade" in recipe.split("+") else ()
                values = {
                    "recipe": recipe,
                    "original": self.originals[path],
                    "held_out": held_out,
                    "lut": bool(look),
                    "whole": self.per_image == 1,
                }
                yield Item(place * self.per_image + n + 1, f"{name}-{n}-{recipe}", (path, *look, *lend), values)

    def _lenders(self, held_out: bool) -> list[Path]:
        """What objects come from, for held-out photographs or the others: none is on both sides, unless it is the only one."""
        if self.objects is None:
            return [path for path in self.originals if (path in self.held_out) == held_out]
        share = len(self.held_out) / len(self.originals)
        number = min(math.ceil(share * len(self.objects)), len(self.objects) - 1)
        known = _draw(self.objects, number, f"{self.seed}/objects")
        found = [path for path in self.objects if (path in known) == held_out]
        return found or self.objects

    def _lent(self, recipe: str, path: Path, lenders: list[Path], seed: str) -> tuple[Path, ...]:
        if not {"insert", "remove", "cutout"} & set(recipe.split("+")):
            return ()
        rng = random.Random(seed)
        drawn = [lenders[i] for i in rng.sample(range(len(lenders)), min(OBJECTS + 1, len(lenders)))]
        others = [lender for lender in drawn if lender != path]
        return tuple(others[:OBJECTS] or drawn)  # a photograph that is alone lends to itself


@dataclass(frozen=True)
class MakePair:
    """One pair of one photograph: its pictures, its mask and its row; none where no draw of the recipe shows."""

    size: int
    seed: int
    cut: bool
    """Objects are cut from photographs, not given."""

    def __call__(self, item: Item, out: Path) -> list[dict[str, Any]]:
        photograph = _open(item.files[0])
        lut, lenders = (item.files[1], item.files[2:]) if item.values["lut"] else (None, item.files[1:])
        lend = partial(self._lend, lenders)
        for attempt in range(ATTEMPTS):
            rng = _generator(f"{self.seed}/{item.id}/{attempt}")
            picture = framed(photograph, self.size, rng, whole=item.values["whole"])
            try:
                draft = make_draft(picture, item.values["recipe"], Scene(rng, lend, lut))
            except NoEdit:
                continue
            return [_save(draft, item, out)]
        return []

    def _lend(self, lenders: tuple[Path, ...], rng: np.random.Generator) -> CutOut:
        if not self.cut:
            return load_object(pick(rng, lenders))
        for i in rng.permutation(len(lenders)):
            try:
                return cut_from(lenders[i], rng)
            except RejectedImage:  # it is reported as the photograph that it is
                continue
        raise NoEdit("none of the photographs that it would take an object from can be read")


def _save(draft: Draft, item: Item, out: Path) -> dict[str, Any]:
    """Writes the pictures and gives the row."""
    pictures = {"target": Image.fromarray(draft.target), "source": Image.fromarray(draft.source)}
    pictures |= {f"picture{2 + i}": Image.fromarray(picture) for i, picture in enumerate(draft.references)}
    if mask := preserved(draft):
        pictures["mask"] = mask
    paths = {kind: save_result(picture, out / kind, item.id) for kind, picture in pictures.items()}
    return {
        "id": item.id,
        "prompt": instruction(draft.prompts),
        "image": paths["target"],
        "edit_image": [path for kind, path in paths.items() if kind not in ("target", "mask")],
        "back_mask": paths.get("mask"),
        "split": "validation" if item.values["held_out"] else None,
        "tag": item.values["recipe"],
        "group": item.values["original"],
    }


def photograph_names(photographs: list[Path], folder: Path) -> list[str]:
    """A name for each that files and ids can have: a file's name may be any bytes, those that are not UTF-8 become `\\xff`."""
    return [
        name.encode(errors="surrogateescape").decode(errors="backslashreplace")
        for name in unique_names(photographs, folder)
    ]


def find_originals(photographs: list[Path], folder: Path, parts: Path, engine: Runner) -> dict[Path, str]:
    """For each photograph the name of the first that is the same to the eye, its own where none before it is.

    Photographs that cannot be read have their own: they are reported when pairs are to be made of them.
    """
    names = photograph_names(photographs, folder)
    items = (Item(n, name, (path,)) for n, (path, name) in enumerate(zip(photographs, names, strict=True), start=1))
    answers = run_items(items, HashPictures(), parts, engine, "comparing", len(photographs))
    hashed = [(answer.item, bytes.fromhex(answer.value[0])) for answer in answers if isinstance(answer, Done)]
    hashes = np.frombuffer(b"".join(each for _, each in hashed), dtype=np.uint8).reshape(-1, HASH_BYTES)
    originals = dict(zip(photographs, names, strict=True))
    for (item, _), place in zip(hashed, same_content(hashes), strict=True):
        originals[photographs[item.number - 1]] = hashed[place][0].id
    return originals


def _number_held_out(size: int, validation: float) -> int:
    """A share above zero holds out at least one.

    Raises:
        InputError: nothing would be left to train on.
    """
    number = validation if validation >= 1 else math.ceil(validation * size)
    if validation < 0 or number != int(number):
        raise InputError(f"--validation must be a share from 0 to 1 or a whole number, got {validation}")
    if number >= size:
        raise InputError(
            f"--validation {validation:g} would hold out {number:g} of {size} photographs and leave none to "
            "train on: give more photographs or a smaller number, or 0"
        )
    return int(number)


def draw_held_out(originals: dict[Path, str], number: int, seed: int) -> frozenset[Path]:
    """The photographs of the validation split, at most `number`: those that are the same to the eye stay together.

    Raises:
        InputError: all of them are the same, or in groups larger than `number`.
    """
    groups: dict[str, list[Path]] = {}
    for path, original in originals.items():
        groups.setdefault(original, []).append(path)
    held_out: list[Path] = []
    for name in random.Random(f"{seed}/validation").sample(list(groups), len(groups)):
        if len(held_out) + len(groups[name]) <= number:
            held_out += groups[name]
    if number and not held_out:
        raise InputError(
            f"no photograph can be held out: each has duplicates, which together are more than --validation {number}"
        )
    return frozenset(held_out)


def _draw(paths: list[Path], number: int, seed: str) -> frozenset[Path]:
    return frozenset(random.Random(seed).sample(paths, number))


def _generator(seed: str) -> np.random.Generator:
    return np.random.default_rng(list(seed.encode()))


@lru_cache(maxsize=1)
def _open(path: Path) -> Image.Image:
    """The photograph; its variations follow each other, and decoding it is half of the work."""
    return open_image(path)
