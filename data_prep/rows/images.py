"""Image files as people have them -> upright 8-bit RGB, or a reason why not.

Everything that reads a photograph or a mask goes through `open_image` or `open_mask`, so that the cache, validation,
the editor and the web page see the same pixels.
"""

import functools
import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import numpy as np
import pillow_heif
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

MAX_ASPECT = 100
"""Longest side over shortest. The Qwen2.5-VL image processor refuses 200, and nothing useful is beyond 100."""

MIN_SIDE = 16
"""Pixels. Anything smaller is a placeholder or a tracking pixel, not a photograph."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
"""That are read, whatever a file's name says. Pillow knows more, of which EPS runs another program (Ghostscript)."""

ANIMATED = ("GIF", "WEBP", "PNG", "TIFF")
"""Formats whose further pictures are frames or pages; those of a phone's MPO are other views for other purposes."""

MASK_TOLERANCE = 0.01
"""A mask whose aspect differs from its image's by more than this fraction belongs to another image."""


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
PROFILE_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Colour space of a profile -> Pillow's mode of the pixels that it describes."""
SAME_COLOURS = 1
"""Levels of 255. A profile that changes no colour by more is sRGB's own, and the pixels stay as they are."""

pillow_heif.register_heif_opener()

# `_check_size` rejects whatever is above this limit, with a reason; the warning would only be noise beside it.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class RejectedImage(ValueError):
    """One image file cannot be used; the rest of the dataset can. `path` and `reason` are for the report.

    Args:
        lasting: whether the contents are at fault; False: the disk or the permissions, and the next try may succeed.
    """

    def __init__(self, path: Path, reason: str, lasting: bool = True):
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason
        self.lasting = lasting


@dataclass(frozen=True)
class OpenedImage:
    """A photograph or a mask, and what was done to it."""

    image: Image.Image
    """Upright, 8-bit RGB; a mask 8-bit grey."""
    conversions: tuple[str, ...]
    """In words; none for a plain file."""


def open_image(path: str | Path) -> Image.Image:
    """Reads a photograph: EXIF rotation applied, any mode made 8-bit sRGB, transparency composited on white.

    Of an animation it is the first frame. Colours are converted from the file's ICC profile; without one they are taken for
    sRGB's, and CMYK is converted by Pillow's formula.

    Raises:
        RejectedImage: missing, unreadable, empty, truncated, not an image, too large, too small or too thin.
    """
    return inspect_image(path).image


def inspect_image(path: str | Path) -> OpenedImage:
    """`open_image`, and what it had to convert.

    Raises:
        RejectedImage: as `open_image`.
    """
    conversions: list[str] = []
    image = _decode(Path(path), conversions)
    return OpenedImage(_to_rgb(image, Path(path)), tuple(conversions))


def open_mask(path: str | Path) -> Image.Image:
    """Reads a mask as 8-bit grey (mode L), 255 = background to preserve. Transparent pixels count as 0, "edit here".

    Its values are no colours: an ICC profile is left out.

    Raises:
        RejectedImage: as `open_image`.
    """
    return inspect_mask(path).image


def inspect_mask(path: str | Path) -> OpenedImage:
    """`open_mask`, and what it had to convert.

    Raises:
        RejectedImage: as `open_image`.
    """
    conversions: list[str] = []
    image = _decode(Path(path), conversions, is_mask=True)
    grey = _composite(image, "black") if _has_alpha(image) else _to_8_bit(image, Path(path))
    return OpenedImage(grey.convert("L"), tuple(conversions))


def open_cut_out(path: str | Path) -> Image.Image:
    """Reads a picture with its transparency, mode RGBA: an object without its background, a logo. Opaque ones stay so.

    Raises:
        RejectedImage: as `open_image`.
    """
    image = _decode(Path(path), [])
    return image.convert("RGBA") if _has_alpha(image) else _to_rgb(image, Path(path)).convert("RGBA")


