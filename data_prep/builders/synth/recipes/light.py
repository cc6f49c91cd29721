"""Light from one side, warm or cool, and colour casts. All in linear light."""

import numpy as np
from numpy.typing import NDArray

from data_prep.builders.synth.draft import Change, Picture, pick, smooth_field, to_linear, to_srgb

RELIGHT = (
    "Relight the scene with {tone} light from {side}",
    "Let {tone} light fall on the scene from {side}",
    "Change the lighting: {tone} light coming from {side}",
)
WHITE_BALANCE = (
    "Correct the {cast} colour cast",
    "Fix the white balance: the picture is too {cast}",
    "Neutralise the {cast} tint of the photograph",
)
SIDES = {
    "the left": (-1, 0),
    "the right": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
    "the upper left": (-0.7, -0.7),
    "the upper right": (0.7, -0.7),
}
TONES = {"warm": (4000, 4800), "neutral": (6500, 6500), "cool": (9500, 16000)}
"""Correlated colour temperatures in kelvin."""

XYZ_TO_SRGB = np.array([[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.2040, 1.0570]])
"""IEC 61966-2-1."""


def relight(picture: Picture, rng: np.random.Generator) -> Change:
    """Light from a side: bright and tinted there, falling off to the opposite one."""
    side, tone = pick(rng, tuple(SIDES)), pick(rng, tuple(TONES))
    fall = _ramp(picture.shape, SIDES[side]) + 0.15 * smooth_field(picture.shape, rng, 3)
    stops = np.where(fall > 0, rng.uniform(0.5, 0.9), rng.uniform(2.0, 3.0)) * fall
    lit = np.clip(0.5 + 0.5 * fall, 0, 1)[..., None]  # the far side keeps the light that was there
    tint = 1 + lit * (light_colour(rng.uniform(*TONES[tone])) - 1)
    light = to_linear(picture) * np.exp2(stops)[..., None] * tint
    return Change(to_srgb(_shoulder(light).astype(np.float32)), {"side": side, "tone": tone})


def colour_cast(picture: Picture, rng: np.random.Generator) -> Change:
    """What a camera makes of a light whose colour it mistakes: the whole picture too orange or too blue."""
    tone, cast = pick(rng, (("warm", "orange"), ("cool", "blue")))
    gain = light_colour(rng.uniform(*TONES[tone])) ** rng.uniform(0.9, 1.3)
    return Change(to_srgb(_shoulder(to_linear(picture) * gain).astype(np.float32)), {"cast": cast})


def light_colour(kelvin: float) -> NDArray[np.float64]:
    """Linear sRGB of daylight at this temperature, against 6504 K and at the same luminance: (1, 1, 1) there.

    Formula: the CIE's daylight locus, 4000 K to 25000 K (CIE 15:2004, section 3.1).
    """
    return _daylight(kelvin) / _daylight(6504)


def _daylight(kelvin: float) -> NDArray[np.float64]:
    t = 1000 / kelvin
    if kelvin <= 7000:
        x = -4.6070 * t**3 + 2.9678 * t**2 + 0.09911 * t + 0.244063
    else:
        x = -2.0064 * t**3 + 1.9018 * t**2 + 0.24748 * t + 0.237040
    y = -3.000 * x**2 + 2.870 * x - 0.275
    return XYZ_TO_SRGB @ np.array([x / y, 1, (1 - x - y) / y])


def _ramp(shape: tuple[int, ...], direction: tuple[float, float]) -> NDArray[np.floating]:
    """1 at the side that the light comes from, -1 at the opposite one."""
    y, x = np.mgrid[-1 : 1 : shape[0] * 1j, -1 : 1 : shape[1] * 1j].astype(np.float32)
    return (direction[0] * x + direction[1] * y) / (abs(direction[0]) + abs(direction[1]))


def _shoulder(light: NDArray[np.floating], knee: float = 0.7) -> NDArray[np.floating]:
    """Bends what would be brighter than white back below it, as film does, in place of clipping it."""
    over = np.maximum(light - knee, 0)
    return np.where(light > knee, knee + (1 - knee) * (1 - np.exp(-over / (1 - knee))), light)
