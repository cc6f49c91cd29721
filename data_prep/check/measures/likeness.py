"""Whether source and target are one picture: equal, saved again as a JPEG, hardly different, or turned."""

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy.fft
from PIL import ExifTags, Image, ImageChops, ImageStat, JpegImagePlugin

from data_prep.check.measures.drift import measure_drift
from data_prep.rows.images import FORMATS

Alike = Literal["equal", "target_saved_again", "source_saved_again", "nearly"]
"""How two pictures that nobody can tell apart are related."""
Turn = Literal["90", "180", "270", "mirrored"]
"""What was done to a source, in degrees clockwise; or left and right have changed places."""

SAME = 2
"""Grey levels of 255: pictures that differ nowhere by more are the same."""
NEARLY = 2.0
"""Root mean square of the difference, in grey levels (a PSNR of 42 dB), and the most by which means over 16 x 16 pixels may
differ. Of 200 edits, blurs and noise of the faintest kinds among them, none has less."""
CELL, CELLS = 8, 256
"""Pixels of the side of one of JPEG's blocks, and the blocks along a side that are looked at, in the picture's middle."""
ROUNDING = 1.0
"""What a coefficient may differ by beside its quantisation, in grey levels."""
EXPLAINED, LEFT, MEANS = 0.992, 27.0, 1.5
"""The share of the coefficients that differ by no more; the most that is left of a block's other ones (root of the sum of their
squares, grey levels); and by how much means over 16 x 16 pixels may differ, in what quantisation does to them. Saturated
colours, which are clipped, need this room. Of 672 crops that were saved again (qualities 95 to 30) 654 pass, and
the others are of one photograph; of 1152 edits that were saved as JPEGs none but 4 of the faintest do, which blur, sharpen or
lighten a picture with little detail. A spot of 6 pixels that differs by 25 levels does not."""
CANDIDATE = 16.0
"""Root mean square of a difference that compression can make, in grey levels."""
TURNS: dict[Turn, Image.Transpose] = {
    "90": Image.Transpose.ROTATE_270,  # Pillow counts the other way round
    "180": Image.Transpose.ROTATE_180,
    "270": Image.Transpose.ROTATE_90,
    "mirrored": Image.Transpose.FLIP_LEFT_RIGHT,
}
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""EXIF's orientation -> how an upright picture lies in the file."""
THUMBNAIL = 32
TURNED, CLEARLY = 0.7, 0.2
"""Correlation in [-1, 1] of thumbnails from which on a turn is looked at, and how far above that of the source as it is."""


@dataclass(frozen=True)
class Compression:
    """How a JPEG file rounds the coefficients of its blocks; nothing of it for another file."""

    steps: np.ndarray
    """Of luminance, (8, 8), in grey levels."""
    colour_step: float
    """Of the mean of a block of chrominance."""
    sampling: int
    """Pillow's number for how chrominance is reduced."""
    orientation: int
    """EXIF's: how the blocks lie."""

    @property
    def coarseness(self) -> float:
        """0 for a file that is no JPEG."""
        return float(self.steps.sum())

    @classmethod
    def of(cls, path: Path) -> "Compression":
        """Reads the file's head."""
        with Image.open(path, formats=FORMATS) as file:
            tables: dict[int, Any] = getattr(file, "quantization", {}) if file.format in ("JPEG", "MPO") else {}
            sampling = JpegImagePlugin.get_sampling(file) if tables else 0
            steps = np.array(tables.get(0, [0] * CELL**2), dtype=np.float64).reshape(CELL, CELL)
            colour = float(tables.get(1, [0])[0])
            return cls(steps, colour, sampling, file.getexif().get(ExifTags.Base.Orientation, 1))


def alike(source: Image.Image, target: Image.Image, source_file: Path, target_file: Path) -> Alike | None:
    """How a pair is one picture, or None.

    A picture is another one saved again as a JPEG (by any program, or both are of a third) when what they differ by is their
    rounding: each coefficient of a block of 8 x 8 pixels differs by half a quantisation step of each file at most. The one with
    the larger steps is the one that was saved again.

    Args:
        source, target: upright, RGB.
    """
    if source.size != target.size:
        return None
    difference = ImageChops.difference(source, target)
    if _most(difference) <= SAME:
        return "equal"
    size = _size(difference)
    before, after = Compression.of(source_file), Compression.of(target_file)
    if size <= CANDIDATE and max(before.coarseness, after.coarseness):
        pair = (source, before), (target, after)
        target_is_coarser = after.coarseness >= before.coarseness
        finer, coarser = pair if target_is_coarser else reversed(pair)
        if _is_saved_again(*finer, *coarser):
            return "target_saved_again" if target_is_coarser else "source_saved_again"
    return "nearly" if size <= NEARLY and _block_means(source, target) <= NEARLY else None


