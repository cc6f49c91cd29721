"""Where an edit may go: masks (mode L, 255 = edited, 0 = kept) with soft rims, and what is kept put back exactly."""

import numpy as np
from PIL import Image
from scipy.ndimage import distance_transform_edt
from skimage.measure import label as connected_parts

from data_prep.errors import InputError
from data_prep.model.geometry import Size
from eval.request.knobs import Focus


def soft_mask(mask: Image.Image, feather: float) -> Image.Image:
    """The mask with a rim that rises smoothly from the pixels that are kept inwards: those stay exactly 0.

    In a part that is too thin for its rim, the rim is narrower, so that the part's middle can still be edited.

    Args:
        mask: mode L.
        feather: width of the rim in pixels; 0 leaves the mask as it is.
    """
    values = np.asarray(mask, dtype=np.float32) / 255
    if feather == 0 or values.all() or not values.any():
        return mask
    distance = np.asarray(distance_transform_edt(values > 0), dtype=np.float32)
    parts: np.ndarray = np.asarray(connected_parts(values > 0, connectivity=2))
    depths = np.zeros(parts.max() + 1, dtype=np.float32)
    np.maximum.at(depths, parts, distance)  # of each part's middle
    rims = np.clip(depths, 1, feather + 1)[parts]
    inside = np.clip(distance / rims, 0, 1)  # 1 on the first pixel beyond the rim
    return _grey(np.minimum(values, _smooth(inside)))


def focus_mask(size: Size, focus: Focus) -> Image.Image:
    """A disc: 255 up to half the radius, falling smoothly to 0 at the radius and beyond."""
    rows, columns = np.mgrid[: size.height, : size.width].astype(np.float32) + 0.5
    distance = np.hypot(columns - focus.x * size.width, rows - focus.y * size.height)
    nearness = 2 * (1 - distance / (focus.radius * min(size)))
    return _grey(_smooth(np.clip(nearness, 0, 1)))


def paste_back(edited: Image.Image, source: Image.Image, mask: Image.Image) -> Image.Image:
    """The edited picture where the mask is 255, the source where it is 0, exactly, and a blend between; all of one size."""
    return Image.composite(edited, source, mask)


def check_mask(mask: Image.Image, image: Image.Image) -> None:
    """Raises:
    InputError: not a mask of this image, or nothing in it may be edited.
    """
    if mask.mode != "L":
        raise InputError(f"a mask must have mode L (8-bit grey), got {mask.mode}")
    if mask.size != image.size:
        raise InputError(
            f"the mask has {mask.width}x{mask.height} pixels and the image {image.width}x{image.height}: give one of the "
            "image's size"
        )
    if mask.getbbox() is None:
        raise InputError("the mask is black everywhere, so nothing would be edited: paint the area to edit white")


def _grey(values: np.ndarray) -> Image.Image:
    """Values in [0, 1] as mode L."""
    return Image.fromarray((255 * values).round().astype(np.uint8))


def _smooth(values: np.ndarray) -> np.ndarray:
    """Smoothstep of values in [0, 1]."""
    return values * values * (3 - 2 * values)
