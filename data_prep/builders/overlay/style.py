"""How overlays look: options of the command line, which a row of the table may override, as text and as values."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from PIL import ImageColor

from data_prep.builders.overlay.typography import AlignName

RGB = tuple[int, int, int]
DEFAULT_STYLE = {
    "position": "random",
    "font_size": "0.05:0.09",
    "overlay_size": "0.3",
    "colour": "auto",
    "opacity": "1",
    "rotation": "0",
}
"""How overlays look where nobody says otherwise."""
BackingName = Literal["auto", "outline", "box", "none"]

ANCHORS = {
    "top-left": (0.0, 0.0),
    "top": (0.5, 0.0),
    "top-right": (1.0, 0.0),
    "left": (0.0, 0.5),
    "center": (0.5, 0.5),
    "right": (1.0, 0.5),
    "bottom-left": (0.0, 1.0),
    "bottom": (0.5, 1.0),
    "bottom-right": (1.0, 1.0),
}
"""Name -> share of the free width that is left of an overlay, and of the free height that is above it."""


@dataclass(frozen=True)
class Span:
    """A number, or a range that one is drawn from."""

    low: float
    high: float

    def draw(self, rng: random.Random) -> float:
        """A number of the range, all as likely."""
        return rng.uniform(self.low, self.high)


@dataclass(frozen=True)
class Style:
    """How an overlay looks."""

    position: str | tuple[float, float]
    """`random`, a name of ANCHORS, or its centre in shares of the photograph's width and height."""
    font_size: Span | None
    """Pixels per em over the photograph's height; None: as large as fits."""
    overlay_size: Span
    """Share of the photograph's width and height that a picture fills."""
    colour: RGB | None
    """Colour of the letters. None chooses one that can be read where they are."""
    opacity: Span
    """1: hides what is under it."""
    rotation: Span
    """Degrees, counter-clockwise."""
    align: AlignName = "center"
    max_width: float = 0.8
    """Share of the photograph's width at which lines break."""
    backing: BackingName = "auto"
    """What is behind letters; `auto`: an outline or a box where no colour would be read otherwise."""

    def override(self, cells: Mapping[str, str]) -> "Style":
        """The style with what a row says otherwise.

        Raises:
            ValueError: a cell does not hold what its column does.
        """
        return replace(self, **parse_style(cells))


def parse_style(texts: Mapping[str, str]) -> dict[str, Any]:
    """Fields of a style from text, without those that are not about style.

    Raises:
        ValueError: says which one is wrong, and what would be right.
    """
    return {name: parse(texts[name].strip(), name) for name, parse in PARSERS.items() if name in texts}


def _span(text: str, name: str, low: float, high: float) -> Span:
    try:
        ends = [float(part) for part in text.split(":")]
    except ValueError:
        ends = []
    if len(ends) not in (1, 2) or not low <= ends[0] <= ends[-1] <= high:  # NaN is in no range
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, or a range as in 0.2:0.8, got {text!r}")
    return Span(ends[0], ends[-1])


def _font_size(text: str, name: str) -> Span | None:
    return None if text == "fit" else _span(text, f"{name} (a share of the height, or 'fit')", 0.01, 1)


def _colour(text: str, name: str) -> RGB | None:
    if text == "auto":
        return None
    try:
        parts = ImageColor.getrgb(text)
    except ValueError:
        parts = ()
    if len(parts) != 3:  # four: transparency is for opacity
        raise ValueError(f"{name} must be auto, #rrggbb or the name of a colour, got {text!r}")
    return parts[0], parts[1], parts[2]


def _position(text: str, name: str) -> str | tuple[float, float]:
    if text == "random" or text in ANCHORS:
        return text
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        x = y = -1.0
    if not (0 <= x <= 1 and 0 <= y <= 1):
        names = ", ".join(ANCHORS)
        raise ValueError(f"{name} must be random, {names}, or x,y from 0 to 1, got {text!r}")
    return x, y


PARSERS: dict[str, Callable[[str, str], Any]] = {
    "position": _position,
    "font_size": _font_size,
    "overlay_size": lambda text, name: _span(text, name, 0.01, 1),
    "colour": _colour,
    "opacity": lambda text, name: _span(text, name, 0.05, 1),
    "rotation": lambda text, name: _span(text, name, -180, 180),
}
"""Column -> what reads its cells."""