def open_transparent(path: str | Path) -> Image.Image | None:
    """Reads a picture with its transparency, mode RGBA; None where every pixel is opaque.

    Raises:
        RejectedImage: as `open_image`.
    """
    image = _decode(Path(path), [])
    rgba = image.convert("RGBA") if _has_alpha(image) else None
    return None if rgba is None or rgba.getchannel("A").getextrema() == (255, 255) else rgba


def check_mask_shape(mask: Image.Image, image: Image.Image, path: Path) -> None:
    """Sizes may differ, shapes may not.

    Raises:
        RejectedImage: the mask, which was read from `path`, has another aspect than its image.
    """
    aspect_ratio = (mask.width * image.height) / (mask.height * image.width)
    if abs(aspect_ratio - 1) > MASK_TOLERANCE:
        sizes = f"{image_size_text(mask)}, its image is {image_size_text(image)}"
        raise RejectedImage(path, f"the mask and its image have different shapes: {sizes}")


def file_digest(path: str | Path) -> str:
    """A hash of the file's bytes: the same for the same picture under another name or date.

    Raises:
        RejectedImage: missing, unreadable or empty. Whether it is an image is found when it is decoded.
    """
    path = Path(path)
    with _open(path) as file:
        try:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        except OSError as error:
            raise RejectedImage(path, f"cannot be read: {error}") from None


def image_suffixes() -> frozenset[str]:
    """`.jpg`, `.heic`, …: what Pillow can open, by name."""
    Image.init()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN)


def image_size_text(image: Image.Image) -> str:
    """`640x480`, width first, as people write it."""
    return f"{image.width}x{image.height}"


