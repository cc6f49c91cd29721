"""Where an edit may go: masks (mode L, 255 = edited, 0 = kept) with soft rims, and what is kept put back exactly."""

from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.ndimage import distance_transform_edt
from skimage.measure import label as connected_parts

from data_prep.errors import InputError
from data_prep.model.geometry import Size, unfit
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


def focus_mask(size: Size, focus: Focus, shown: tuple[float, float] | None = None) -> Image.Image:
    """A disc: 255 up to half the radius, falling smoothly to 0 at the radius and beyond.

    Args:
        shown: height and width of the middle of the picture that the disc's place and radius are shares of; by default all of it.
    """
    height, width = shown or size
    rows, columns = np.mgrid[: size.height, : size.width].astype(np.float32) + 0.5
    across, down = size.width / 2 + (focus.x - 0.5) * width, size.height / 2 + (focus.y - 0.5) * height
    distance = np.hypot(columns - across, rows - down)
    nearness = 2 * (1 - distance / (focus.radius * min(height, width)))
    return _grey(_smooth(np.clip(nearness, 0, 1)))


@dataclass(frozen=True)
class Kept:
    """The picture that an edited part is put into."""

    picture: Image.Image
    """RGB; or RGBA, as a file with transparency has it."""
    mask: Image.Image
    """Mode L, of its size: 255 where the edit goes, 0 where every pixel is kept exactly."""
    stretched: bool = False
    """Whether what is edited shows all of the picture, stretched where their shapes differ, instead of its middle."""

    def with_edit(self, edited: Image.Image) -> Image.Image:
        """The edited picture where the mask is 255, the kept one where it is 0, and a blend between.

        The transparency of the kept one stays everywhere. What was edited is what was seen: the kept one over white.

        Args:
            edited: RGB, of any size: as `fit` would cut it out of the kept one, or as it is stretched.
        """
        if self.stretched:
            edited = edited.resize(self.picture.size, Image.Resampling.LANCZOS)
        elif edited.size != self.picture.size:
            edited = unfit(edited, Size.of(self.picture))
        if self.picture.mode != "RGBA":
            return Image.composite(edited, self.picture, self.mask)
        alpha = self.picture.getchannel("A")
        result = Image.composite(_off_white(edited, alpha), self.picture.convert("RGB"), self.mask)
        result.putalpha(alpha)
        return result


def _off_white(seen: Image.Image, alpha: Image.Image) -> Image.Image:
    """The colours that with this transparency over white are the ones seen, as far as there are any."""
    share = np.asarray(alpha, dtype=np.float32)[..., None] / 255
    colours = 255 - (255 - np.asarray(seen, dtype=np.float32)) / np.maximum(share, 1 / 255)
    return Image.fromarray(colours.round().clip(0, 255).astype(np.uint8))


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
