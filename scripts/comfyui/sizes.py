"""How large pictures become, as the adapter was trained: sizes are (height, width) in pixels, in multiples of 32."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

MULTIPLE = 32
SAME_ASPECT = 0.01
"""Aspects that differ by at most this fraction agree."""


@dataclass(frozen=True)
class Geometry:
    """The adapter's sizes, from its header."""

    max_pixels: int = 1024 * 1024
    """Largest area of the result."""
    vision_pixels: int = 384 * 384
    """Area of what the text encoder sees of each picture."""
    reference_pixels: int | None = None
    """Largest area of a reference; None: as the result."""

    def result_size(self, size):
        """The size of the result of a source of this size, and of where the bridge starts."""
        return bucket_size(size, self.max_pixels)

    def source_size(self, size):
        """The size of the source as a reference."""
        return self.result_size(size) if self.reference_pixels is None else self.reference_size(size)

    def reference_size(self, size):
        """The size of another reference."""
        return bucket_size(size, self.reference_pixels or self.max_pixels)

    def vision_size(self, size):
        """The size that the text encoder is shown."""
        width = math.sqrt(self.vision_pixels * size[1] / size[0])
        height = width * size[0] / size[1]
        return tuple(max(MULTIPLE, round(side / MULTIPLE) * MULTIPLE) for side in (height, width))


def bucket_size(size, max_pixels):
    """In multiples of 32, within `max_pixels` and within the picture, the size whose aspect is nearest to the picture's."""
    scale = min(1.0, math.sqrt(max_pixels / (size[0] * size[1])))
    height, width = size[0] * scale, size[1] * scale
    height = max(MULTIPLE, min(height, max_pixels / max(MULTIPLE, width)))
    width = max(MULTIPLE, min(width, max_pixels / height))

    def fits(candidate):
        inside = all(side <= max(MULTIPLE, own) for side, own in zip(candidate, size, strict=True))
        return inside and candidate[0] * candidate[1] <= max_pixels

    def distance(candidate):
        skew = abs(math.log(candidate[0] * size[1] / (candidate[1] * size[0])))
        return round(skew, 9), -candidate[0] * candidate[1]

    return min(filter(fits, itertools.product(_neighbours(height), _neighbours(width))), key=distance)


def _neighbours(side):
    return math.floor(side / MULTIPLE + 1e-9) * MULTIPLE, math.ceil(side / MULTIPLE - 1e-9) * MULTIPLE


def size_of(images):
    """Of ComfyUI's IMAGE, (B, H, W, 3)."""
    return images.shape[1], images.shape[2]


def covered(images, size):
    """ComfyUI's IMAGE at this size: covered and its centre cropped, without stretching (Lanczos)."""
    return _each(images, lambda image: ImageOps.fit(image, (size[1], size[0]), method=Image.Resampling.LANCZOS))


def stretched(images, size):
    """ComfyUI's IMAGE at exactly this size (bicubic)."""
    return _each(images, lambda image: image.resize((size[1], size[0]), Image.Resampling.BICUBIC))


def _each(images, change):
    """Through 8 bits, as pictures in files are."""
    made = []
    for values in images[..., :3]:
        image = Image.fromarray((255 * values.cpu().numpy()).round().clip(0, 255).astype(np.uint8))
        made.append(torch.from_numpy(np.array(change(image), dtype=np.float32) / 255.0))
    return torch.stack(made)