def linear_light(values: np.ndarray) -> np.ndarray:
    """sRGB values in [0, 1] as linear light in [0, 1]: IEC 61966-2-1."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def _open(path: Path) -> BufferedReader:
    try:
        if path.stat().st_size == 0:
            raise RejectedImage(path, "the file is empty (zero bytes)")
        return open(path, "rb")
    except FileNotFoundError:
        raise RejectedImage(path, "no such file", lasting=False) from None
    except OSError as error:  # permissions, folders, symlink loops
        raise RejectedImage(path, f"cannot be read: {error.strerror}", lasting=False) from None


def _decode(path: Path, conversions: list[str], is_mask: bool = False) -> Image.Image:
    """Decodes the whole file, so that a truncated one is found here and not later in a worker. A photograph is then sRGB."""
    try:
        with _open(path) as file, Image.open(file, formats=FORMATS) as image:
            _check_size(image, path)
            image.load()
            conversions += _conversions(image, path, "black" if is_mask else "white")
            upright = ImageOps.exif_transpose(image)
            profile = upright.info.pop("icc_profile", None)
            return _to_srgb(upright, profile, path, conversions) if profile and not is_mask else upright
    except UnidentifiedImageError:
        raise RejectedImage(path, f"not an image of a format that is read ({', '.join(FORMATS)})") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise RejectedImage(path, _bomb_reason()) from None
    except OSError as error:  # Pillow's "image file is truncated" has no number, the system's errors have one
        raise RejectedImage(path, f"cannot be read: {error}", lasting=error.errno is None) from None
    except (SyntaxError, ValueError, EOFError) as error:  # what Pillow's plugins raise for broken headers and chunks
        if isinstance(error, RejectedImage):
            raise
        raise RejectedImage(path, f"cannot be decoded: {error}") from None


def _conversions(image: Image.Image, path: Path, background: str) -> Iterator[str]:
    """What is not plain about a decoded file. What its name promises is for people only: it is read all the same."""
    promised = Image.registered_extensions().get(path.suffix.lower())
    if promised not in (None, image.format) and {promised, image.format} != {"JPEG", "MPO"}:
        yield f"its name says {promised}, it is {image.format}, and is read all the same"
    if image.mode == "LAB" or (image.mode == "CMYK" and not image.info.get("icc_profile")):
        yield f"{image.mode} made RGB without colour management"
    if image.mode == "I" or image.mode.startswith("I;16"):
        yield "16 bits made 8"
    if _has_alpha(image) and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        yield f"transparency laid on {background}"
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        yield "turned as its EXIF says, as every viewer does"
    if image.format in ANIMATED and getattr(image, "is_animated", False):
        yield "animated: the first frame"


def _check_size(image: Image.Image, path: Path) -> None:
    """Refuses what Pillow only warns about, and shapes that no bucket can hold."""
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise RejectedImage(path, _bomb_reason())
    if min(image.size) < MIN_SIDE:
        raise RejectedImage(path, f"{image_size_text(image)} is too small: both sides need {MIN_SIDE} pixels or more")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise RejectedImage(
            path, f"{image_size_text(image)} is too thin: one side is over {MAX_ASPECT} times the other"
        )


def _bomb_reason() -> str:
    return f"more than {Image.MAX_IMAGE_PIXELS} pixels (Pillow's decompression-bomb limit)"


def _to_srgb(image: Image.Image, profile: bytes, path: Path, conversions: list[str]) -> Image.Image:
    """Converts colours from an ICC profile, and says so if that cannot be done. The transparency stays."""
    image = _to_8_bit(image, path)
    try:
        mode, transform = _transform(profile)
    except (ImageCms.PyCMSError, OSError, KeyError):
        mode, transform = "", None
    if mode not in (
        ("CMYK",) if image.mode == "CMYK" else ("L", "RGB") if image.mode in ("1", "L", "LA") else ("RGB",)
    ):
        conversions.append("its ICC profile is broken or for another colour space, and is ignored")
        return image
    if transform is None:
        return image
    converted = ImageCms.applyTransform(image.convert(mode), transform)
    assert converted is not None
    converted.info.clear()  # Pillow puts sRGB's profile there
    if _has_alpha(image):
        converted.putalpha(image.convert("RGBA").getchannel("A"))
    return converted


@functools.lru_cache(maxsize=32)
def _transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """The mode of pixels that a profile describes, and the way from them to sRGB; None if they are sRGB's already.

    Raises:
        PyCMSError, OSError: the profile is broken.
        KeyError: neither of RGB nor of grey nor of CMYK.
    """
    opened = ImageCms.core.profile_frombytes(profile)
    mode = PROFILE_MODES[opened.xcolor_space]
    transform = ImageCms.buildTransform(
        *(ImageCms.ImageCmsProfile(opened), SRGB, mode, "RGB"),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    if mode == "CMYK":
        return mode, transform
    levels = np.linspace(0, 255, 18, dtype=np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(18, -1, 3)
    colours = colours if mode == "RGB" else np.arange(256, dtype=np.uint8)[None]
    converted = ImageCms.applyTransform(Image.fromarray(colours), transform)
    before = colours if mode == "RGB" else colours[..., None]
    change = np.abs(np.asarray(converted, dtype=int) - before).max()
    return mode, None if change <= SAME_COLOURS else transform


def _has_alpha(image: Image.Image) -> bool:
    return "A" in image.getbands() or "transparency" in image.info


def _to_rgb(image: Image.Image, path: Path) -> Image.Image:
    if _has_alpha(image):
        return _composite(image, "white")
    return _to_8_bit(image, path).convert("RGB")


def _composite(image: Image.Image, colour: str) -> Image.Image:
    """`image` over a plain background, mode RGB."""
    foreground = image.convert("RGBA")
    background = Image.new("RGBA", foreground.size, colour)
    return Image.alpha_composite(background, foreground).convert("RGB")


def _to_8_bit(image: Image.Image, path: Path) -> Image.Image:
    """16-bit grey scaled to 8 bits; Pillow's own `convert` would clip it to white."""
    if image.mode == "F":
        raise RejectedImage(path, "floating-point pixels have no defined range: save it with 8 or 16 bits")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    pixels = np.asarray(image).astype(np.float64).clip(0, 65535)
    return Image.fromarray(np.round(pixels / 257).astype(np.uint8))
