"""How far the target's content has moved against the source's: a shift and a zoom that most of the picture agrees on.

Windows all over the picture are matched one by one by phase correlation, so that an edit spoils the windows that it covers
and no others. A shift and a zoom are then chosen that most windows agree on, and measured again after the source has been
moved by them. What no window-sized search can find is looked for in the whole picture: the zoom in the spectrum's
log-polar form, where it is a shift (Reddy and Chatterji 1996, doi:10.1109/83.506761), then the shift.
"""

import functools
import itertools
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

MAX_SIDE = 512
"""Pixels of the longest side at which pictures are compared; larger ones are reduced."""
MIN_SIDE = 48
"""Pixels. In less there are not enough windows."""
WINDOWS_ACROSS = 9
"""Along a side, at most."""
FINEST, COARSEST = 0.14, 0.02
"""Cycles per pixel: the band that is compared. Above it are noise and JPEG's blocks, below it shadows and vignettes."""
FLAT = 1.5
"""Grey levels of 255: a window whose contrast (standard deviation) is below has nothing to match."""
NOISE = 2.0
"""Grey levels of 255: below it, what a frequency says is trusted less."""
SURE = 1.6
"""How far a window's peak must stand above what unrelated pictures give."""
TOLERANCE = 0.75
"""Pixels by which a window may miss the common movement and still agree."""
MIN_WINDOWS = 5
LEAST = 0.15
"""Share of the windows with any contrast that have to be matched."""
ENOUGH = 0.5
"""Share of the matched windows that have to agree."""
FEW = 0.2
"""Share of the matched windows that may stay where they were when the rest of the picture moves."""
CLEARLY = 3.0
"""Times its windows' disagreement that a picture has to move."""
ALIKE = 0.3
"""Correlation of the windows once the source has been moved, in [-1, 1]."""
MAX_ZOOM = 0.5

Grey = np.ndarray
"""float32 (H, W), about [0, 255]."""


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


@dataclass(frozen=True)
class _Motion:
    """As `Drift`, in pixels of the comparison."""

    x: float = 0.0
    y: float = 0.0
    zoom: float = 0.0

    def at(self, centres: np.ndarray) -> np.ndarray:
        """Displacements (N, 2) of content at these places (N, 2), all as (x, y), from the picture's centre."""
        return self.zoom * centres + (self.x, self.y)

    def then(self, other: "_Motion") -> "_Motion":
        """This motion first, the other after it."""
        scale = 1 + other.zoom
        return _Motion(self.x * scale + other.x, self.y * scale + other.y, (1 + self.zoom) * scale - 1)


@dataclass(frozen=True)
class _Windows:
    """Windows that have something in common, cut at the same places of both pictures."""

    before: np.ndarray
    """(N, side, side)"""
    after: np.ndarray
    centres: np.ndarray
    """(N, 2) as (x, y), from the picture's centre."""
    offsets: np.ndarray
    """(N, 2): how far the content has moved."""

    def misses(self, motion: _Motion) -> np.ndarray:
        """Pixels by which the windows contradict a motion, (N,)."""
        return np.hypot(*(self.offsets - motion.at(self.centres)).T)

    def follow(self, motion: _Motion) -> np.ndarray:
        """Which ones agree with a motion, (N,)."""
        return self.misses(motion) <= TOLERANCE


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
    first = _match(before, after, kept)
    at_rest = first is not None and first.follow(_Motion()).mean() >= ENOUGH
    motion = _refine(before, after, kept, _Motion(), first) if first else None
    if not motion and not at_rest:
        found = (_refine(before, after, kept, start) for start in _far_motions(before, after))
        motion = next(filter(None, found), None)
    if motion and not _contradicted(first, motion):
        return Drift(motion.x / scale, motion.y / scale, motion.zoom)
    return Drift() if at_rest else None


def _contradicted(first: _Windows | None, motion: _Motion) -> bool:
    """Whether much of the picture is where it was: then something in it has moved, and not the picture."""
    if first is None:
        return False
    leaves = np.hypot(*motion.at(first.centres).T) > 2 * TOLERANCE
    return bool((leaves & first.follow(_Motion())).mean() > FEW)


def _grey(image: Image.Image, size: tuple[int, int]) -> Grey:
    return np.asarray(ImageOps.fit(image.convert("L"), size, Image.Resampling.LANCZOS), dtype=np.float32)


