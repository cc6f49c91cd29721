"""Windows of two pictures, matched one by one, and the motion that most of them agree on."""

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
import scipy.fft
from PIL import Image
from skimage.filters import window

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

Grey = np.ndarray
"""float32 (H, W), about [0, 255]."""


@dataclass(frozen=True)
class Motion:
    """Content that is enlarged by `1 + zoom` about the picture's centre, then moved by (x, y) pixels."""

    x: float = 0.0
    y: float = 0.0
    zoom: float = 0.0

    def at(self, centres: np.ndarray) -> np.ndarray:
        """Displacements (N, 2) of content at these places (N, 2), all as (x, y), from the picture's centre."""
        return self.zoom * centres + (self.x, self.y)

    def then(self, other: "Motion") -> "Motion":
        """This motion first, the other after it."""
        scale = 1 + other.zoom
        return Motion(self.x * scale + other.x, self.y * scale + other.y, (1 + self.zoom) * scale - 1)


@dataclass(frozen=True)
class Windows:
    """Windows that have something in common, cut at the same places of both pictures."""

    before: np.ndarray
    """(N, side, side)"""
    after: np.ndarray
    centres: np.ndarray
    """(N, 2) as (x, y), from the picture's centre."""
    offsets: np.ndarray
    """(N, 2): how far the content has moved."""

    def misses(self, motion: Motion) -> np.ndarray:
        """Pixels by which the windows contradict a motion, (N,)."""
        return np.hypot(*(self.offsets - motion.at(self.centres)).T)

    def follow(self, motion: Motion) -> np.ndarray:
        """Which ones agree with a motion, (N,)."""
        return self.misses(motion) <= TOLERANCE


def move(grey: Grey, motion: Motion) -> Grey:
    """The source as the motion would have it; NaN where there is nothing."""
    if motion == Motion():
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


def match_windows(before: Grey, after: Grey, kept: np.ndarray | None) -> Windows | None:
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
    return Windows(cuts[0][usable][sure], cuts[1][usable][sure], centres[sure], offsets[sure])


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


def agreed_motion(windows: Windows) -> Motion | None:
    """The motion with the most followers: none, or one that two windows define together. Least squares on these."""
    offsets, centres = windows.offsets, windows.centres
    best = Motion()
    first, second = np.triu_indices(len(offsets), 1)
    apart, moved = centres[second] - centres[first], offsets[second] - offsets[first]
    zooms = (apart * moved).sum(1) / (apart**2).sum(1)
    shifts = (offsets[first] + offsets[second] - zooms[:, None] * (centres[first] + centres[second])) / 2
    misses = offsets[None] - zooms[:, None, None] * centres[None] - shifts[:, None]
    votes = ((misses**2).sum(-1) <= TOLERANCE**2).sum(1)
    winner = int(votes.argmax())
    if votes[winner] > windows.follow(best).sum():
        best = Motion(float(shifts[winner][0]), float(shifts[winner][1]), float(zooms[winner]))
    for _ in range(2):
        follow = windows.follow(best)
        if follow.sum() < max(MIN_WINDOWS, ENOUGH * len(follow)):
            return None
        best = _least_squares(offsets[follow], centres[follow])
    return best


def _least_squares(offsets: np.ndarray, centres: np.ndarray) -> Motion:
    """offset = zoom * centre + shift."""
    middle, mean = centres.mean(0), offsets.mean(0)
    spread = ((centres - middle) ** 2).sum()
    zoom = float(((centres - middle) * (offsets - mean)).sum() / spread) if spread else 0.0
    x, y = mean - zoom * middle
    return Motion(float(x), float(y), zoom)
