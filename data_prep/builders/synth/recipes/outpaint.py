"""A photograph whose border is missing, to be painted anew."""

import numpy as np

from data_prep.builders.synth.draft import Change, Picture, pick

PROMPTS = (
    "Extend the picture {where}, into the empty {colour} area",
    "Continue the scene {where} so that it fills the {colour} canvas",
    "Outpaint the photograph {where}: replace the {colour} border",
)
SIDES = {
    "to the left": (1, 0, 0, 0),
    "to the right": (0, 1, 0, 0),
    "upwards": (0, 0, 1, 0),
    "downwards": (0, 0, 0, 1),
    "to the left and right": (1, 1, 0, 0),
    "upwards and downwards": (0, 0, 1, 1),
    "on all sides": (1, 1, 1, 1),
}
"""Which of left, right, top and bottom are missing."""
CANVAS = {"white": 255, "grey": 128, "black": 0}


def crop_border(picture: Picture, rng: np.random.Generator) -> Change:
    """Covers the border of one, two or all sides with a plain canvas. What is left is not touched."""
    where, colour = pick(rng, tuple(SIDES)), pick(rng, tuple(CANVAS))
    several = sum(SIDES[where]) > 1
    widths = np.array(SIDES[where]) * rng.uniform(0.1, 0.22 if several else 0.4, 4)
    height, width = picture.shape[:2]
    left, right, top, bottom = (int(x) for x in np.round(widths * (width, width, height, height)))
    cropped = np.full_like(picture, CANVAS[colour])
    kept = (slice(top, height - bottom), slice(left, width - right))
    cropped[kept] = picture[kept]
    return Change(cropped, {"where": where, "colour": colour})
