"""How far the target's content has moved against the source's: a shift and a zoom that most of the picture agrees on.

Windows all over the picture are matched one by one by phase correlation, so that an edit spoils the windows that it covers
and no others. A shift and a zoom are then chosen that most windows agree on, and measured again after the source has been
moved by them. What no window-sized search can find is looked for in the whole picture: the zoom in the spectrum's
log-polar form, where it is a shift (Reddy and Chatterji 1996, doi:10.1109/83.506761), then the shift.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.fft
from PIL import Image, ImageOps
from skimage.filters import window
from skimage.registration import phase_cross_correlation
from skimage.transform import warp_polar

from data_prep.check.measures.windows import (
    ENOUGH,
    FLAT,
    TOLERANCE,
    Grey,
    Motion,
    Windows,
    agreed_motion,
    match_windows,
    move,
)

MAX_SIDE = 512
"""Pixels of the longest side at which pictures are compared; larger ones are reduced."""
MIN_SIDE = 48
"""Pixels. In less there are not enough windows."""
FEW = 0.2
"""Share of the matched windows that may stay where they were when the rest of the picture moves."""
CLEARLY = 3.0
"""Times its windows' disagreement that a picture has to move."""
ALIKE = 0.3
"""Correlation of the windows once the source has been moved, in [-1, 1]."""
MAX_ZOOM = 0.5


@dataclass(frozen=True)
class Drift:
    """The target shows the source's content enlarged by `1 + zoom` about the centre, then moved by (x, y)."""

    x: float = 0.0
    """Pixels of the target, to the right."""
    y: float = 0.0
    """Pixels of the target, downwards."""
    zoom: float = 0.0
    """0.03 = 3 % larger in the target."""

    @property
    def shift(self) -> float:
        """Pixels of the target."""
        return math.hypot(self.x, self.y)


def measure_drift(source: Image.Image, target: Image.Image, preserved: Image.Image | None = None) -> Drift | None:
    """The drift between a source and its target, or None if they cannot be compared: too small, too plain, or nothing in
    common that moved as one.

    Args:
        source: any size; it is cropped and resized to the target's, as training does.
        target: RGB.
        preserved: mask (mode L, 255 = background) of what the edit leaves alone, to look there alone.
    """
    scale = min(1.0, MAX_SIDE / max(target.size))
    size = max(1, round(target.width * scale)), max(1, round(target.height * scale))
    if min(size) < MIN_SIDE:
        return None
    before, after = (_grey(image, size) for image in (source, target))
    if min(before.std(), after.std()) <= FLAT:
        return None
    kept = None if preserved is None else np.asarray(ImageOps.fit(preserved, size)) >= 128
    first = match_windows(before, after, kept)
    at_rest = first is not None and first.follow(Motion()).mean() >= ENOUGH
    motion = _refine(before, after, kept, Motion(), first) if first else None
    if not motion and not at_rest:
        found = (_refine(before, after, kept, start) for start in _far_motions(before, after))
        motion = next(filter(None, found), None)
    if motion and not _contradicted(first, motion):
        return Drift(motion.x / scale, motion.y / scale, motion.zoom)
    return Drift() if at_rest else None


def _contradicted(first: Windows | None, motion: Motion) -> bool:
    """Whether much of the picture is where it was: then something in it has moved, and not the picture."""
    if first is None:
        return False
    leaves = np.hypot(*motion.at(first.centres).T) > 2 * TOLERANCE
    return bool((leaves & first.follow(Motion())).mean() > FEW)


def _grey(image: Image.Image, size: tuple[int, int]) -> Grey:
    return np.asarray(ImageOps.fit(image.convert("L"), size, Image.Resampling.LANCZOS), dtype=np.float32)


def _refine(
    before: Grey, after: Grey, kept: np.ndarray | None, motion: Motion, first: Windows | None = None
) -> Motion | None:
    """Moves the source, matches windows and corrects the motion, until it stays; None if there is no clear one."""
    for attempt in range(4):
        windows = first if attempt == 0 and first else match_windows(move(before, motion), after, kept)
        step = windows and agreed_motion(windows)
        if not windows or not step:
            return None
        motion = motion.then(step)
        if np.hypot(*step.at(windows.centres).T).max() < 0.1:
            return motion if _is_clear(windows, step, motion) else None
    return None


def _is_clear(windows: Windows, step: Motion, motion: Motion) -> bool:
    """Whether the picture moves by more than its windows disagree, and looks the same where it was moved to."""
    follow = windows.follow(step)
    moved = np.sqrt((motion.at(windows.centres[follow]) ** 2).sum(1).mean())
    error = np.sqrt((windows.misses(step)[follow] ** 2).mean())
    pairs = ((cut - cut.mean((1, 2), keepdims=True))[follow] for cut in (windows.before, windows.after))
    alike = [(a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum() + 1e-9) for a, b in zip(*pairs, strict=True)]
    return bool(moved > CLEARLY * error and np.median(alike) > ALIKE and abs(motion.zoom) <= MAX_ZOOM)


def _far_motions(before: Grey, after: Grey) -> Iterator[Motion]:
    """Guesses for content that has left its window: moved alone, or zoomed too."""
    yield _far_shift(before, after, 0.0)
    if zoom := _far_zoom(before, after):
        yield _far_shift(before, after, zoom)


def _far_shift(before: Grey, after: Grey, zoom: float) -> Motion:
    zoomed = np.nan_to_num(move(before, Motion(zoom=zoom)), nan=float(before.mean()))
    (y, x), *_ = phase_cross_correlation(_windowed(after), _windowed(zoomed))
    return Motion(float(x), float(y), zoom)


def _far_zoom(before: Grey, after: Grey) -> float:
    """From the spectra's sizes, which a shift leaves as they are, over the logarithm of the frequency."""
    side = min(before.shape)
    spectra = []
    for grey in (before, after):
        top, left = ((length - side) // 2 for length in grey.shape)
        square = _windowed(grey[top : top + side, left : left + side])
        size = np.log1p(np.abs(scipy.fft.fftshift(scipy.fft.fft2(square))))
        polar = warp_polar(size, radius=side / 2, output_shape=(180, side), scaling="log")[:90]
        spectra.append((polar - polar.mean(0))[:, side // 3 :])
    unweighted: Any = None  # skimage's stub has forgotten this value
    (_, columns), *_ = phase_cross_correlation(*spectra, upsample_factor=20, normalization=unweighted)
    zoom = math.exp(float(columns) * math.log(side / 2) / side) - 1
    return zoom if abs(zoom) <= MAX_ZOOM else 0.0


def _windowed(grey: Grey) -> Grey:
    return (grey - grey.mean()) * window("hann", grey.shape)
