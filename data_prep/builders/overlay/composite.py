"""Laying text or a picture over a photograph: how large, where, and in which colour."""

import math
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from data_prep.builders.overlay.style import ANCHORS, RGB, Style
from data_prep.builders.overlay.typography import MIN_FONT_SIZE, TextBlock, lay_out
from data_prep.rows.images import linear_light
from data_prep.rows.tables import BadRow

ENOUGH_CONTRAST = 4.5
"""WCAG 2.1, success criterion 1.4.3, for text of any size."""

ENOUGH_FOR_OUTLINE = 7.0
"""WCAG 2.1, success criterion 1.4.6: an outline is thin, and what is around it is busy."""

BUSY_SHARE = 5.0
"""Percent of a region's pixels that may have less contrast before the letters get an outline or a box."""

PALETTE: tuple[RGB, ...] = (
    (255, 255, 255),
    (0, 0, 0),
    (255, 225, 77),
    (11, 42, 111),
    (122, 10, 20),
    (11, 79, 42),
    (191, 243, 255),
    (255, 208, 220),
)
"""White, black, and colours near enough to one of them to be read on the other."""

MARGIN = 0.02
"""Space that is kept free around an overlay, as a share of the photograph's shorter side."""

BOX_COVER = 215
"""Opacity of a box behind text, out of 255."""

SAMPLE = 128
"""Pixels of the longest side of a region in which contrast is measured."""


@dataclass(frozen=True)
class Ink:
    """One thing that is laid on."""

    cover: Image.Image
    """How much of each pixel it covers, mode L, 255 = all of it."""
    colour: RGB | Image.Image
    """One for all pixels, or a picture of the cover's size."""


def add_text(photo: Image.Image, text: str, font: Path, style: Style, rng: random.Random) -> Image.Image:
    """The photograph with a text on it, as large as asked for or as fits.

    Raises:
        BadRow: it does not fit even in the smallest letters that can be read.
    """
    angle = style.rotation.draw(rng)
    block, border = _fitted(text, font, style, photo, angle, rng)
    cover = _turned(block.draw(border), angle)
    corner = _place(cover.size, photo.size, style, rng)
    region = photo.crop((*corner, corner[0] + cover.width, corner[1] + cover.height))
    colour, backing = _colours(region, style, rng)
    inks = [Ink(cover, colour)]
    if backing == "outline":
        inks.insert(0, Ink(_turned(block.draw(border, _stroke(block)), angle), _opposite(colour)))
    elif backing == "box":
        inks.insert(0, Ink(_turned(_box(block.size(border), border), angle), _opposite(colour)))
    return _compose(photo, inks, corner, style.opacity.draw(rng))


def add_picture(photo: Image.Image, overlay: Image.Image, style: Style, rng: random.Random) -> Image.Image:
    """The photograph with a picture (mode RGBA) on it, in the part of its width and height that `style` asks for."""
    angle, share = style.rotation.draw(rng), style.overlay_size.draw(rng)
    room = _room(photo.size)
    scale = min(share * photo.width / overlay.width, share * photo.height / overlay.height)
    wide, high = _turned_size(overlay.width * scale, overlay.height * scale, angle)
    scale *= min(1.0, room[0] / wide, room[1] / high)
    size = (max(1, round(overlay.width * scale)), max(1, round(overlay.height * scale)))
    small = _turned(overlay.resize(size, Image.Resampling.LANCZOS), angle)
    corner = _place(small.size, photo.size, style, rng)
    return _compose(photo, [Ink(small.getchannel("A"), small.convert("RGB"))], corner, style.opacity.draw(rng))


def contrast(colour: RGB, region: Image.Image, opacity: float = 1.0) -> float:
    """WCAG contrast, 1 to 21, of a colour laid over a region, which all but BUSY_SHARE percent of its pixels reach.

    Args:
        colour: sRGB, 0 to 255.
        region: mode RGB.
        opacity: opacity of the colour; what shines through lowers the contrast.
    """
    pixels = np.asarray(region, dtype=np.float64)
    over, under = _luminance(pixels + (np.array(colour) - pixels) * opacity), _luminance(pixels)
    # WCAG 2.1, https://www.w3.org/TR/WCAG21/#dfn-contrast-ratio: (lighter + 0.05) / (darker + 0.05)
    ratio = (np.maximum(over, under) + 0.05) / (np.minimum(over, under) + 0.05)
    return float(np.percentile(ratio, BUSY_SHARE))


def _luminance(colours: np.ndarray) -> np.ndarray:
    """Of sRGB values 0 to 255, shape (..., 3): 0 black, 1 white. https://www.w3.org/TR/WCAG21/#dfn-relative-luminance"""
    values = np.asarray(colours, dtype=np.float64) / 255
    return linear_light(values) @ np.array([0.2126, 0.7152, 0.0722])


