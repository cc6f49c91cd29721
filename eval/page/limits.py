"""What the page accepts, and to whom it may be open: checked before anything is decoded, loaded or bound."""

import ipaddress
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from data_prep.errors import InputError
from data_prep.rows.images import FORMATS, RejectedImage, open_cut_out, open_image
from eval.request.request import MAX_PIXELS

MEGA = 1_000_000
CANVAS = 800
"""Longest side of the picture that is painted on, in pixels; strokes are scaled to the source."""


@dataclass(frozen=True)
class Limits:
    """Of one upload and one edit."""

    max_upload_mb: int = 50
    """Size of a file, in units of 2²⁰ bytes, as browsers say it."""
    max_image_pixels: int = 40 * MEGA
    """Width times height of an image as edits take it; `uploads.scaled_in` makes larger ones smaller as they arrive."""
    max_count: int = 4
    """Pictures of one edit."""

    def __post_init__(self):
        for name in ("max_upload_mb", "max_image_pixels", "max_count"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")

    @property
    def max_upload_bytes(self) -> int:
        """The same in bytes."""
        return self.max_upload_mb * 2**20

    def apply(self) -> None:
        """Makes the limit and the formats Pillow's own as well, for whatever decodes an image by another way than
        `read_picture`: Gradio does so with what is painted. Results can be larger than what is taken in."""
        Image.init()
        Image.ID[:] = [kind for kind in Image.ID if kind in FORMATS]
        Image.MAX_IMAGE_PIXELS = max(self.max_image_pixels, MAX_PIXELS)


class TooLarge(InputError):
    """A picture has more pixels than are taken."""


def read_picture(path: str, limits: Limits) -> Image.Image:
    """An uploaded picture, upright and RGB.

    Raises:
        TooLarge: it has too many pixels.
        InputError: too small, or not a picture; names the file without its folder.
    """
    return _read(path, limits, open_image)


def read_alpha(path: str, limits: Limits) -> Image.Image:
    """How opaque an uploaded picture is, upright and in mode L: 0 where it is transparent, 255 everywhere of one that has no
    transparency.

    Raises:
        TooLarge, InputError: as `read_picture`.
    """
    return _read(path, limits, open_cut_out).getchannel("A")


def _read(path: str, limits: Limits, opened: Callable[[str], Image.Image]) -> Image.Image:
    name = Path(path).name
    try:
        with Image.open(path, formats=FORMATS) as header:  # reads no pixels
            width, height = header.size
        if width * height > limits.max_image_pixels:
            most = f"{limits.max_image_pixels / MEGA:g}"
            raise TooLarge(
                f"{name} has {width * height / MEGA:.1f} megapixels ({width}x{height}); at most {most} megapixels are allowed"
            )
        return opened(path)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        most = f"{limits.max_image_pixels / MEGA:g}"
        raise TooLarge(f"{name} has far more pixels than the {most} megapixels that are taken") from None
    except RejectedImage as error:
        raise InputError(f"{name}: {error.reason}") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name} is not an image that can be read: choose a PNG, JPEG or WebP file") from None


def parse_auth(text: str | None) -> tuple[str, str] | None:
    """`USER:PASSWORD`; None stays None.

    Raises:
        InputError: a part is missing. The message does not repeat the password.
    """
    if not text:
        return None
    user, _, password = text.partition(":")
    if not (user and password):
        raise InputError("--auth must look like USER:PASSWORD, with both parts")
    return user, password


def api_key_for(given: str | None) -> str:
    """The key that the API asks for: the given one, or one that nobody can guess.

    Raises:
        InputError: it cannot be sent in a header.
    """
    if not given:
        return secrets.token_urlsafe(24)
    if not (given.isascii() and given.isprintable()) or " " in given:
        raise InputError("--api-key must be letters, digits and signs of ASCII, without spaces")
    return given


def check_exposure(host: str, share: bool, auth: tuple[str, str] | None) -> None:
    """Nobody but this machine without a password.

    Raises:
        InputError: others could reach the page, and no password is set.
    """
    if auth:
        return
    if share:
        raise InputError("--share makes the page public: give --auth USER:PASSWORD too")
    if not is_loopback(host):
        raise InputError(f"--host {host} lets other machines in: give --auth USER:PASSWORD too, or leave --host out")


def is_loopback(host: str) -> bool:
    """Whether an address is this machine alone. Names other than localhost are not looked up: they count as not."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_port(host: str, port: int) -> None:
    """Finds out before a model is opened.

    Raises:
        InputError: the port is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server itself: a port just left is free
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(f"cannot serve on {host} port {port} ({reason}): choose another with --port") from None
