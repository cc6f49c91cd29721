"""Objects to paste: RGBA files, or pieces cut out of other photographs."""

import re
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import binary_erosion, gaussian_filter

from data_prep.builders.synth.draft import CutOut, NoEdit, Picture, Plane, pick
from data_prep.builders.synth.regions import Region, find_regions, soft_mask
from data_prep.rows.images import RejectedImage, open_cut_out, open_image

LARGEST = 512
"""Pixels of the longest side of a photograph that something is cut from."""


@lru_cache(maxsize=32)
def load_object(path: Path) -> CutOut:
    """An object that comes without its background, cropped to what is visible, named by its file.

    Raises:
        RejectedImage: cannot be read, or nothing of it is transparent, or everything.
    """
    picture = open_cut_out(path)
    alpha = np.asarray(picture.getchannel("A"))
    box = Image.fromarray((alpha > 8).astype(np.uint8)).getbbox()
    if box is None or min(box[2] - box[0], box[3] - box[1]) < 8:
        raise RejectedImage(path, "nothing of it is visible: an object needs a few opaque pixels")
    if alpha.min() > 250:
        raise RejectedImage(path, "it has no transparent background: objects are cut-outs with an alpha channel")
    return CutOut(picture.crop(box), object_name(path.stem))


def object_name(stem: str) -> str:
    """What a file name says: `red_mug-02` is a "red mug", and `IMG_2041` says nothing."""
    words = re.findall(r"[^\W\d_]+", stem)
    known = [word for word in words if word.lower() not in {"img", "dsc", "image", "object", "cutout", "copy", "png"}]
    return " ".join(known).lower() if sum(map(len, known)) > 2 else ""


def cut_from(path: Path, rng: np.random.Generator) -> CutOut:
    """Something that was cut out of a photograph: a compact region of it, or a piece of smooth outline.

    Raises:
        RejectedImage: the photograph cannot be read.
        NoEdit: what came out is all but empty.
    """
    picture, regions = _segmented(path)
    fit = [region for region in regions if _is_object(region)]
    alpha = _feathered(soft_mask(picture, pick(rng, fit))) if fit else _smooth_outline(picture, rng)
    box = Image.fromarray((alpha > 0.03).astype(np.uint8)).getbbox()
    if box is None or min(box[2] - box[0], box[3] - box[1]) < 16:
        raise NoEdit("too little is left of the region that was cut out")
    rgba = np.dstack([picture, np.round(255 * alpha).astype(np.uint8)])
    return CutOut(Image.fromarray(rgba).crop(box))


def _is_object(region: Region) -> bool:
    """It may pass for a thing: not too large, not cut off by the photograph's edge, and compact."""
    return region.share < 0.3 and region.inside and region.solidity > 0.8 and region.elongation < 2.5


@lru_cache(maxsize=16)
def _segmented(path: Path) -> tuple[Picture, list[Region]]:
    image = open_image(path)
    image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    picture = np.asarray(image)
    return picture, find_regions(picture, scale=250.0)


def _feathered(alpha: Plane) -> Plane:
    """A pixel less all round, where background shines through, and soft edges."""
    core = binary_erosion(alpha > 0.5, iterations=2)
    return np.clip(gaussian_filter(core.astype(np.float32), 0.8, truncate=2.5), 0, 1)


def _smooth_outline(picture: Picture, rng: np.random.Generator) -> Plane:
    """A superellipse with a wavy rim somewhere in the picture, like a pebble: |x|^n + |y|^n < 1 (Lamé's curve)."""
    height, width = picture.shape[:2]
    reach = rng.uniform(0.15, 0.3, 2) * min(height, width)
    centre = rng.uniform(reach * 1.3, np.array([width, height]) - reach * 1.3)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x, y = (x - centre[0]) / reach[0], (y - centre[1]) / reach[1]
    angle, power = np.arctan2(y, x), rng.uniform(1.8, 4)
    waves = sum(rng.uniform(0, 0.12) / k * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in (1, 2, 3))
    distance = (np.abs(x) ** power + np.abs(y) ** power) ** (1 / power) - waves
    return np.clip((1 - distance) * reach.min() / 1.5, 0, 1)