def _is_saved_again(finer: Image.Image, its: Compression, picture: Image.Image, compression: Compression) -> bool:
    """Whether the rounding of both files explains all that they differ by. `picture` is the one with the larger steps."""
    if compression.orientation in STORED:
        finer, picture = (image.transpose(STORED[compression.orientation]) for image in (finer, picture))
    finer = _with_reduced_colours(finer, compression.sampling)
    # A mean differs by half a step of luminance and of chrominance, of which a channel takes up to 1.8; a step is of 8 times it.
    mean_step = sum(each.steps[0, 0] + 1.8 * each.colour_step for each in (its, compression)) / (2 * CELL)
    if _block_means(finer, picture) > MEANS * (mean_step + ROUNDING):
        return False
    allowed = (its.steps + compression.steps) / 2 + ROUNDING
    left = np.maximum(np.abs(_coefficients(finer) - _coefficients(picture)) - allowed, 0)
    return bool((left == 0).mean() >= EXPLAINED and np.sqrt((left**2).sum((2, 3)).max()) <= LEFT)


def _with_reduced_colours(image: Image.Image, sampling: int) -> Image.Image:
    """What a JPEG makes of a picture but for its quantisation: saturated colours are clipped when chrominance is reduced."""
    file = io.BytesIO()
    image.save(file, "JPEG", qtables={number: [1] * CELL**2 for number in (0, 1)}, subsampling=sampling)
    return Image.open(file).convert("RGB")


def _coefficients(image: Image.Image) -> np.ndarray:
    """Of the luminance of JPEG's blocks, (rows, columns, 8, 8), in grey levels."""
    cells = [side // CELL for side in (image.height, image.width)]
    taken = [min(each, CELLS) for each in cells]
    top, left = ((all_ - some) // 2 * CELL for all_, some in zip(cells, taken, strict=True))
    box = (left, top, left + taken[1] * CELL, top + taken[0] * CELL)
    values = np.asarray(image.crop(box).convert("L"), dtype=np.float32)
    blocks = values.reshape(taken[0], CELL, taken[1], CELL).transpose(0, 2, 1, 3)
    return np.asarray(scipy.fft.dctn(blocks, axes=(2, 3), norm="ortho"))


def turn_between(source: Image.Image, target: Image.Image) -> Turn | None:
    """How the target is turned against its source, or None if it is not: the turn whose thumbnail is most like the target's, if
    the turned source then agrees with the target window by window, as `measure_drift` sees it.

    Of 1024 turned pairs with edits 89 % are found so, none of 256 upright ones, and none of 992 of other photographs.
    """
    before, after = _thumbnail(source), _thumbnail(target)
    upright = _correlation(before, after)
    found: dict[Turn, float] = {turn: _correlation(before.transpose(how), after) for turn, how in TURNS.items()}
    turn = max(found, key=lambda each: found[each])
    if found[turn] < max(TURNED, upright + CLEARLY):
        return None
    return turn if measure_drift(source.transpose(TURNS[turn]), target) else None


def _thumbnail(image: Image.Image) -> Image.Image:
    """Grey, and square whatever the picture's shape: a turn by 90 degrees changes that."""
    return image.convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)


def _correlation(a: Image.Image, b: Image.Image) -> float:
    """In [-1, 1], 0 where one of them is plain."""
    x, y = (np.asarray(image, dtype=np.float64) for image in (a, b))
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / size) if size else 0.0


def _block_means(a: Image.Image, b: Image.Image) -> int:
    """The most by which means over 16 x 16 pixels differ, in any channel, grey levels."""
    return _most(ImageChops.difference(a.reduce(16), b.reduce(16)))


def _most(difference: Image.Image) -> int:
    extrema: Any = difference.getextrema()  # a pair for each of several channels, which these all have
    return max(high for _, high in extrema)


def _size(difference: Image.Image) -> float:
    """Root mean square over all pixels and channels."""
    return math.sqrt(sum(value**2 for value in ImageStat.Stat(difference).rms) / len(difference.getbands()))
