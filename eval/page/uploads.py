"""Pictures on their way in: large ones are scaled down, and what cannot be taken is said at once."""

import tempfile
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image
from PIL.ImageFile import ImageFile

from data_prep.errors import InputError
from data_prep.rows.images import FORMATS
from eval.page.jobs import errors_in_words
from eval.page.limits import MEGA, Limits, read_picture

LARGEST = 4
"""A picture of up to so many times `Limits.max_image_pixels` is opened, and scaled down to that."""
LARGEST_JPEG = 16
"""The same of a JPEG file whose rows are stored in order: it is decoded at a half or less of its sides, so that decoding takes no
more memory than a picture of `Limits.max_image_pixels`."""
SCALES = (2, 4, 8)
"""That a JPEG file can be decoded at."""
QUALITY = 95
"""Of the JPEG file that is written."""
PREFIX = 16
"""Bytes by which Pillow's plugins know their files."""
PLAIN = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
"""Modes with 8 bits or less a channel."""


def taken(path: str | None, limits: Limits, folder: Path) -> str | None:
    """The path of a picture that edits can read: the upload itself, or a smaller one made of it. None, with a message on the
    page, if it cannot be taken.

    Args:
        path: of the upload; None stays None.
        limits: of pixels.
        folder: for what is made; served to the page.
    """
    if path is None:
        return None
    try:
        with errors_in_words("Opening the picture"):
            return str(scaled_in(Path(path), limits, folder) or path)
    except gr.Error as error:
        gr.Warning(str(error.message))
        return None


def scaled_in(path: Path, limits: Limits, folder: Path) -> Path | None:
    """Writes a picture of at most `limits.max_image_pixels` made of a larger one; None if it is small enough as it is.

    By the header: what would take too much memory is not decoded, whatever the file says of itself.

    Raises:
        InputError: it is too large to be opened, or not a picture; names the file without its folder.
    """
    opened = _opened(path)
    handle = opened and opened.fp  # decoding may take it away from the picture
    try:
        if opened and opened.width * opened.height > limits.max_image_pixels:
            return _scale(opened, path, limits.max_image_pixels, folder)
    finally:
        if handle:
            handle.close()
    read_picture(str(path), limits)  # raises in words
    return None


def _scale(opened: ImageFile, path: Path, most: int, folder: Path) -> Path:
    before = opened.width * opened.height / MEGA
    in_rows = opened.format in ("JPEG", "MPO") and "progressive" not in opened.info
    _check(opened, path.name, most * (LARGEST_JPEG if in_rows else LARGEST))
    try:
        small, options = _smaller(opened, most, in_rows)
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{path.name} cannot be read: {error}") from None
    folder.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(dir=folder)) / path.with_suffix(".jpg" if in_rows else ".png").name
    small.save(place, **options)
    after = small.width * small.height / MEGA
    gr.Info(f"{before:.3g} megapixels were scaled down to {after:.3g}.")
    return place


def _opened(path: Path) -> ImageFile | None:
    """A file with its header read and no pixel decoded. `Image.open` would refuse it above Pillow's own limit."""
    Image.init()
    with path.open("rb") as file:
        prefix = file.read(PREFIX)
    for kind in FORMATS:
        factory, accept = Image.OPEN[kind]
        if accept and accept(prefix) is True:
            file = path.open("rb")
            try:
                return factory(file, path.name)  # type: ignore[return-value]
            except (OSError, SyntaxError, ValueError, IndexError, TypeError, KeyError):
                file.close()  # another plugin may know it; as Pillow does
    return None


def _check(opened: ImageFile, name: str, most: int) -> None:
    pixels = opened.width * opened.height
    size = f"{name} has {pixels / MEGA:,.3g} megapixels ({opened.width}x{opened.height})"
    if pixels > most:
        raise InputError(f"{size}: at most {most / MEGA:,.3g} can be opened; save it smaller")
    if opened.mode not in PLAIN:
        raise InputError(f"{size} with more than 8 bits a channel: save it with 8, or smaller")


def _smaller(opened: ImageFile, most: int, in_rows: bool) -> tuple[Image.Image, dict[str, Any]]:
    """A picture of at most `most` pixels, and how it is saved: with the orientation and the colour profile of the file."""
    kept = {name: opened.info[name] for name in ("icc_profile", "exif") if opened.info.get(name)}
    pixels = opened.width * opened.height
    if in_rows:
        scale = next(each for each in SCALES if pixels <= most * each**2)
        opened.draft(None, (opened.width // scale, opened.height // scale))
        opened.load()
        small = opened if opened.width * opened.height <= most else opened.reduce(2)  # sides are rounded up
        return small, kept | {"format": "JPEG", "quality": QUALITY}
    alpha = "transparency" in opened.info or "A" in opened.getbands()
    factor = next(number for number in range(2, opened.width) if pixels <= most * number**2)
    mode = "RGBA" if alpha else "RGB"
    plain = opened if opened.mode == mode else opened.convert(mode)  # which copies even where nothing changes
    return plain.reduce(factor), kept | {"format": "PNG"}
