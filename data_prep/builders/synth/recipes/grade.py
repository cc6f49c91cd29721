"""Colour looks as three-dimensional tables: a few of our own, or a .cube file."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from data_prep.builders.synth.draft import Draft, NoEdit, Picture, Scene, pick
from data_prep.errors import InputError

Colours = NDArray[np.floating]
"""Gamma-coded RGB in [0, 1], the last axis."""

PROMPTS = (
    "Grade the photograph with {look}",
    "Apply {look} to the picture",
    "Give the photograph {look}",
)
SIZE = 17
"""Points along a side of our own tables; between them Pillow interpolates."""
LARGEST = 65
"""Points along a side that Pillow takes."""


def grade(draft: Draft, scene: Scene) -> Draft:
    """The target in another look."""
    if scene.lut:
        name, table = load_cube(scene.lut)
        look = f"the {name} look"
    else:
        look = pick(scene.rng, tuple(LOOKS))
        if look in NEED_COLOUR and _colourfulness(draft.target) < 12:
            raise NoEdit(f"{look} shows on colours only, and there are hardly any")
        table = _table(LOOKS[look], scene.rng)
    target = np.asarray(Image.fromarray(draft.target).filter(table))
    return draft.forward(target, pick(scene.rng, PROMPTS).format(look=look))


def teal_and_orange(colours: Colours, rng: np.random.Generator) -> Colours:
    """Shadows to teal, lights to orange, a little more contrast."""
    tone, strength = _luma(colours)[..., None], rng.uniform(0.8, 1.3)
    teal, orange = np.array([-0.10, 0.03, 0.09]), np.array([0.09, 0.01, -0.12])
    return _contrast(colours + strength * ((1 - tone) * teal + tone * orange), 1.1)


def faded_film(colours: Colours, rng: np.random.Generator) -> Colours:
    """Milky blacks, dull whites, pale and a little warm."""
    lift, pale = rng.uniform(0.10, 0.18), rng.uniform(0.3, 0.5)
    mild = colours + pale * (_luma(colours)[..., None] - colours)
    return lift + (0.93 - lift) * mild + np.array([0.02, 0.0, -0.03])


def black_and_white(colours: Colours, rng: np.random.Generator) -> Colours:
    """Grey, with the channels mixed as through a colour filter."""
    mixer = rng.dirichlet((4, 6, 2))
    return _contrast(np.repeat((colours @ mixer)[..., None], 3, axis=-1), rng.uniform(1.0, 1.35))


def sepia(colours: Colours, rng: np.random.Generator) -> Colours:
    """Grey, toned brown."""
    grey = _contrast(_luma(colours)[..., None], rng.uniform(0.85, 1.0))
    return grey ** np.array([0.8, 1.0, 1.35]) * np.array([1.0, 0.9, 0.78])


def bleach_bypass(colours: Colours, rng: np.random.Generator) -> Colours:
    """Silver left in the film: hard contrast, little colour."""
    mild = colours + rng.uniform(0.5, 0.7) * (_luma(colours)[..., None] - colours)
    return _contrast(mild, rng.uniform(1.4, 1.7))


def vivid(colours: Colours, rng: np.random.Generator) -> Colours:
    """Strong colours, some contrast."""
    tone = _luma(colours)[..., None]
    return _contrast(tone + rng.uniform(1.5, 1.9) * (colours - tone), 1.1)


LOOKS: dict[str, Callable[[Colours, np.random.Generator], Colours]] = {
    "a teal and orange cinema look": teal_and_orange,
    "a faded film look": faded_film,
    "a black-and-white look": black_and_white,
    "an old sepia tone": sepia,
    "a bleach bypass look": bleach_bypass,
    "vivid, saturated colours": vivid,
}
NEED_COLOUR = ("a black-and-white look", "a bleach bypass look", "vivid, saturated colours")


@lru_cache(maxsize=1)
def load_cube(path: Path) -> tuple[str, ImageFilter.Color3DLUT]:
    """The look of a .cube file and its name: the TITLE, or the file's. Format: Adobe, Cube LUT Specification 1.0.

    Raises:
        InputError: not such a file, a one-dimensional table, or another domain than 0 to 1.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the LUT {path}: {error}") from None
    lines = [line for line in lines if line and not line.startswith("#")]
    header = {key: value for key, _, value in (line.partition(" ") for line in lines if line[0].isalpha())}
    if "LUT_3D_SIZE" not in header:
        raise InputError(f"{path} is not a three-dimensional LUT: it has no line LUT_3D_SIZE")
    for key, usual in (("DOMAIN_MIN", 0.0), ("DOMAIN_MAX", 1.0)):
        if key in header and _numbers(header[key], path) != [usual] * 3:
            raise InputError(f"{path} has {key} {header[key]}: only a domain from 0 to 1 is supported")
    size = int(_numbers(header["LUT_3D_SIZE"], path)[0])
    rows = [_numbers(line, path) for line in lines if not line[0].isalpha()]
    if not 2 <= size <= LARGEST or len(rows) != size**3 or any(len(row) != 3 for row in rows):
        raise InputError(
            f"{path} is not a complete LUT: {size} points a side (2 to {LARGEST}) need {size**3} lines of three numbers, "
            f"it has {len(rows)} lines"
        )
    name = header.get("TITLE", "").strip(' "') or path.stem.replace("_", " ")
    return name, ImageFilter.Color3DLUT(size, [value for row in rows for value in row])


def _numbers(text: str, path: Path) -> list[float]:
    try:
        return [float(word) for word in text.split()]
    except ValueError:
        raise InputError(f"{path} is not a LUT: {text[:60]!r} should be numbers") from None


def _table(look: Callable[[Colours, np.random.Generator], Colours], rng: np.random.Generator) -> ImageFilter.Color3DLUT:
    steps = np.linspace(0, 1, SIZE)
    blue, green, red = np.meshgrid(steps, steps, steps, indexing="ij")  # red changes fastest
    colours = look(np.stack([red, green, blue], axis=-1), rng)
    return ImageFilter.Color3DLUT(SIZE, np.clip(colours, 0, 1).astype(np.float32).ravel())


def _colourfulness(picture: Picture) -> float:
    """Mean difference between the strongest and the weakest channel, 0 to 255."""
    return float((picture.max(axis=-1) - picture.min(axis=-1)).mean())


def _luma(colours: Colours) -> NDArray[np.floating]:
    """Of gamma-coded colours. Weights: ITU-R BT.601."""
    return colours @ np.array([0.299, 0.587, 0.114])


def _contrast(colours: Colours, slope: float) -> Colours:
    """About middle grey."""
    return 0.5 + slope * (colours - 0.5)
