"""The table of overlays -> items: which photograph, what is laid over it, and what the row says of its own."""

import bisect
import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_prep.builders.coco.annotations import COCO_DIGITS
from data_prep.builders.overlay.style import PARSERS
from data_prep.errors import InputError
from data_prep.jobs.items import Item
from data_prep.rows.images import image_suffixes
from data_prep.rows.rows import RejectedRow, is_absent, resolve_path
from data_prep.rows.tables import BadRow, read_file

CONTENT = ("overlay_text", "overlay_image", "text")
"""Columns of which a row fills one."""
COLUMNS = ("image_id", *CONTENT, "prompt", "prompt_add", "prompt_remove", "direction", "id", *PARSERS)


@dataclass(frozen=True)
class Photographs:
    """A folder of them, in which ids are looked up."""

    folder: Path
    names: dict[str, str]
    """Image id -> file name, from a COCO file; may be empty."""

    def find(self, image_id: str) -> Path:
        """The file that an id means: a path or name with or without its ending, or a COCO id.

        Raises:
            BadRow: there is none, or several, or the path leaves the folder.
        """
        wanted = [self.names[image_id]] if image_id in self.names else [image_id]
        if image_id.isdigit():
            wanted.append(image_id.zfill(COCO_DIGITS))
        for name in wanted:
            path = resolve_path(name, "image_id", self.folder)
            files = _listing(path.parent)
            if (found := _matching(files, path.name)) is None:
                continue
            return path.with_name(found)
        raise BadRow(f"there is no image {image_id!r} in {self.folder}, with or without an ending")


@lru_cache(maxsize=64)
def _listing(folder: Path) -> list[str]:
    """The sorted names in a folder; none if it cannot be listed, for then nothing is found there."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _matching(names: list[str], wanted: str) -> str | None:
    """The name itself, or the one image that is called so but for its ending."""
    place = bisect.bisect_left(names, wanted)
    if place < len(names) and names[place] == wanted:
        return wanted
    found = []
    for name in names[bisect.bisect_left(names, wanted + ".") :]:
        if not name.startswith(wanted + "."):
            break
        if name[len(wanted) :].lower() in image_suffixes():
            found.append(name)
    if len(found) > 1:
        raise BadRow(f"image_id {wanted!r} may mean {' or '.join(found)}: write the ending")
    return found[0] if found else None


def read_overlays(table: Path, root: Path, photographs: Photographs) -> Iterator[Item | RejectedRow]:
    """Streams the rows of a table.

    Args:
        table: CSV, TSV, JSONL or Parquet.
        root: an absolute folder, from which the paths of overlays start.
        photographs: where images are looked up.

    Raises:
        InputError: a column is missing or misspelt, or there are no rows.
    """
    seen: set[int] = set()  # hashes of ids
    number = 0
    for number, cells in enumerate(read_file(table, _check_columns), start=1):
        id = f"row-{number:06d}"
        try:
            if isinstance(cells, BadRow):
                raise cells
            texts = {
                name: _cell(value, name) for name, value in cells.items() if not is_absent(value) and name in COLUMNS
            }
            id = texts.pop("id", id)
            if hash(id) in seen:
                raise BadRow(f"the id {id!r} is already used by an earlier row")
            seen.add(hash(id))
            yield _item(number, id, texts, root, photographs)
        except BadRow as error:
            yield RejectedRow(number, id, str(table), str(error))
    if not number:
        raise InputError(f"{table} has no rows")


def _item(number: int, id: str, texts: dict[str, str], root: Path, photographs: Photographs) -> Item:
    if "image_id" not in texts:
        raise BadRow("image_id is missing or empty")
    filled = [name for name in CONTENT if name in texts]
    if len(filled) != 1:
        found = " and ".join(filled) or "none"
        raise BadRow(f"a row must fill exactly one of {', '.join(CONTENT)}; this one fills {found}")
    photo = photographs.find(texts.pop("image_id"))
    values = {"photo": str(photo), "content": filled[0], "cells": texts, "group": _group(photo, photographs.folder)}
    if filled[0] == "text":
        return Item(number, id, (photo,), values)
    overlay = resolve_path(texts[filled[0]], filled[0], root)
    return Item(number, id, (overlay, photo), values)


def _group(photo: Path, folder: Path) -> str:
    return str(photo.relative_to(folder) if photo.is_relative_to(folder) else photo)


def _cell(value: Any, name: str) -> str:
    """A cell as text: 123.0 is what pandas makes of a column of numbers with gaps."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise BadRow(f"{name} must be text or a number, got {value!r}")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{name} is not UTF-8 text") from None
    return text if name == "text" else text.strip()


def _check_columns(names: list[str], where: str, *, complete: bool) -> None:
    """Columns of other uses are welcome, misspelt ones are not."""
    if complete and "image_id" not in names:
        raise InputError(f"{where} has no column image_id, which names the photograph of each row")
    if complete and not any(name in names for name in CONTENT):
        raise InputError(f"{where} has none of the columns {', '.join(CONTENT)}: one of them must give the overlay")
    for name in names:
        nearest = difflib.get_close_matches(re.sub(r"\W+", "_", name.lower()), COLUMNS, n=1, cutoff=0.82)
        if name not in COLUMNS and nearest:
            raise InputError(f"unknown column {name!r} in {where}: did you mean {nearest[0]!r}? Rename it if not")
