"""COCO annotation files: images, what is annotated in them, captions. https://cocodataset.org/#format-data"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.errors import InputError
from data_prep.rows.rows import RejectedRow
from data_prep.rows.tables import BadRow

COCO_DIGITS = 12
"""COCO's file names are its image ids, padded with zeros."""


@dataclass(frozen=True)
class CocoImage:
    """An image, and what is known of it."""

    number: int
    """Place among the file's images, from 1."""
    id: str
    file_name: str
    size: tuple[int, int] | None
    """Width and height that the annotations refer to, if the file says so."""
    objects: list[dict[str, Any]] = field(default_factory=list)
    """`id`, `category`, `supercategory`, `segmentation` and `iscrowd` of each."""
    captions: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class CocoFile:
    """What an annotation file says."""

    images: dict[str, CocoImage]
    categories: dict[str, dict[str, Any]]
    rejected: list[RejectedRow]
    """Entries that could not be used."""


def read_coco(path: Path, captions: Path | None = None) -> CocoFile:
    """Reads an annotation file (instances, captions or both), and captions from a second one.

    An annotation of an unknown category makes its image unusable: a mask without it would be wrong.

    Raises:
        InputError: not a COCO file, or it has no images.
    """
    parsed = _load(path)
    categories = {str(entry["id"]): entry for entry in _entries(parsed, "categories") if {"id", "name"} <= entry.keys()}
    rejected: list[RejectedRow] = []
    images = _images(parsed, path, rejected)
    if not images:
        raise InputError(f'{path} has no images: a COCO annotation file lists them under "images"')
    _add_all(parsed, path, images, categories, rejected)
    if captions:
        _add_all(_load(captions), captions, images, categories, rejected, only_captions=True)
    return CocoFile(images, categories, rejected)


def image_names(path: Path) -> dict[str, str]:
    """Image id -> file name.

    Raises:
        InputError: not a COCO file.
    """
    return {id: image.file_name for id, image in _images(_load(path), path, []).items()}


def is_utf8(text: str) -> bool:
    """Whether text can be written: JSON may hold halves of characters, which cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _load(path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, lists in lists in lists
        raise InputError(f"{path} is not a JSON file: {error}") from None
    if not isinstance(parsed, dict) or not isinstance(parsed.get("images", []), list):
        raise InputError(
            f"{path} is not a COCO annotation file: it must be an object with the lists images, annotations"
        )
    return parsed


def _entries(parsed: dict[str, Any], name: str) -> Iterator[dict[str, Any]]:
    """Those of a list; what is not an object becomes an empty one, to keep the count."""
    entries = parsed.get(name, [])
    return (entry if isinstance(entry, dict) else {} for entry in (entries if isinstance(entries, list) else []))


def _images(parsed: dict[str, Any], path: Path, rejected: list[RejectedRow]) -> dict[str, CocoImage]:
    images: dict[str, CocoImage] = {}
    for number, entry in enumerate(_entries(parsed, "images"), start=1):
        id, name = str(entry.get("id", "")), entry.get("file_name")
        if not id or not isinstance(name, str) or not name:
            rejected.append(
                RejectedRow(number, id or f"image-{number}", str(path), "the image has no id or no file_name")
            )
        elif not is_utf8(id + name):
            what = "file_name" if is_utf8(id) else "id"
            reason = f"the {what} of the image is not UTF-8 text"
            at = name if is_utf8(name) else str(path)
            rejected.append(RejectedRow(number, f"image-{number}", at, reason))
        elif id in images:
            reason = f"the image id {id} is already used by {images[id].file_name}"
            rejected.append(RejectedRow(number, id, name, reason))
        else:
            images[id] = CocoImage(number, id, name, _size(entry))
    return images


def _size(entry: dict[str, Any]) -> tuple[int, int] | None:
    width, height = entry.get("width"), entry.get("height")
    return (width, height) if isinstance(width, int) and isinstance(height, int) else None


def _add_all(
    parsed: dict[str, Any],
    path: Path,
    images: dict[str, CocoImage],
    categories: dict[str, dict[str, Any]],
    rejected: list[RejectedRow],
    only_captions: bool = False,
) -> None:
    """Puts every annotation of a file to its image, or to the rejected ones; or only captions, of images that are known."""
    for number, entry in enumerate(_entries(parsed, "annotations"), start=1):
        if only_captions and not (isinstance(entry.get("caption"), str) and str(entry.get("image_id")) in images):
            continue
        try:
            _add(entry, images, categories)
        except BadRow as error:
            id = str(entry.get("id", number))
            name = f"annotation-{id if is_utf8(id) else number}"
            rejected.append(RejectedRow(number, name, str(path), f"annotation {error}"))


def _add(entry: dict[str, Any], images: dict[str, CocoImage], categories: dict[str, dict[str, Any]]) -> None:
    """Puts an annotation to its image."""
    id = str(entry.get("image_id"))
    if id not in images:
        raise BadRow(f"of the unknown image_id {id}")
    if not is_utf8(f"{entry.get('id')}{entry.get('caption')}"):
        raise BadRow("has an id or a caption that is not UTF-8 text")
    if isinstance(entry.get("caption"), str):
        images[id].captions.append(entry["caption"])
        return
    category = categories.get(str(entry.get("category_id")), {})
    images[id].objects.append(
        {
            "id": str(entry.get("id", "")),
            "category_id": entry.get("category_id"),
            "category": category.get("name"),
            "supercategory": category.get("supercategory") or "",
            "segmentation": entry.get("segmentation"),
            "iscrowd": bool(entry.get("iscrowd")),
        }
    )
