"""The one place that decides how large an image becomes: cache, training, validation, editor and web page ask here.

Sizes are height x width in pixels, in multiples of 32: 8 for the VAE, 2 for the DiT's patches, 2 to spare, as upstream.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps

if TYPE_CHECKING:  # sizes are asked for by command lines that answer before torch is there
    from torch import Tensor

MULTIPLE = 32
LATENT_CELL = 8
"""Pixels of a latent cell's side: the VAE's down-sampling factor."""
SAME_ASPECT = 0.01
"""Aspects that differ by at most this fraction agree: the rounding of a resized photograph's sides."""


class Size(NamedTuple):
    """Height and width in pixels, or in latent cells where a name says so."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"

    @classmethod
    def of(cls, image: Image.Image) -> "Size":
        """The size of a Pillow image (which says width first)."""
        return cls(image.height, image.width)

    @property
    def latent(self) -> "Size":
        """The size of this image's latents."""
        return Size(self.height // LATENT_CELL, self.width // LATENT_CELL)


@dataclass(frozen=True)
class Geometry:
    """How images are sized: the target's bucket, the references for the VAE, the references for the vision tower."""

    max_pixels: int
    """Largest area of a target, in pixels. A smaller image keeps its size, cropped to multiples of 32."""
    vision_pixels: int = 384 * 384
    """Area of what Qwen2.5-VL sees, in pixels: every image is brought to it, up or down."""
    reference_pixels: int | None = None
    """Largest area of a reference for the VAE; None: as the target, and the bridge's source takes the target's size when their
    aspects agree, so that source and target align pixel by pixel."""

    def __post_init__(self):
        for name in ("max_pixels", "vision_pixels", "reference_pixels"):
            pixels = getattr(self, name)
            if pixels is not None and pixels < MULTIPLE**2:
                raise ValueError(f"{name} must be at least {MULTIPLE**2} ({MULTIPLE}x{MULTIPLE}), got {pixels}")

    def within(self, max_pixels: int | None) -> "Geometry":
        """The same with another largest area of a target, if one is given."""
        return self if max_pixels is None else replace(self, max_pixels=max_pixels)

    def target_size(self, size: Size) -> Size:
        """The bucket of a target image of this size; also the size of its bridge source, ground truth and mask."""
        return bucket_size(size, self.max_pixels)

    def reference_size(self, size: Size) -> Size:
        """The size at which a reference image of this size is given to the VAE as `edit_latents`, but for a bridge's source."""
        return bucket_size(size, self.reference_pixels or self.max_pixels)

    def source_follows(self, source: Size, target: Size) -> bool:
        """Whether the bridge's source takes the target's size as a reference too, whatever the sizes of the two files are."""
        aspects = source.height * target.width / (source.width * target.height)
        return self.reference_pixels is None and abs(aspects - 1) <= SAME_ASPECT

    def reference_sizes(self, references: Sequence[Size], target: Size, bridge: int | None) -> tuple[Size, ...]:
        """The sizes at which a row's references are given to the VAE as `edit_latents`.

        Args:
            references: sizes of the images.
            target: size of the target image.
            bridge: which reference the bridge starts from; None where the sizes are already those of a cache.
        """
        return tuple(
            self.target_size(target)
            if place == bridge and self.source_follows(size, target)
            else self.reference_size(size)
            for place, size in enumerate(references)
        )

    def vision_size(self, size: Size) -> Size:
        """The size at which a reference is shown to Qwen2.5-VL, which was trained on one area: upstream's formula."""
        return area_size(size, self.vision_pixels)

    def shaped_size(self, size: Size, aspect: float) -> Size:
        """The size of a target with another aspect (width over height), and about as many pixels as an image of this size has."""
        own = self.target_size(size)
        height = (own.height * own.width / aspect) ** 0.5
        return bucket_size(Size(round(height), round(height * aspect)), max(self.max_pixels, own.height * own.width))

    def reference_picture(self, image: Image.Image, size: Size) -> Image.Image:
        """A reference as the VAE is given it, `size` as `reference_size` says."""
        return fit(image, size)

    def vision_picture(self, image: Image.Image, size: Size) -> Image.Image:
        """A reference as Qwen2.5-VL sees it, `size` as `vision_size` says."""
        return stretch(image, size)


@dataclass(frozen=True)
class UpstreamGeometry(Geometry):
    """Sizes as diffusers' QwenImageEditPlusPipeline has them: targets and references are brought to one area, up or down, and
    stretched (Lanczos) where their shape is not quite that of a size in multiples of 32."""

    max_pixels: int = 1024 * 1024
    """Area of a target and of a reference."""
    kind: Literal["upstream"] = "upstream"

    def target_size(self, size: Size) -> Size:
        """That of the area, with about the image's aspect."""
        return area_size(size, self.max_pixels)

    def reference_size(self, size: Size) -> Size:
        """As a target."""
        return area_size(size, self.reference_pixels or self.max_pixels)

    def source_follows(self, source: Size, target: Size) -> bool:
        """Never: every reference has a size of its own."""
        return False

    def shaped_size(self, size: Size, aspect: float) -> Size:
        """That of the area, with about the aspect."""
        return area_size(Size(1000, round(1000 * aspect)), self.max_pixels)

    def reference_picture(self, image: Image.Image, size: Size) -> Image.Image:
        """Stretched, nothing is cropped."""
        return image.resize((size.width, size.height), Image.Resampling.LANCZOS)

    def vision_picture(self, image: Image.Image, size: Size) -> Image.Image:
        """As for the VAE."""
        return self.reference_picture(image, size)


def make_geometry(values: Mapping[str, Any]) -> Geometry:
    """The geometry that `asdict` made these values of."""
    return UpstreamGeometry(**values) if "kind" in values else Geometry(**values)


def area_size(size: Size, pixels: int) -> Size:
    """The size in multiples of 32, of about so many pixels, whose aspect is about that of `size`: upstream's formula."""
    aspect = size.width / size.height
    width = math.sqrt(pixels * aspect)
    height = width / aspect
    return Size(*(max(MULTIPLE, round(side / MULTIPLE) * MULTIPLE) for side in (height, width)))


def bucket_size(size: Size, max_pixels: int) -> Size:
    """The size in multiples of 32, within `max_pixels` and within the image, whose aspect is nearest to the image's.

    It is idempotent, and never larger than the image but for sides under 32, which become 32.
    """
    scale = min(1.0, math.sqrt(max_pixels / (size.height * size.width)))
    height, width = size.height * scale, size.width * scale
    height = max(MULTIPLE, min(height, max_pixels / max(MULTIPLE, width)))
    width = max(MULTIPLE, min(width, max_pixels / height))

    def fits(candidate: Size) -> bool:
        inside = candidate.height <= max(MULTIPLE, size.height) and candidate.width <= max(MULTIPLE, size.width)
        return inside and candidate.height * candidate.width <= max_pixels

    def distance(candidate: Size) -> tuple[float, int]:
        skew = abs(math.log(candidate.height * size.width / (candidate.width * size.height)))
        return round(skew, 9), -candidate.height * candidate.width

    candidates = (Size(*sides) for sides in itertools.product(_neighbours(height), _neighbours(width)))
    return min(filter(fits, candidates), key=distance)


def _neighbours(side: float) -> tuple[int, int]:
    """The multiples of 32 below and above; an exact multiple, within rounding error, is both."""
    below = math.floor(side / MULTIPLE + 1e-9) * MULTIPLE
    return below, math.ceil(side / MULTIPLE - 1e-9) * MULTIPLE


def fit(image: Image.Image, size: Size) -> Image.Image:
    """Covers `size` and crops the centre, without stretching (Lanczos): for all that the VAE or a metric sees."""
    return ImageOps.fit(image, (size.width, size.height), method=Image.Resampling.LANCZOS)


def fitted_part(image: Size, size: Size) -> tuple[float, float]:
    """Height and width of the middle of an image that `fit` brings to `size`, in the image's pixels."""
    return min(image.height, image.width * size.height / size.width), min(
        image.width, image.height * size.width / size.height
    )


def unfit(image: Image.Image, size: Size) -> Image.Image:
    """The way back from `fit`: an image that shows the middle of another, at the other's size and place (Lanczos).

    Where `fit` had cropped, the nearest pixels repeat.

    Args:
        size: of the image that was fitted.
    """
    height, width = fitted_part(size, Size.of(image))
    across = (size.width - width) / 2 * image.width / width  # cropped on each side, in the small image's pixels
    down = (size.height - height) / 2 * image.height / height
    columns, rows = math.ceil(across), math.ceil(down)
    padded = np.pad(np.asarray(image), ((rows, rows), (columns, columns), (0, 0)), mode="edge")
    box = (columns - across, rows - down, columns + image.width + across, rows + image.height + down)
    return Image.fromarray(padded).resize((size.width, size.height), Image.Resampling.LANCZOS, box)


def fit_mask(mask: Image.Image, size: Size, stretched: bool = False) -> Image.Image:
    """`fit` for a mask (mode L, 255 = where the edit may go): each pixel is the maximum of the pixels that it covers.

    A one-pixel line survives any reduction, where an average would dissolve it.

    Args:
        stretched: nothing is cropped where the mask's shape is not that of `size`.
    """
    own = Size.of(mask)
    if own == size:
        return mask
    import torch
    from torch.nn.functional import adaptive_max_pool2d

    crop_height, crop_width = own if stretched else fitted_part(own, size)
    left, top = math.floor((mask.width - crop_width) / 2), math.floor((mask.height - crop_height) / 2)
    cropped = mask.crop((left, top, mask.width - left, mask.height - top))
    values = torch.from_numpy(np.array(cropped, dtype=np.float32))
    pooled = adaptive_max_pool2d(values[None], (size.height, size.width))[0]
    return Image.fromarray(pooled.to(torch.uint8).numpy())


def fit_back_mask(mask: Image.Image, size: Size) -> Image.Image:
    """`fit_mask` for a dataset's `back_mask` (mode L, 255 = background): the edit is what is kept whole."""
    return ImageOps.invert(fit_mask(ImageOps.invert(mask), size))


def stretch(image: Image.Image, size: Size) -> Image.Image:
    """Resizes to exactly `size` (bicubic), as upstream does for the vision tower: its rounding stretches a little."""
    return image.resize((size.width, size.height), Image.Resampling.BICUBIC)


def to_pixels(image: Image.Image) -> "Tensor":
    """An RGB image as float32 (3, H, W) in [-1, 1]."""
    import torch

    values = torch.from_numpy(np.array(image, dtype=np.uint8))
    return values.permute(2, 0, 1).float() / 127.5 - 1.0


def to_image(pixels: "Tensor") -> Image.Image:
    """Pixels (3, H, W) in [-1, 1], clamped, as an 8-bit RGB image: the inverse of `to_pixels`."""
    import torch

    values = ((pixels.detach().float().cpu() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).contiguous().numpy())


def mask_to_latent(mask: Image.Image) -> "Tensor":
    """A mask (mode L, 255 = where the edit may go, sides multiples of 8) on the latent grid: float32 (1, H/8, W/8) in [0, 1].

    Max-pooled: a latent cell of which any pixel may be edited may be edited.
    """
    import torch
    from torch.nn.functional import max_pool2d

    values = torch.from_numpy(np.array(mask, dtype=np.float32)) / 255.0
    return max_pool2d(values[None], LATENT_CELL)


def background_cells(mask: Image.Image) -> "Tensor":
    """A `back_mask` (mode L, 255 = background, sides multiples of 8) on the latent grid: float32 (1, H/8, W/8) in [0, 1].

    A cell is background as far as all of its pixels are: an edit is kept whole, in a loss that weighs background down.
    """
    return 1 - mask_to_latent(ImageOps.invert(mask))
