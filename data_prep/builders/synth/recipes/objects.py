"""Objects pasted onto a photograph with their shadows: to be inserted, removed, or put on white."""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageOps
from scipy.ndimage import gaussian_filter

from data_prep.builders.synth.draft import CutOut, Draft, NoEdit, Picture, Plane, Scene, pick, place, to_linear, to_srgb

INSERT = (
    "Add the {name} from picture 2 to the scene {where}",
    "Place the {name} of the second picture {where}, with a natural shadow",
    "Put the {name} from picture 2 {where} of picture 1",
)
REMOVE = (
    "Remove the {name} {where}",
    "Take away the {name} {where} together with its shadow",
    "Erase the {name} {where} and restore what is behind it",
)
REMOVE_UNNAMED = (
    "Remove the foreign object {where}",
    "Take away the pasted object {where} together with its shadow",
    "Erase the object {where}, which does not belong there, and restore what is behind it",
)
ON_WHITE = (
    "Cut out the {name} {where} and put it on a pure white background",
    "Show only the {name} {where}, on plain white, without its shadow",
    "Make a product picture of the {name} {where}: white background, no shadow",
)
LEAST_CONTRAST = 25
"""Smallest mean difference, out of 255, between an object and what it covers. Less is camouflage."""
REFERENCE_STEP = 32
"""Pixels; the sides of a reference picture are multiples of it."""


@dataclass(frozen=True)
class Placed:
    """An object in a picture's frame."""

    colour: Picture
    alpha: Plane
    """Coverage in [0, 1], at the picture's size."""
    where: str
    """In words."""


def insert(draft: Draft, scene: Scene) -> Draft:
    """The object appears in the target. A second source shows it on white, so that the instruction can mean it."""
    cut_out = scene.cut_out(scene.rng)
    placed = put(cut_out.picture, draft.target.shape, scene.rng)
    prompt = pick(scene.rng, INSERT).format(name=cut_out.name or "object", where=placed.where)
    changed = draft.forward(paste(draft.target, placed, scene.rng), prompt)
    return replace(changed, references=(*draft.references, reference(cut_out)))


def remove(draft: Draft, scene: Scene) -> Draft:
    """The object is in the source alone."""
    cut_out = scene.cut_out(scene.rng)
    placed = put(cut_out.picture, draft.source.shape, scene.rng)
    prompt = pick(scene.rng, REMOVE if cut_out.name else REMOVE_UNNAMED)
    return draft.backward(paste(draft.source, placed, scene.rng), prompt.format(name=cut_out.name, where=placed.where))


def on_white(draft: Draft, scene: Scene) -> Draft:
    """The source is the object on the photograph, the target the same object alone on pure white."""
    cut_out = scene.cut_out(scene.rng)
    placed = put(cut_out.picture, draft.source.shape, scene.rng, smallest=0.35, largest=0.7)
    prompt = pick(scene.rng, ON_WHITE).format(name=cut_out.name or "pasted object", where=placed.where)
    white = np.full_like(draft.source, 255)
    return replace(draft.backward(paste(draft.source, placed, scene.rng), prompt), target=_over(white, placed))


def put(
    picture: Image.Image, shape: tuple[int, ...], rng: np.random.Generator, smallest: float = 0.2, largest: float = 0.5
) -> Placed:
    """Draws an object's size, turn and place in a frame. It is never enlarged to more than 1.5 times its size.

    Args:
        picture: RGBA.
        shape: shape of the frame.
        rng: random generator of the draws.
        smallest: size of the longest side, as a share of the frame's shortest.
        largest: as `smallest`.

    Raises:
        NoEdit: it would have less than 8 pixels.
    """
    height, width = shape[:2]
    if rng.random() < 0.5:
        picture = ImageOps.mirror(picture)
    picture = picture.rotate(rng.uniform(-8, 8), Image.Resampling.BICUBIC, expand=True)
    scale = min(rng.uniform(smallest, largest) * min(height, width) / max(picture.size), 1.5)
    size = (round(picture.width * scale), round(picture.height * scale))
    if min(size) < 8:
        raise NoEdit("the object is too small or too thin for this picture")
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    left = int(rng.integers(0, width - size[0] + 1))
    top = round(rng.beta(2, 1.5) * (height - size[1]))  # things lie low more often than high
    framed = Image.new("RGBA", (width, height))
    framed.paste(picture, (left, top))
    rgba = np.asarray(framed)
    where = place((left + size[0] / 2) / width, (top + size[1] / 2) / height)
    return Placed(rgba[..., :3], rgba[..., 3].astype(np.float32) / 255, where)


