"""A grid of pictures with headings and prompts, for a validation's `grid.png` and for reports."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

CELL = 192
"""Longest side of a picture in the grid, in pixels: smaller ones are enlarged, larger ones reduced."""
PROMPT_WIDTH = 168
GAP = 10
HEADING = 28
CAPTION = 20
BACKGROUND, INK, FAINT = "#ffffff", "#1a1d21", "#6b7280"
WIDE_FONTS = ("NotoSansCJK-Regular.ttc", "msyh.ttc", "PingFang.ttc", "DejaVuSans.ttf")
"""Tried for prompts beyond Latin script, which Pillow's own font lacks."""


@dataclass(frozen=True)
class GridRow:
    """One line of the grid."""

    prompt: str
    """The instruction, written on the left."""
    pictures: Sequence[Image.Image]
    """One per column, all of one size."""
    captions: Sequence[str]
    """One per picture, written under it; may be empty."""


def draw_grid(columns: Sequence[str], rows: Sequence[GridRow]) -> Image.Image:
    """Draws the rows under their column headings.

    Raises:
        ValueError: no rows, or a row with another number of pictures or captions than there are columns.
    """
    if not rows:
        raise ValueError("a grid needs at least one row")
    for row in rows:
        if not len(row.pictures) == len(row.captions) == len(columns):
            raise ValueError(
                f"a row has {len(row.pictures)} pictures, {len(row.captions)} captions, {len(columns)} columns"
            )
    heights = [_cell_size(row.pictures[0])[1] + CAPTION + GAP for row in rows]
    canvas = Image.new("RGB", (_left(len(columns)), HEADING + GAP + sum(heights)), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for column, heading in enumerate(columns):
        draw.text((_left(column), GAP), heading, fill=INK, font=_font(15, heading))
    top = HEADING + GAP
    for row, height in zip(rows, heights, strict=True):
        _draw_row(canvas, draw, row, top)
        top += height
    return canvas


def side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size, from left to right, with a small gap."""
    width, height = pictures[0].size
    strip = Image.new("RGB", (len(pictures) * (width + GAP) - GAP, height), BACKGROUND)
    for number, picture in enumerate(pictures):
        strip.paste(picture, (number * (width + GAP), 0))
    return strip


def _draw_row(canvas: Image.Image, draw: ImageDraw.ImageDraw, row: GridRow, top: int) -> None:
    lines = "\n".join(textwrap.wrap(row.prompt, width=22, max_lines=8, placeholder=" …"))
    draw.multiline_text((GAP, top), lines, fill=INK, font=_font(14, row.prompt), spacing=5)
    for column, (picture, caption) in enumerate(zip(row.pictures, row.captions, strict=True)):
        width, height = _cell_size(picture)
        canvas.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (_left(column), top))
        draw.text((_left(column), top + height + 2), caption, fill=FAINT, font=_font(12, caption))


def _left(column: int) -> int:
    return GAP + PROMPT_WIDTH + column * (CELL + GAP)


def _cell_size(picture: Image.Image) -> tuple[int, int]:
    scale = CELL / max(picture.size)
    return round(picture.width * scale), round(picture.height * scale)


def _font(size: int, text: str) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, or one of the system's if the text needs more letters than that has."""
    for name in () if text.isascii() else WIDE_FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue  # not installed
    return ImageFont.load_default(size)
