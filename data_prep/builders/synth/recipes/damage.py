"""What cameras and files do to photographs, for restorations."""

import io
import math

import numpy as np
from PIL import Image
from scipy.signal import fftconvolve

from data_prep.builders.synth.draft import Change, Picture, pick, to_linear, to_srgb

DEBLUR = ("Sharpen the blurred photograph", "Remove the {kind} blur", "Bring the photograph into focus")
DENOISE = ("Remove the noise", "Clean up the grainy photograph", "Denoise the picture and keep its details")
CLEAN_JPEG = (
    "Remove the JPEG compression artefacts",
    "Repair the blocky, over-compressed photograph",
    "Clean up the compression blocks",
)
UPSCALE = (
    "Restore the details of this low-resolution photograph",
    "Make the {kind}, low-resolution picture sharp",
    "Upscale the picture: bring its fine details back",
)


def blur(picture: Picture, rng: np.random.Generator) -> Change:
    """Out of focus, or moved while the shutter was open. In linear light: lamps stay bright as they smear."""
    scale = max(picture.shape) / 512
    if rng.random() < 0.5:
        kernel, kind = _disc(rng.uniform(2, 5) * scale), "out-of-focus"
    else:
        kernel, kind = _line(rng.uniform(14, 36) * scale, rng.uniform(0, math.pi)), "motion"
    reach = kernel.shape[0] // 2
    padded = np.pad(to_linear(picture), ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    blurred = fftconvolve(padded, kernel[..., None], mode="valid", axes=(0, 1))
    return Change(to_srgb(blurred.astype(np.float32)), {"kind": kind})


def noise(picture: Picture, rng: np.random.Generator) -> Change:
    """A sensor's: light comes in quanta, so its variance grows with it, and reading adds a constant one.

    Model: Foi et al., IEEE Transactions on Image Processing 17 (2008), variance = a·light + b, before the gamma curve.
    """
    light = to_linear(picture)
    quanta, read = np.exp(rng.uniform(np.log(30), np.log(250))), rng.uniform(0.004, 0.02)
    noisy = rng.poisson(light * quanta) / quanta + read * rng.standard_normal(light.shape, np.float32)
    return Change(to_srgb(noisy.astype(np.float32)))


def jpeg(picture: Picture, rng: np.random.Generator) -> Change:
    """Saved with far too low a quality."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=int(rng.integers(4, 16)), subsampling=2)
    return Change(np.asarray(Image.open(file).convert("RGB")))


def low_resolution(picture: Picture, rng: np.random.Generator) -> Change:
    """Reduced to a fraction of its size and enlarged again: smooth, or as blocks."""
    image = Image.fromarray(picture)
    factor = rng.uniform(3, 6)
    size = (max(8, round(image.width / factor)), max(8, round(image.height / factor)))
    kind, back = pick(rng, (("soft", Image.Resampling.BICUBIC), ("pixelated", Image.Resampling.NEAREST)))
    return Change(np.asarray(image.resize(size, Image.Resampling.BOX).resize(image.size, back)), {"kind": kind})


def _disc(radius: float) -> np.ndarray:
    """A lens out of focus spreads a point into a disc; its edge is smooth by a pixel."""
    reach = math.ceil(radius) + 1
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    return _normalised(np.clip(radius + 0.5 - np.hypot(x, y), 0, 1))


def _line(length: float, angle: float) -> np.ndarray:
    """The path of a point, one pixel wide; drawn large and reduced for smooth edges.

    The hand starts and stops: most of the light falls in the middle (Hann's window). At constant speed the blur would turn
    the phase of some frequencies round, which looks like a shift to whoever compares the pictures.
    """
    reach, fine = math.ceil(length / 2) + 1, 8
    y, x = np.mgrid[: (2 * reach + 1) * fine, : (2 * reach + 1) * fine] / fine - reach - 0.5 + 0.5 / fine
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    path = np.where(np.abs(along) < length / 2, np.cos(np.pi * along / length) ** 2, 0)
    line = np.where(np.abs(across) < 0.5, path, 0)
    side = 2 * reach + 1
    return _normalised(line.reshape(side, fine, side, fine).mean(axis=(1, 3)))


def _normalised(kernel: np.ndarray) -> np.ndarray:
    return kernel / kernel.sum()