def _refine(
    before: Grey, after: Grey, kept: np.ndarray | None, motion: _Motion, first: _Windows | None = None
) -> _Motion | None:
    """Moves the source, matches windows and corrects the motion, until it stays; None if there is no clear one."""
    for attempt in range(4):
        windows = first if attempt == 0 and first else _match(_moved(before, motion), after, kept)
        step = windows and _agreed(windows)
        if not windows or not step:
            return None
        motion = motion.then(step)
        if np.hypot(*step.at(windows.centres).T).max() < 0.1:
            return motion if _is_clear(windows, step, motion) else None
    return None


def _is_clear(windows: _Windows, step: _Motion, motion: _Motion) -> bool:
    """Whether the picture moves by more than its windows disagree, and looks the same where it was moved to."""
    follow = windows.follow(step)
    moved = np.sqrt((motion.at(windows.centres[follow]) ** 2).sum(1).mean())
    error = np.sqrt((windows.misses(step)[follow] ** 2).mean())
    pairs = ((cut - cut.mean((1, 2), keepdims=True))[follow] for cut in (windows.before, windows.after))
    alike = [(a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum() + 1e-9) for a, b in zip(*pairs, strict=True)]
    return bool(moved > CLEARLY * error and np.median(alike) > ALIKE and abs(motion.zoom) <= MAX_ZOOM)


def _moved(grey: Grey, motion: _Motion) -> Grey:
    """The source as the motion would have it; NaN where there is nothing."""
    if motion == _Motion():
        return grey
    height, width = grey.shape
    scale, centre_x, centre_y = 1 + motion.zoom, (width - 1) / 2, (height - 1) / 2
    offset_x = centre_x - (centre_x + motion.x) / scale
    offset_y = centre_y - (centre_y + motion.y) / scale
    # Pillow samples at pixel centres: (x + 0.5) * a + c, which shifts the constant by half a pixel's scale.
    half = 0.5 - 0.5 / scale
    data = (1 / scale, 0, offset_x + half, 0, 1 / scale, offset_y + half)
    moved = Image.fromarray(grey).transform((width, height), Image.Transform.AFFINE, data, Image.Resampling.BICUBIC)
    x, y = (np.arange(n) / scale + offset for n, offset in ((width, offset_x), (height, offset_y)))
    inside = ((y >= 0) & (y <= height - 1))[:, None] & ((x >= 0) & (x <= width - 1))
    return np.where(inside, np.asarray(moved), np.float32(np.nan))


def _match(before: Grey, after: Grey, kept: np.ndarray | None) -> _Windows | None:
    """Windows all over the picture, without those that are plain, edited, or alike by chance; None if few are left."""
    side = 64 if min(after.shape) >= 128 else 32
    tops, lefts = (_starts(length, side) for length in after.shape)
    places = np.array(list(itertools.product(tops, lefts)))
    cuts = [np.stack([grey[y : y + side, x : x + side] for y, x in places]) for grey in (before, after)]
    usable = np.isfinite(cuts[0]).all((1, 2)) & (np.nan_to_num(cuts[0]).std((1, 2)) > FLAT)
    usable &= cuts[1].std((1, 2)) > FLAT
    if kept is not None:
        usable &= np.array([kept[y : y + side, x : x + side].mean() >= 0.75 for y, x in places])
    if usable.sum() < MIN_WINDOWS:
        return None
    height, width = after.shape
    centres = (places[usable][:, ::-1] + side / 2) - (width / 2, height / 2)
    offsets, sure = _offsets(cuts[0][usable], cuts[1][usable])
    if sure.sum() < max(MIN_WINDOWS, LEAST * len(sure)):
        return None
    return _Windows(cuts[0][usable][sure], cuts[1][usable][sure], centres[sure], offsets[sure])