def _colours(region: Image.Image, style: Style, rng: random.Random) -> tuple[RGB, str]:
    """A colour for letters on a region, and what goes behind them: `outline`, `box` or `none`.

    A colour that contrasts with the region needs nothing. On a busy region none does, and what is put behind the letters
    has to; which colour, and which of the two, is drawn.
    """
    sample = region.copy()
    sample.thumbnail((SAMPLE, SAMPLE), Image.Resampling.NEAREST)  # a mean would hide how busy it is
    choice = rng.sample(PALETTE, len(PALETTE)) if style.colour is None else [style.colour]
    behind = rng.choice(["outline", "box"]) if style.backing == "auto" else style.backing
    opacity = style.opacity.low
    clear = [colour for colour in choice if contrast(colour, sample, opacity) >= ENOUGH_CONTRAST]
    if style.backing == "auto" and clear:
        return clear[0], "none"
    if behind == "none":
        return max(choice, key=lambda colour: contrast(colour, sample, opacity)), "none"
    colour = (clear or choice)[0]
    thin = contrast(_opposite(colour), Image.new("RGB", (1, 1), colour)) < ENOUGH_FOR_OUTLINE
    return colour, "box" if thin and style.backing == "auto" else behind


def _opposite(colour: RGB) -> RGB:
    """Black or white, whichever contrasts more."""
    plain = Image.new("RGB", (1, 1), colour)
    return max(PALETTE[:2], key=lambda other: contrast(other, plain))


def _fitted(
    text: str, font: Path, style: Style, photo: Image.Image, angle: float, rng: random.Random
) -> tuple[TextBlock, int]:
    """The text at the size asked for, or at the largest that leaves its margins free, and the border around it."""
    room = _room(photo.size)

    def block(size: int) -> TextBlock:
        return lay_out(text, font, size, style.max_width * photo.width, style.align)

    must_cut = block(MIN_FONT_SIZE).cuts_words  # otherwise smaller letters are better than words in pieces

    def fits(size: int) -> bool:
        laid_out = block(size)
        wide, high = _turned_size(*laid_out.size(_border(size)), angle)
        return wide <= room[0] and high <= room[1] and laid_out.cuts_words <= must_cut

    largest = photo.height if style.font_size is None else round(style.font_size.draw(rng) * photo.height)
    low, high = MIN_FONT_SIZE, max(MIN_FONT_SIZE, largest)
    if not fits(low):
        raise BadRow(
            f"the text does not fit into the {photo.width}x{photo.height} photograph in letters of {low} pixels"
        )
    if fits(high):
        return block(high), _border(high)
    while high - low > 1:  # low fits, high does not
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return block(low), _border(low)


def _border(size: int) -> int:
    """Pixels around letters of a size, for an outline or a box."""
    return max(3, size // 5)


def _stroke(block: TextBlock) -> int:
    """Pixels of an outline's width."""
    return max(1, round(block.font.size / 12))


def _box(size: tuple[int, int], border: int) -> Image.Image:
    box = Image.new("L", size)
    ImageDraw.Draw(box).rounded_rectangle((0, 0, size[0] - 1, size[1] - 1), border, fill=BOX_COVER)
    return box


def _turned(image: Image.Image, angle: float) -> Image.Image:
    """Turned about its centre; a rim of nothing makes its edges smooth."""
    return ImageOps.expand(image, 1).rotate(angle, Image.Resampling.BICUBIC, expand=True) if angle else image


def _turned_size(width: float, height: float, angle: float) -> tuple[float, float]:
    """Of the upright box around a turned one; some more for its rim and for rounding."""
    sine, cosine = abs(math.sin(math.radians(angle))), abs(math.cos(math.radians(angle)))
    more = 5 if angle else 0
    return width * cosine + height * sine + more, width * sine + height * cosine + more


def _margin(size: tuple[int, int]) -> int:
    return round(MARGIN * min(size))


def _room(size: tuple[int, int]) -> tuple[int, int]:
    return size[0] - 2 * _margin(size), size[1] - 2 * _margin(size)


def _place(size: tuple[int, int], photo: tuple[int, int], style: Style, rng: random.Random) -> tuple[int, int]:
    """The upper left corner of an overlay, which stays inside the margins."""
    margin = _margin(photo)
    free = [max(0, room - side) for room, side in zip(_room(photo), size, strict=True)]
    if style.position == "random":
        x, y = (margin + rng.randint(0, left) for left in free)
        return x, y
    if isinstance(style.position, str):
        x, y = (margin + round(share * left) for share, left in zip(ANCHORS[style.position], free, strict=True))
        return x, y
    x, y = (
        min(max(round(centre * whole - side / 2), margin), margin + left)
        for centre, whole, side, left in zip(style.position, photo, size, free, strict=True)
    )
    return x, y


def _compose(photo: Image.Image, inks: list[Ink], corner: tuple[int, int], opacity: float) -> Image.Image:
    target = photo.copy()
    for ink in inks:
        cover = ink.cover.point([round(value * opacity) for value in range(256)])
        if isinstance(ink.colour, Image.Image):
            target.paste(ink.colour, corner, cover)
        else:
            target.paste(ink.colour, (*corner, corner[0] + cover.width, corner[1] + cover.height), cover)
    return target
