"""What a recipe works on, and what they all share: the pair in the making, linear light, and places in words."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.rows.images import linear_light

Picture = NDArray[np.uint8]
"""sRGB, shape (height, width, 3)."""
Plane = NDArray[np.floating]
"""One number a pixel, shape (height, width)."""

T = TypeVar("T")

PLACES = (
    ("in the upper left", "at the top", "in the upper right"),
    ("on the left", "in the middle", "on the right"),
    ("in the lower left", "at the bottom", "in the lower right"),
)


class NoEdit(Exception):
    """This recipe finds nothing to do in this picture; another crop or another draw may do."""


@dataclass(frozen=True)
class CutOut:
    """An object without its background."""

    picture: Image.Image
    """RGBA."""
    name: str = ""
    """What it is, if that is known: "red mug"."""


@dataclass(frozen=True)
class Scene:
    """What a recipe may draw from."""

    rng: np.random.Generator
    cut_out: Callable[[np.random.Generator], CutOut]
    """Gives an object to paste."""
    lut: Path | None = None
    """A colour look of the user's own, a .cube file."""


@dataclass(frozen=True)
class Draft:
    """A pair in the making. Both pictures begin as the photograph; a recipe changes one or both of them."""

    source: Picture
    target: Picture
    prompts: tuple[str, ...] = ()
    """One instruction for each edit: an imperative sentence without its full stop."""
    references: tuple[Picture, ...] = ()
    """Further pictures that the instruction speaks of, from "picture 2" on."""

    def forward(self, target: Picture, prompt: str) -> "Draft":
        """With an edit made: the target changes."""
        return replace(self, target=target, prompts=(*self.prompts, prompt))

    def backward(self, source: Picture, prompt: str) -> "Draft":
        """With an edit to be made: the source changes, in the way that the instruction undoes."""
        return replace(self, source=source, prompts=(*self.prompts, prompt))


@dataclass(frozen=True)
class Change:
    """A picture after a change, and the words that tell of it."""

    picture: Picture
    words: dict[str, str] = field(default_factory=dict)


Changing = Callable[[Picture, np.random.Generator], Change]
Edit = Callable[[Draft, Scene], Draft]


@dataclass(frozen=True)
class Forward:
    """An edit that makes a change: "make it snow"."""

    change: Changing
    prompts: tuple[str, ...]
    """Ways to ask for it, with the change's words in braces."""

    def __call__(self, draft: Draft, scene: Scene) -> Draft:
        change = self.change(draft.target, scene.rng)
        return draft.forward(change.picture, pick(scene.rng, self.prompts).format(**change.words))


@dataclass(frozen=True)
class Backward:
    """An edit that undoes a change: "remove the snow"."""

    change: Changing
    prompts: tuple[str, ...]

    def __call__(self, draft: Draft, scene: Scene) -> Draft:
        change = self.change(draft.source, scene.rng)
        return draft.backward(change.picture, pick(scene.rng, self.prompts).format(**change.words))


def pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    """One of them, all alike."""
    return choices[int(rng.integers(len(choices)))]


def place(x: float, y: float) -> str:
    """Where a point is, in words; x and y are in [0, 1], from the upper left."""
    return PLACES[min(int(3 * y), 2)][min(int(3 * x), 2)]


def to_linear(picture: Picture) -> NDArray[np.float32]:
    """sRGB -> linear light in [0, 1]: where light adds up. Formula: IEC 61966-2-1."""
    return _LINEAR[picture]


def to_srgb(light: NDArray[np.floating]) -> Picture:
    """Linear light -> sRGB, clipped and rounded; the inverse of `to_linear`, exactly."""
    light = np.clip(light, 0, 1)
    return to_bytes(np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.power(light, np.float32(1 / 2.4)) - 0.055))


def to_bytes(values: NDArray[np.floating]) -> Picture:
    """[0, 1] -> 0..255, clipped and rounded."""
    return np.round(255 * np.clip(values, 0, 1)).astype(np.uint8)


def resize_plane(plane: NDArray[np.floating], shape: tuple[int, ...]) -> Plane:
    """Bicubic, to the height and width that `shape` begins with."""
    image = Image.fromarray(plane.astype(np.float32))
    return np.asarray(image.resize((shape[1], shape[0]), Image.Resampling.BICUBIC))


def smooth_field(shape: tuple[int, ...], rng: np.random.Generator, cells: int) -> Plane:
    """Random hills and valleys, about `cells` of them along a side, mostly in [-1, 1]."""
    return resize_plane(rng.uniform(-1, 1, (cells + 1, cells + 1)), shape)


def luminance(light: NDArray[np.floating]) -> Plane:
    """Luminance of linear light. Weights: ITU-R BT.709."""
    return light @ np.array([0.2126, 0.7152, 0.0722], np.float32)


_LINEAR = linear_light(np.arange(256) / 255).astype(np.float32)
