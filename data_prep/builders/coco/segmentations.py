"""COCO segmentations -> masks. pycocotools trusts what it is given: lengths that do not fit read foreign memory, so that
everything is checked before."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps
from pycocotools import mask as coco_mask

from data_prep.rows.images import FORMATS, RejectedImage, image_size_text
from data_prep.rows.tables import BadRow

RLE = Any
"""A dict of `size` (height, width) and compressed `counts`, of a type that pycocotools keeps to itself."""


def to_rle(segmentation: Any, size: tuple[int, int]) -> RLE:
    """A segmentation of any of COCO's three forms: polygons, run lengths as numbers, or compressed to text.

    Args:
        segmentation: as the file has it.
        size: width and height of the image.

    Raises:
        BadRow: none of these, not of this size, or it covers no pixel. Continues a sentence that begins with its name.
    """
    width, height = size
    if isinstance(segmentation, dict):
        lengths: Any = {"size": [height, width], "counts": _counts(segmentation, size)}
        rle = coco_mask.frPyObjects(lengths, height, width)
    elif isinstance(segmentation, list) and segmentation:
        polygons: Any = [_polygon(points, size) for points in segmentation]
        rle = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
    else:
        raise BadRow("has no segmentation")
    if share(rle) == 0:
        raise BadRow("covers no pixel")
    return rle


def share(rle: RLE) -> float:
    """The part of the image that is covered, 0 to 1."""
    return float(coco_mask.area(rle)) / (rle["size"][0] * rle["size"][1])


def union(rles: Iterable[RLE]) -> Image.Image:
    """Mode L: 255 where any of them covers."""
    rle: RLE = coco_mask.merge(list(rles))
    height, width = rle["size"]
    # Not `coco_mask.decode`: it warns under NumPy 2, and it is the one that fills in whatever memory holds.
    counts = _decompressed(rle["counts"].decode())
    columns = np.repeat(np.arange(len(counts)) % 2 * 255, counts).astype(np.uint8).reshape(width, height)
    return Image.fromarray(np.ascontiguousarray(columns.T))


def annotated_size(size: tuple[int, int] | None, photo: Image.Image, path: Path) -> tuple[int, int]:
    """Width and height of the picture that was annotated: `photo`, or the same before its EXIF tag turned it.

    Args:
        size: what the annotation file says.
        photo: the upright photograph.
        path: its file.

    Raises:
        RejectedImage: neither of them, or one cannot tell which.
    """
    turned = _orientation(path) != 1
    stored = photo.size[::-1] if _orientation(path) >= 5 else photo.size
    if turned and (size is None or photo.size == stored):
        reason = "its EXIF tag turns it, and it is not known whether the annotations are for the turned image"
        raise RejectedImage(path, f"{reason}: save it upright")
    if size is not None and size not in (photo.size, stored):
        raise RejectedImage(path, f"it is {image_size_text(photo)}, its annotations are for {size[0]}x{size[1]}")
    return size or photo.size


def turn_like(mask: Image.Image, photo: Image.Image, path: Path) -> Image.Image:
    """The mask upright, when it was made of a photograph that its EXIF tag turns."""
    if mask.size == photo.size:
        return mask
    mask.getexif()[ExifTags.Base.Orientation] = _orientation(path)
    return ImageOps.exif_transpose(mask)


def _orientation(path: Path) -> int:
    """The EXIF tag, 1 to 8: 1 upright, from 5 on width and height are exchanged."""
    with Image.open(path, formats=FORMATS) as image:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if value in range(1, 9) else 1


def _polygon(points: Any, size: tuple[int, int]) -> list[float]:
    numbers = [point for point in points if type(point) in (int, float)] if isinstance(points, list) else []
    if len(numbers) < 6 or len(numbers) % 2 or len(numbers) != len(points):
        raise BadRow("has a polygon that is not a list of three or more x, y")
    for place, number in enumerate(numbers):
        side = size[place % 2]
        if not math.isfinite(number) or not -side <= number <= 2 * side:
            raise BadRow(f"has a polygon far outside of its {size[0]}x{size[1]} image, at {number:g}")
    return numbers


def _counts(segmentation: dict[str, Any], size: tuple[int, int]) -> list[int]:
    """Run lengths, which alternate between background and object, down the columns."""
    width, height = size
    if segmentation.get("size") != [height, width]:
        raise BadRow(f"has run lengths of size {segmentation.get('size')}, height first, in a {width}x{height} image")
    counts = segmentation.get("counts")
    counts = _decompressed(counts) if isinstance(counts, str) else counts
    if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts):
        raise BadRow("has run lengths that are not whole numbers")
    if sum(counts) != width * height:
        raise BadRow(f"has run lengths of {sum(counts)} pixels in a {width}x{height} image")
    return counts


def _decompressed(text: str) -> list[int]:
    """pycocotools' text form (`rleFrString`): five bits a character from 48 on, bit 6 says that more follow, bit 5 of the
    last one is the sign; from the fourth number on, they are differences to the one before the last."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise BadRow(f"has compressed run lengths with the character {character!r}, which does not occur in them")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise BadRow("has compressed run lengths that are cut off")
    return counts
