"""Text on pictures: which characters a font has, where lines break, and how much of each pixel the ink covers."""

import math
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import matplotlib
from fontTools.ttLib import TTFont, TTLibError
from PIL import Image, ImageDraw, ImageFont, features

from data_prep.errors import InputError

AlignName = Literal["left", "center", "right"]

DEFAULT_FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
"""DejaVu Sans, which matplotlib brings: Latin, Greek, Cyrillic, Armenian, Georgian, Hebrew, Arabic; not Chinese."""

MIN_FONT_SIZE = 10
"""Pixels per em. Smaller letters cannot be read, and a VAE that shrinks pictures 8 times cannot keep them."""

LINE_SPACING = 1.15
"""Distance of baselines over the font's own ascent + descent."""

# Small kana, length and iteration marks: Japanese rules (JIS X 4051) keep them off a line's start.
NEVER_FIRST = frozenset("、。，．・：；！？…‥ー々ゝゞヽヾぁぃぅぇぉっゃゅょゎァィゥェォッャュョヮヵヶ!?,.:;%")
# Written without spaces, may break between any two characters: Han, kana, bopomofo, Yi, their punctuation.
IDEOGRAPHIC = re.compile(
    r"[\u2E80-\u2FDF\u3000-\u312F\u3190-\u4DBF\u4E00-\uA4CF\uF900-\uFAFF\uFF00-\uFFEF\U00020000-\U0003FFFF]"
)


@dataclass(frozen=True)
class TextBlock:
    """Lines of text in one font at one size, laid out and ready to be drawn."""

    lines: tuple[str, ...]
    font: ImageFont.FreeTypeFont
    align: AlignName
    direction: Literal["ltr", "rtl"]
    """Direction of the paragraph, which decides where numbers and foreign words are in a line."""
    cuts_words: bool
    """Whether a word was longer than a line."""

    def _box(self, line: str) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of a line's ink, from its origin on the baseline."""
        return self.font.getbbox(line, anchor="ls", direction=self.direction)

    @property
    def pitch(self) -> int:
        """Pixels from one baseline to the next."""
        return round(sum(self.font.getmetrics()) * LINE_SPACING)

    def _origins(self) -> list[tuple[float, float]]:
        """Where each line's drawing starts, before the block's own corner is taken off."""
        boxes = [self._box(line) for line in self.lines]
        widest = max(right - left for left, _, right, _ in boxes)
        share = {"left": 0.0, "center": 0.5, "right": 1.0}[self.align]
        return [
            (round((widest - (right - left)) * share) - left, number * self.pitch)
            for number, (left, _, right, _) in enumerate(boxes)
        ]

    def extent(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of all ink. Marks above and below the font's own line height are counted."""
        boxes = [
            (x + left, y + top, x + right, y + bottom)
            for (x, y), (left, top, right, bottom) in zip(self._origins(), map(self._box, self.lines), strict=True)
        ]
        lefts, tops, rights, bottoms = zip(*boxes, strict=True)
        return math.floor(min(lefts)), math.floor(min(tops)), math.ceil(max(rights)), math.ceil(max(bottoms))

    def size(self, border: int) -> tuple[int, int]:
        """Width and height of what `draw` gives."""
        left, top, right, bottom = self.extent()
        return right - left + 2 * border, bottom - top + 2 * border

    def draw(self, border: int, stroke: int = 0) -> Image.Image:
        """The ink's cover of each pixel, mode L, 255 = all of it.

        Args:
            border: pixels that are kept free around the letters; `stroke` or more.
            stroke: pixels by which the letters are made fatter, for an outline.
        """
        cover = Image.new("L", self.size(border))
        drawing = ImageDraw.Draw(cover)
        left, top, _, _ = self.extent()
        for line, (x, y) in zip(self.lines, self._origins(), strict=True):
            place = (x - left + border, y - top + border)
            drawing.text(place, line, 255, self.font, "ls", direction=self.direction, stroke_width=stroke)
        return cover


def check_font(path: Path) -> None:
    """Refuses, before any work, a font that cannot be used.

    Raises:
        InputError: not a font with a table of characters, or this Pillow cannot shape text.
    """
    if not features.check("raqm"):
        raise InputError(
            "this Pillow cannot shape text (no raqm): install it from its wheels, or add libraqm and fribidi"
        )
    try:
        characters(path)
        load_font(path, MIN_FONT_SIZE)
    except (OSError, TTLibError) as error:
        raise InputError(
            f"--font {path} is not a font that can be read: {getattr(error, 'strerror', None) or error}"
        ) from None


@lru_cache(maxsize=16)
def characters(path: Path) -> frozenset[int]:
    """The code points that a font has pictures for. Of a collection it is the first font."""
    with open(path, "rb") as file, TTFont(file, fontNumber=0, lazy=True) as font:  # which leaves a bad file open
        return frozenset(font.getBestCmap() or ())


@lru_cache(maxsize=256)
def load_font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    """A font at a size in pixels per em, shaped by raqm: ligatures, joined letters, right to left."""
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.RAQM)


