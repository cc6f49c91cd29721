"""Rain, snow and fog over a photograph, mixed in linear light."""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from data_prep.builders.synth.draft import Change, Picture, Plane, luminance, pick, smooth_field, to_linear, to_srgb

ADD_RAIN = ("Make it rain", "Add {much} rain to the scene", "Let {much} rain fall in the picture")
REMOVE_RAIN = ("Remove the rain", "Take the rain streaks out of the photograph", "Make the {much} rain stop")
ADD_SNOW = ("Make it snow", "Add {much} snowfall to the scene", "Let {much} snow fall in the picture")
REMOVE_SNOW = ("Remove the falling snow", "Take the snowflakes out of the photograph", "Make it stop snowing")
ADD_FOG = ("Add {much} fog to the scene", "Cover the scene in {much} fog", "Make it a foggy day, with {much} fog")
REMOVE_FOG = ("Remove the fog", "Clear the {much} fog", "Dehaze the photograph")


def rain(picture: Picture, rng: np.random.Generator) -> Change:
    """Streaks that fall one way: fine ones far off, a few long ones near."""
    much, count = pick(rng, (("light", 250), ("heavy", 700)))
    scale, slant = max(picture.shape) / 512, rng.uniform(-0.35, 0.35)
    veil = np.zeros(picture.shape[:2], np.float32)
    for share, length, width in ((0.75, 16, 1), (0.25, 38, 2)):
        image = Image.new("L", (picture.shape[1], picture.shape[0]))
        draw = ImageDraw.Draw(image)
        for x, y, reach, bright in rng.uniform((-0.1, -0.1, 0.6, 80), (1.1, 1, 1.4, 200), (int(count * share), 4)):
            x, y, reach = x * picture.shape[1], y * picture.shape[0], reach * length * scale
            end = (x + (slant + rng.normal(0, 0.02)) * reach, y + reach)
            draw.line([(x, y), end], fill=int(bright), width=max(1, round(width * scale)))
        veil = np.maximum(veil, _plane(image.filter(ImageFilter.GaussianBlur(0.45 * width * scale))))
    return Change(_mixed(picture, 0.85 * veil, _sky(picture)), {"much": much})


def snow(picture: Picture, rng: np.random.Generator) -> Change:
    """Flakes of three distances: many small, some soft, a few large and out of focus."""
    much, count = pick(rng, (("light", 350), ("heavy", 1100)))
    scale = max(picture.shape) / 512
    cover = np.zeros(picture.shape[:2], np.float32)
    for share, radius, soft in ((0.7, 0.9, 0.4), (0.25, 2.0, 0.8), (0.05, 4.5, 2.2)):
        image = Image.new("L", (2 * picture.shape[1], 2 * picture.shape[0]))  # twice the size, for round flakes
        draw = ImageDraw.Draw(image)
        for x, y, size, bright in rng.uniform((0, 0, 0.6, 150), (1, 1, 1.5, 250), (int(count * share), 4)):
            x, y, size = x * image.width, y * image.height, 2 * size * radius * scale
            draw.ellipse([x - size, y - 0.9 * size, x + size, y + 0.9 * size], fill=int(bright))
        flakes = image.filter(ImageFilter.GaussianBlur(2 * soft * scale)).reduce(2)
        cover = np.maximum(cover, _plane(flakes))
    return Change(_mixed(picture, cover, np.array([0.9, 0.92, 0.95])), {"much": much})


def fog(picture: Picture, rng: np.random.Generator) -> Change:
    """Air that takes light away and adds its own, more of it the farther off, where far is up. Koschmieder's law."""
    much, density = pick(rng, (("light", rng.uniform(0.5, 0.8)), ("dense", rng.uniform(1.5, 2.2))))
    height = picture.shape[0]
    far = np.linspace(1, 0, height, dtype=np.float32)[:, None] ** rng.uniform(0.7, 1.4)
    depth = (0.25 + far) * (1 + 0.35 * smooth_field(picture.shape, rng, 4))
    air = rng.uniform(0.55, 0.75) * np.array([0.97, 1.0, 1.03])
    return Change(_mixed(picture, 1 - np.exp(-density * np.maximum(depth, 0.05)), air), {"much": much})


def _sky(picture: Picture) -> np.ndarray:
    """The light that drops scatter: of the scene's brightness, but brighter, and a little blue."""
    mean = float(luminance(to_linear(picture)).mean())
    return np.array([0.95, 1.0, 1.05]) * min(0.35 + 0.9 * math.sqrt(mean), 0.95)


def _mixed(picture: Picture, cover: Plane, light: np.ndarray) -> Picture:
    """`light` over the picture where `cover` is above zero; what rounding alone would change stays."""
    share = np.where(cover > 0.01, cover, 0)[..., None]
    mixed = to_srgb(((1 - share) * to_linear(picture) + share * light).astype(np.float32))
    return np.where(share > 0, mixed, picture)


def _plane(image: Image.Image) -> Plane:
    return np.asarray(image, dtype=np.float32) / 255
