"""Pictures out of other containers: saved as they are where any program reads them alike, else as PNG."""

import io
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from data_prep.rows.images import open_cut_out, open_mask

MaskStyle = Literal["background", "edit", "hole"]
ENDINGS = {"PNG": ".png", "JPEG": ".jpg"}
ORIENTATION = 0x0112
"""The EXIF tag: 1 is upright."""


def ordinary_ending(data: bytes) -> str | None:
    """`.png` or `.jpg` for a still, upright, opaque 8-bit file of these kinds; None for all else, broken files too."""
    try:
        with Image.open(io.BytesIO(data), formats=list(ENDINGS)) as image:
            still, upright = getattr(image, "n_frames", 1) == 1, image.getexif().get(ORIENTATION, 1) == 1
            plain = image.mode in ("RGB", "L") and "transparency" not in image.info
            return ENDINGS[image.format or ""] if still and upright and plain else None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None


def read_mask(path: Path, style: MaskStyle) -> Image.Image:
    """A mask of somebody else's making as ours: mode L, 255 = background to preserve.

    Args:
        path: path of the mask.
        style: `background`: white is preserved, as in ours. `edit`: white is edited. `hole`: a photograph, in which
            the edited region is transparent, or pure white where the file knows no transparency.

    Raises:
        RejectedImage: as `open_image`.
    """
    if style == "background":
        return open_mask(path)
    if style == "edit":
        return open_mask(path).point([255 - value for value in range(256)])
    picture = np.asarray(open_cut_out(path))
    hole = picture[..., 3] < 255
    if not hole.any():
        hole = picture[..., :3].min(axis=-1) == 255
    return Image.fromarray(np.where(hole, 0, 255).astype(np.uint8))