def missing_characters(text: str, path: Path) -> str:
    """The characters of a text that a font has no picture for, each once, in order."""
    known = characters(path)

    def drawn(character: str) -> bool:  # as HarfBuzz, which also tries the parts of a composed character
        return ord(character) in known or all(ord(part) in known for part in unicodedata.normalize("NFD", character))

    # Controls, joiners and spaces have no ink of their own.
    inked = (character for character in text if unicodedata.category(character) not in ("Cc", "Cf", "Zs"))
    return "".join(dict.fromkeys(character for character in inked if not _selector(character) and not drawn(character)))


def lay_out(text: str, path: Path, size: int, width: float, align: AlignName) -> TextBlock:
    """Breaks a text into lines of at most `width` pixels.

    Args:
        text: its line ends are kept.
        path: path of the font.
        size: pixels per em.
        width: largest width of a line, in pixels; one character is always allowed.
        align: alignment of lines shorter than the longest.
    """
    font, direction = load_font(path, size), _direction(text)

    def fits(line: str) -> bool:
        left, _, right, _ = font.getbbox(line, anchor="ls", direction=direction)
        return right - left <= width

    paragraphs = text.splitlines()
    lines = [line for paragraph in paragraphs for line in break_lines(paragraph, fits)]
    cuts_words = not all(fits(unit.strip()) for paragraph in paragraphs for unit in _units(paragraph))
    return TextBlock(tuple(lines), font, align, direction, cuts_words)


def break_lines(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Fills lines from the first, each as far as it fits; a word longer than a line is cut between letters.

    Args:
        text: one paragraph.
        fits: whether a line is short enough.
    """
    lines, line = [], ""
    for unit in _units(text):
        if fits((line + unit).strip()):
            line += unit
            continue
        if line.strip():
            lines.append(line.strip())
        *full, line = _cut(unit.lstrip(), fits)
        lines.extend(full)
    return [*lines, line.strip()] if line.strip() else lines or [""]


def _units(text: str) -> Iterator[str]:
    """What stays together: words with the space after them, and single characters of scripts without spaces."""
    unit = ""
    for letter in _clusters(text):
        if unit and _may_break(unit, letter):
            yield unit
            unit = ""
        unit += letter
    if unit:
        yield unit


def _may_break(before: str, after: str) -> bool:
    """A small part of Unicode's line breaking (UAX 14): at spaces, after hyphens, around ideographs, not inside brackets."""
    if after.isspace():
        return False
    if before[-1].isspace():
        return before[-1] not in "\N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}"
    if after[0] in NEVER_FIRST or unicodedata.category(after[0]) in ("Pe", "Pf"):
        return False
    if unicodedata.category(before[-1]) in ("Ps", "Pi"):
        return False
    after_hyphen = before[-1] in "-\N{HYPHEN}\N{EN DASH}\N{EM DASH}" and len(before) > 1 and after[0].isalpha()
    return after_hyphen or bool(IDEOGRAPHIC.match(after) or IDEOGRAPHIC.match(before[-1]))


def _cut(word: str, fits: Callable[[str], bool]) -> list[str]:
    """A word in pieces that fit, of at least one letter."""
    pieces = [""]
    for letter in _clusters(word):
        if pieces[-1] and not fits((pieces[-1] + letter).strip()):
            pieces.append("")
        pieces[-1] += letter
    return pieces


def _clusters(text: str) -> list[str]:
    """Letters with their accents, and joined emoji: what a line end may not take apart."""
    clusters: list[str] = []
    for character in text:
        joined = unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf") or _selector(character)
        if clusters and (joined or clusters[-1].endswith("\N{ZERO WIDTH JOINER}")):
            clusters[-1] += character
        else:
            clusters.append(character)
    return clusters


def _selector(character: str) -> bool:
    """Variation selectors: they choose between pictures of the character before and have none of their own."""
    return "\ufe00" <= character <= "\ufe0f" or "\U000e0100" <= character <= "\U000e01ef"


def _direction(text: str) -> Literal["ltr", "rtl"]:
    """That of the first letter which has one (Unicode's rules P2 and P3, UAX 9)."""
    kinds = map(unicodedata.bidirectional, text)
    first = next((kind for kind in kinds if kind in ("L", "R", "AL")), "L")
    return "ltr" if first == "L" else "rtl"