def _starts(length: int, side: int) -> np.ndarray:
    """Where windows begin along a side: half a window apart, or more in a large picture."""
    count = min(WINDOWS_ACROSS, 1 + 2 * (length - side) // side + 2)
    return np.unique(np.linspace(0, length - side, count).round().astype(int))


@functools.cache
def _band(side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The window, the weights of the frequencies, and how often each of them stands in the whole spectrum."""
    x, y = scipy.fft.rfftfreq(side), scipy.fft.fftfreq(side)[:, None]
    squared = x**2 + y**2
    weights = np.exp(-squared / (2 * FINEST**2)) * -np.expm1(-squared / (2 * COARSEST**2))
    times = np.broadcast_to(np.where((x == 0) | (x == 0.5), 1, 2), weights.shape)  # half of it is implied
    return window("hann", (side, side)).astype(np.float32), weights.astype(np.float32), times.astype(np.float32)


def _offsets(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By how much each window (N, side, side) has moved, (N, 2) as (x, y), and whether its peak is above chance (N,)."""
    side = before.shape[-1]
    hann, weights, times = _band(side)
    spectra = [np.asarray(scipy.fft.rfft2((cut - cut.mean((1, 2), keepdims=True)) * hann)) for cut in (before, after)]
    sizes = [np.abs(spectrum) for spectrum in spectra]
    # Phases count alike, whatever the contrast, down to what rounding to 8 bits and mild noise may have made up.
    unsure = NOISE * math.sqrt((hann**2).sum())
    cross = weights * spectra[1] * spectra[0].conj() / ((sizes[0] + unsure) * (sizes[1] + unsure))
    peaks = scipy.fft.irfft2(cross, s=(side, side)) * side**2
    chance = np.sqrt(2 * math.log(side**2) * (np.abs(cross) ** 2 * times).sum((1, 2)))
    rows, columns = np.divmod(peaks.reshape(len(peaks), -1).argmax(1), side)
    every = np.arange(len(peaks))
    values = peaks[every, rows, columns]
    offsets = []
    for place, (dy, dx) in ((columns, (0, 1)), (rows, (1, 0))):
        below, above = (peaks[every, (rows + sign * dy) % side, (columns + sign * dx) % side] for sign in (-1, 1))
        curvature = below - 2 * values + above
        fine = np.divide(below - above, 2 * curvature, out=np.zeros_like(values), where=curvature < 0)
        offsets.append((place + side // 2) % side - side // 2 + np.clip(fine, -0.5, 0.5))
    return np.stack(offsets, axis=1), values > SURE * chance


def _agreed(windows: _Windows) -> _Motion | None:
    """The motion with the most followers: none, or one that two windows define together. Least squares on these."""
    offsets, centres = windows.offsets, windows.centres
    best = _Motion()
    first, second = np.triu_indices(len(offsets), 1)
    apart, moved = centres[second] - centres[first], offsets[second] - offsets[first]
    zooms = (apart * moved).sum(1) / (apart**2).sum(1)
    shifts = (offsets[first] + offsets[second] - zooms[:, None] * (centres[first] + centres[second])) / 2
    misses = offsets[None] - zooms[:, None, None] * centres[None] - shifts[:, None]
    votes = ((misses**2).sum(-1) <= TOLERANCE**2).sum(1)
    winner = int(votes.argmax())
    if votes[winner] > windows.follow(best).sum():
        best = _Motion(float(shifts[winner][0]), float(shifts[winner][1]), float(zooms[winner]))
    for _ in range(2):
        follow = windows.follow(best)
        if follow.sum() < max(MIN_WINDOWS, ENOUGH * len(follow)):
            return None
        best = _least_squares(offsets[follow], centres[follow])
    return best


def _least_squares(offsets: np.ndarray, centres: np.ndarray) -> _Motion:
    """offset = zoom * centre + shift."""
    middle, mean = centres.mean(0), offsets.mean(0)
    spread = ((centres - middle) ** 2).sum()
    zoom = float(((centres - middle) * (offsets - mean)).sum() / spread) if spread else 0.0
    x, y = mean - zoom * middle
    return _Motion(float(x), float(y), zoom)


def _far_motions(before: Grey, after: Grey) -> Iterator[_Motion]:
    """Guesses for content that has left its window: moved alone, or zoomed too."""
    yield _far_shift(before, after, 0.0)
    if zoom := _far_zoom(before, after):
        yield _far_shift(before, after, zoom)


def _far_shift(before: Grey, after: Grey, zoom: float) -> _Motion:
    zoomed = np.nan_to_num(_moved(before, _Motion(zoom=zoom)), nan=float(before.mean()))
    (y, x), *_ = phase_cross_correlation(_windowed(after), _windowed(zoomed))
    return _Motion(float(x), float(y), zoom)


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
