"""A coloured thing gets another colour, and keeps its shading."""

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from skimage.color import lab2rgb, rgb2lab

from data_prep.builders.synth.draft import Draft, NoEdit, Picture, Plane, Scene, pick, place, to_bytes
from data_prep.builders.synth.regions import Region, find_regions, soft_mask

Lab = NDArray[np.floating]

EVERYWHERE = (
    "Change everything that is {before} to {after}",
    "Turn the {before} parts of the picture {after}",
    "Recolour whatever is {before} so that it becomes {after}",
)
REGION = (
    "Change the {before} area {where} to {after}",
    "Recolour the {before} part {where}: make it {after}",
    "Make the {before} area {where} {after}",
)
UNNAMED_REGION = (
    "Change the colour of the area {where} to {after}",
    "Recolour the part {where}: make it {after}",
)
GREYS = {"black", "grey", "white"}
HUES = ((20, "pink"), (44, "red"), (82, "orange"), (112, "yellow"), (170, "green"), (225, "turquoise"), (308, "blue"))
"""Names of the hue angles in CIELAB below these degrees, for colours of middling lightness; beyond are purple and pink."""
PAINTS = {"red": (38, 65), "orange": (64, 66), "yellow": (98, 62), "green": (138, 50), "turquoise": (195, 38)}
PAINTS |= {"blue": (280, 50), "purple": (318, 55), "pink": (355, 50)}
"""Hue angle in degrees and chroma of what a thing may become."""
LEAST_DIFFERENCE = 20
"""Mean distance in CIELAB between the old colour and the new: below it both are much the same."""
TRIED = 3
"""Regions, of which the first with a colour that has a name is taken."""


@dataclass(frozen=True)
class Chosen:
    """What is to be recoloured."""

    weight: Plane
    """In [0, 1]; exactly 0 where nothing may change."""
    before: str
    """Its colour's name, if most of it has the same."""
    where: str
    """In words; empty when it is all that has this colour."""


def recolour(draft: Draft, scene: Scene) -> Draft:
    """A region, or all that has one colour. The instruction names the colours that are measured in the pictures.

    Raises:
        NoEdit: no region stands out, or the new colour does not show.
    """
    lab = _lab(draft.target)
    chosen = _choose(draft.target, lab, scene.rng)
    names = [name for name in PAINTS if name != chosen.before]
    target = _painted(draft.target, lab, chosen.weight, pick(scene.rng, names))
    painted = _lab(target)
    after = main_colour(painted, chosen.weight)
    core = chosen.weight > 0.7
    difference = np.linalg.norm(painted[core] - lab[core], axis=-1).mean() if core.any() else 0
    if not after or after == chosen.before or after in GREYS or difference < LEAST_DIFFERENCE:
        raise NoEdit("the new colour does not show")
    prompts = EVERYWHERE if not chosen.where else REGION if chosen.before else UNNAMED_REGION
    words = {"before": chosen.before, "after": after, "where": chosen.where}
    return draft.forward(target, pick(scene.rng, prompts).format(**words))


def colour_names(lab: Lab) -> NDArray[np.str_]:
    """A plain English name for each colour; the last axis is CIELAB's L, a, b."""
    lightness, chroma = lab[..., 0], np.hypot(lab[..., 1], lab[..., 2])
    hue = np.degrees(np.arctan2(lab[..., 2], lab[..., 1])) % 360
    names = np.select(
        [hue < limit for limit, _ in HUES], [name for _, name in HUES], np.where(hue < 335, "purple", "pink")
    )
    names = np.where((names == "red") & (lightness > 68), "pink", names)
    names = np.where((names == "orange") & (lightness < 52), "brown", names)
    names = np.where((names == "yellow") & (lightness < 62), "olive", names)
    names = np.where(np.isin(names, ("orange", "yellow")) & (chroma < 34) & (lightness >= 52), "beige", names)
    names = np.where((names == "red") & (chroma < 34) & (lightness < 52), "brown", names)
    greys = np.select([lightness < 22, lightness > 84], ["black", "white"], "grey")
    return np.where((chroma < 11) | (lightness < 10), greys, names)


