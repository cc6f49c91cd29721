"""Which part of a photograph a pair shows, and at what size."""

import math

import numpy as np
from PIL import Image

from data_prep.builders.synth.draft import Picture
from data_prep.rows.images import image_size_text
from data_prep.rows.tables import BadRow

STEP = 32
"""Sides are multiples of it, so that no bucket crops or resizes a pair: what is preserved stays so to the bit."""
SMALLEST = 64
"""Pixels of a pair's shortest side."""
ASPECTS = (1.0, 4 / 3, 3 / 4, 16 / 9, 9 / 16)
"""Width over height; the nearest to the photograph's is taken. Few shapes make few buckets."""
LEAST_PART = 0.6
"""Smallest share of the photograph's width or height that a random crop shows, if that many pixels are there."""


def framed(photograph: Image.Image, size: int, rng: np.random.Generator, whole: bool) -> Picture:
    """A crop of about size x size pixels in area, its sides multiples of STEP; never enlarged.

    Args:
        photograph: RGB.
        size: the square root of the area in pixels.
        rng: random generator of the draws.
        whole: as much of the photograph as the shape allows, from the middle; otherwise a random part of it.

    Raises:
        BadRow: the photograph is too small for any pair.
    """
    width, height = frame_size(photograph, size)
    if min(width, height) < SMALLEST:
        raise BadRow(f"{image_size_text(photograph)} is too small: a pair needs {SMALLEST} pixels a side")
    most = min(photograph.width / width, photograph.height / height)
    scale = most if whole else rng.uniform(max(1.0, LEAST_PART * most), most)
    spare = np.maximum((photograph.width - scale * width, photograph.height - scale * height), 0)
    left, top = spare * (0.5 if whole else rng.random(2))
    if scale == 1:  # whole pixels: there is nothing to resample
        left, top = int(left), int(top)
    box = (left, top, min(left + scale * width, photograph.width), min(top + scale * height, photograph.height))
    return np.asarray(photograph.resize((width, height), Image.Resampling.LANCZOS, box, reducing_gap=3))


def frame_size(photograph: Image.Image, size: int) -> tuple[int, int]:
    """Width and height of a pair: multiples of STEP, no larger than the photograph. 0 if it has not even one step."""
    aspect = min(ASPECTS, key=lambda aspect: abs(math.log(aspect * photograph.height / photograph.width)))
    wanted = (size * math.sqrt(aspect), size / math.sqrt(aspect))
    fit = min(1.0, photograph.width / wanted[0], photograph.height / wanted[1])
    steps = [
        min(round(fit * side / STEP), length // STEP) for side, length in zip(wanted, photograph.size, strict=True)
    ]
    return steps[0] * STEP, steps[1] * STEP
