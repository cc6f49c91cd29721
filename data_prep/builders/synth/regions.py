"""Regions of a photograph that belong together, with edges that follow the picture's."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import binary_fill_holes, uniform_filter
from skimage.measure import label, regionprops
from skimage.segmentation import felzenszwalb

from data_prep.builders.synth.draft import Picture, Plane, luminance, resize_plane, to_linear

SMALL = 160
"""Pixels of the longest side when regions are looked for: details only cost time."""
LEAST_SHARE = 0.015
"""Share of the photograph's area: smaller regions are of no use to any recipe."""


@dataclass(frozen=True)
class Region:
    """A connected part of a photograph."""

    small: NDArray[np.bool_]
    """Where it is, in the small picture."""
    share: float
    """Share of the photograph's area, in (0, 1]."""
    solidity: float
    """Area over the area of its convex hull: 1 is round, little is ragged."""
    elongation: float
    """Long axis over short axis, 1 and above."""
    inside: bool
    """It does not touch the photograph's edges, beyond a corner of it."""
    centre: tuple[float, float]
    """x and y in [0, 1]."""


def find_regions(picture: Picture, scale: float = 150.0) -> list[Region]:
    """The regions of the graph-based segmentation, holes filled; small ones are left out.

    Args:
        picture: the photograph.
        scale: larger values give larger regions. Method: Felzenszwalb and Huttenlocher, IJCV 2004.
    """
    image = Image.fromarray(picture)
    image.thumbnail((SMALL, SMALL), Image.Resampling.BOX)
    labels = felzenszwalb(np.asarray(image), scale=scale, sigma=0.8, min_size=image.width * image.height // 150)
    large = np.flatnonzero(np.bincount(labels.ravel()) > LEAST_SHARE * labels.size)
    return [_region(labels == number) for number in large]


def soft_mask(picture: Picture, region: Region, radius: int = 4) -> Plane:
    """How much each pixel belongs to the region, in [0, 1]: exactly 0 outside, with edges where the picture has them."""
    guide = np.sqrt(luminance(to_linear(picture)))
    rough = resize_plane(region.small.astype(np.float32), picture.shape)
    return np.clip((_guided(guide, rough, radius * max(picture.shape) // SMALL, 1e-3) - 0.25) / 0.5, 0, 1)


def _region(mask: NDArray[np.bool_]) -> Region:
    largest = max(regionprops(label(binary_fill_holes(mask))), key=lambda part: part.area)
    mask = np.zeros_like(mask)
    mask[largest.slice] = largest.image
    rim = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    y, x = largest.centroid
    return Region(
        small=mask,
        share=float(mask.mean()),
        solidity=float(largest.solidity),
        elongation=float(largest.axis_major_length / max(largest.axis_minor_length, 1)),
        inside=rim.mean() < 0.01,
        centre=(x / mask.shape[1], y / mask.shape[0]),
    )


def _guided(guide: Plane, values: Plane, radius: int, epsilon: float) -> Plane:
    """The guided filter: `values` smoothed where `guide` is smooth, stepped where it steps (He et al., ECCV 2010)."""

    def mean(plane: Plane) -> Plane:
        return uniform_filter(plane, 2 * radius + 1, mode="nearest")

    mean_guide, mean_values = mean(guide), mean(values)
    slope = (mean(guide * values) - mean_guide * mean_values) / (mean(guide * guide) - mean_guide**2 + epsilon)
    return mean(slope) * guide + mean(mean_values - slope * mean_guide)