def paste(picture: Picture, placed: Placed, rng: np.random.Generator) -> Picture:
    """The object over the picture, with a soft shadow. In linear light: a shadow takes away a share of the light.

    Raises:
        NoEdit: the object would hardly be seen.
    """
    shadow = _shadow(placed.alpha, rng)
    light = to_linear(picture) * (1 - shadow)[..., None]
    shaded = np.where(shadow[..., None] > 0, to_srgb(light), picture)
    pasted = _over(shaded, placed)
    if np.abs(pasted.astype(np.int16) - picture)[placed.alpha > 0.5].mean() < LEAST_CONTRAST:
        raise NoEdit("the object does not stand out from what is behind it")
    return pasted


def reference(cut_out: CutOut) -> Picture:
    """The object in the middle of a white square."""
    width, height = cut_out.picture.size
    side = -(-round(1.15 * max(width, height)) // REFERENCE_STEP) * REFERENCE_STEP
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(cut_out.picture, ((side - width) // 2, (side - height) // 2))
    return np.asarray(square.convert("RGB"))


def _over(picture: Picture, placed: Placed) -> Picture:
    """Coverage mixes light, so edges are mixed in linear light; where the object is not, nothing is touched."""
    alpha = placed.alpha[..., None]
    mixed = to_srgb(alpha * to_linear(placed.colour) + (1 - alpha) * to_linear(picture))
    return np.where(alpha > 0, mixed, picture)


def _shadow(alpha: Plane, rng: np.random.Generator) -> Plane:
    """The share of light that is taken away: a soft shadow to one side, and a narrow dark one where the object touches.

    Of a standing object the shadow is its outline laid on the ground; of a flat one, the outline moved aside.
    """
    rows, columns = np.nonzero(alpha > 0.5)
    if rows.size == 0:
        raise NoEdit("the object is all but transparent")
    size = max(np.ptp(rows), np.ptp(columns)) + 1
    bottom, lean = rows.max(), float(rng.uniform(0.25, 0.9) * pick(rng, (-1, 1)))
    if rng.random() < 0.5:
        cast = _laid(alpha, bottom, lean, flat=float(rng.uniform(0.2, 0.45)))
    else:
        cast = _moved(alpha, lean * 0.12 * size, rng.uniform(0.03, 0.1) * size)
    soft = gaussian_filter(cast, rng.uniform(0.015, 0.045) * size, truncate=3)
    contact = gaussian_filter(_moved(alpha, 0, 0.015 * size), 0.012 * size + 0.5, truncate=3)
    taken = rng.uniform(0.45, 0.7) * np.maximum(soft, 0.8 * contact)
    return np.where(taken > 0.004, taken, 0).astype(np.float32)  # less is no change in 8 bits, but for a rounding


def _laid(alpha: Plane, bottom: int, lean: float, flat: float) -> Plane:
    """The outline tipped about its lowest row: each row comes to lie `flat` times as high, moved aside by its height."""
    image = Image.fromarray(alpha)
    matrix = (1, lean, -lean * bottom, 0, 1 / flat, bottom - bottom / flat)  # from the laid outline to the standing one
    laid = image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return np.asarray(laid)


def _moved(alpha: Plane, right: float, down: float) -> Plane:
    image = Image.fromarray(alpha)
    moved = image.transform(image.size, Image.Transform.AFFINE, (1, 0, -right, 0, 1, -down), Image.Resampling.BILINEAR)
    return np.asarray(moved)