def main_colour(lab: Lab, weight: Plane, share: float = 0.5) -> str:
    """The name that more than this share of the pixels have where `weight` is high; empty if there is no such name."""
    names, counts = np.unique(colour_names(lab[weight > 0.7]), return_counts=True)
    return str(names[counts.argmax()]) if counts.size and counts.max() > share * counts.sum() else ""


def _choose(picture: Picture, lab: Lab, rng: np.random.Generator) -> Chosen:
    regions = [region for region in find_regions(picture) if 0.02 < region.share < 0.5 and region.solidity > 0.5]
    if not regions:
        raise NoEdit("no region stands out")
    chosen = []
    for i in rng.permutation(len(regions))[:TRIED]:
        chosen.append(_chosen(picture, lab, regions[i]))
        if chosen[-1].before and chosen[-1].before not in GREYS:
            return chosen[-1]
    return chosen[0]


def _chosen(picture: Picture, lab: Lab, region: Region) -> Chosen:
    weight = soft_mask(picture, region)
    before = main_colour(lab, weight)
    if before not in GREYS and before:
        everywhere = _alike(lab, weight)
        if 0.02 < everywhere.mean() < 0.6 and main_colour(lab, everywhere, 0.65) == before:
            return Chosen(everywhere, before, "")
    return Chosen(weight, before, place(*region.centre))


def _alike(lab: Lab, weight: Plane) -> Plane:
    """How much each pixel has the region's hue and saturation, the whole picture over: not the skin beside an orange suit."""
    a, b = np.average(lab[..., 1:], axis=(0, 1), weights=np.broadcast_to(weight[..., None], (*weight.shape, 2)))
    chroma = np.hypot(lab[..., 1], lab[..., 2])
    cosine = (lab[..., 1] * a + lab[..., 2] * b) / np.maximum(chroma * np.hypot(a, b), 1e-6)
    near, far = np.cos(np.radians((24, 38)))  # degrees of hue
    saturation = chroma / np.maximum(lab[..., 0], 15)
    usual = float(np.average(saturation, weights=weight))
    rough = np.clip((cosine - far) / (near - far), 0, 1) * np.clip((chroma - 9) / 8, 0, 1)
    rough *= np.clip((saturation / max(usual, 1e-6) - 0.45) / 0.15, 0, 1)
    smooth = gaussian_filter(rough, 1.2, truncate=3)
    return np.clip((smooth - 0.08) / 0.84, 0, 1).astype(np.float32)


def _lab(picture: Picture) -> Lab:
    return rgb2lab(picture.astype(np.float32) / 255)  # in float32, at half the time


def _painted(picture: Picture, lab: Lab, weight: Plane, paint: str) -> Picture:
    """Turns the hue and scales the chroma; lightness, and with it shading and texture, stays."""
    hue, wanted = PAINTS[paint]
    a, b = (np.average(lab[..., i], weights=weight) for i in (1, 2))
    chroma = float(np.hypot(a, b))
    direction = np.array([np.cos(np.radians(hue)), np.sin(np.radians(hue))])
    if chroma > 12:
        turn, scale = np.radians(hue) - np.arctan2(b, a), float(np.clip(wanted / chroma, 0.8, 2))
        rotation = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        colours = lab[..., 1:] @ rotation.T
    else:  # a grey thing has no hue to turn: the paint's, less of it in black and in white
        strength = wanted * np.clip(4 * lab[..., 0] * (105 - lab[..., 0]) / 105**2, 0, 1)
        colours = strength[..., None] * direction + lab[..., 1:]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*negative Z values.*")  # out of gamut: clipped, as it should be
        painted = lab2rgb(np.dstack([lab[..., 0], colours]).astype(np.float32))
    before = picture.astype(np.float32) / 255
    mixed = to_bytes(before + weight[..., None] * (painted - before))
    return np.where(weight[..., None] > 0, mixed, picture)
