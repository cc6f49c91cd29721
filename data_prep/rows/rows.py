"""Dataset files -> rows: JSON list, JSONL, CSV, TSV, Parquet, or a Hugging Face dataset (`save_to_disk` folder or hub id).

Columns: `prompt`, `image` (target) and `edit_image` (sources) are required, the last one unless the reader takes text to
image; `bridge_image`, `ref_gt`, `back_mask`, `negative_prompt`, `split`, `tag`, `group`, `weight` and `id` are optional, and
an empty cell is an absent one. Where a cell can
only be text (CSV), several sources are a JSON list: `["a.png", "b.png"]`. Text is UTF-8, with or without a byte-order mark.

What is wrong with one row rejects that row; what is wrong with the file is an `InputError`.
"""

import json
import math
import os
import re
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import InputError
from data_prep.rows.augmentation import Augmentation
from data_prep.rows.tables import REQUIRED, REQUIRED_OF_ALL, BadRow, read_table

MAX_SOURCES = 3
"""References that Qwen-Image-Edit was trained on at once."""
EMPTY_PROMPT = " "
"""What an empty instruction is, in training, validation and editing alike: as diffusers' and DiffSynth's pipelines have it."""


@dataclass(frozen=True)
class Row:
    """One usable line of the dataset file. Paths are absolute; whether the files can be read is found when they are."""

    number: int
    """Place in the dataset file, from 1: in a CSV, row 1 is the first one under the header."""
    id: str
    """The column `id`, or `row-000001` from the number."""
    prompt: str
    image: Path
    """The target."""
    edit_image: tuple[Path, ...]
    """The sources, one to three; none for text to image."""
    bridge_image: int = 0
    """Which of `edit_image` the bridge starts from."""
    ref_gt: Path | None = None
    """Ground truth for evaluation when it is not `image`."""
    back_mask: Path | None = None
    """White = background to preserve."""
    negative_prompt: str = ""
    split: str = "train"
    """Rows of `train` are trained on, those of `validation` are held out; others, as `test`, are for neither."""
    tag: str = ""
    """What kind of edit it is, for stratified splits and for tables."""
    group: str = ""
    """Rows of one group show the same content: a split keeps them together."""
    weight: float = 1.0
    """How often training draws it, in proportion to the others."""
    max_pixels: int | None = None
    """Largest area of its target, in pixels, where it has one of its own."""
    augmentation: Augmentation | None = None
    """What is done to its pictures before they are encoded."""


@dataclass(frozen=True)
class RejectedRow:
    """One unusable line of the dataset file, as `rejected.jsonl` reports it."""

    number: int
    id: str
    path: str
    """The file at fault: an image, or the dataset file itself."""
    reason: str

    def __str__(self) -> str:
        return f"row {self.number} ({self.path}): {self.reason}"

    def to_json(self) -> dict[str, Any]:
        """A line of `rejected.jsonl`."""
        return {"row": self.number, "id": self.id, "path": self.path, "reason": self.reason}


def read_rows(
    dataset: str | Path, root: str | Path | None = None, *, text_to_image: bool = False
) -> Iterator[Row | RejectedRow]:
    """Streams the rows of a dataset in order, good and bad; nothing is dropped.

    Args:
        dataset: a .json, .jsonl, .csv, .tsv or .parquet file, a folder of `datasets.save_to_disk`, or a hub id.
        root: the folder that relative paths start from and may not leave; by default the dataset's own folder.
        text_to_image: take rows without sources too, which are rejected otherwise.

    Raises:
        InputError: no such dataset, not in its format, an unknown or missing column, or no rows.
    """
    source = str(dataset)
    required = REQUIRED_OF_ALL if text_to_image else REQUIRED
    folder = _root(source, root)
    seen_ids: set[int] = set()  # hashes: a set of a million strings would take ten times the memory
    empty = True
    for number, values in enumerate(read_table(source, required), start=1):
        empty = False
        default_id = f"row-{number:06d}"
        try:
            if isinstance(values, BadRow):
                raise values
            row = parse_row(number, default_id, values, folder, required)
            if hash(row.id) in seen_ids:
                raise BadRow(f"the id {row.id!r} is already used by an earlier row")
            seen_ids.add(hash(row.id))
            yield row
        except BadRow as error:
            yield RejectedRow(number, default_id, source, str(error))
    if empty:
        raise InputError(f"the dataset {source} has no rows")


def _root(source: str, root: str | Path | None) -> Path:
    if root is not None:
        folder = Path(os.path.abspath(root))
        if not folder.is_dir():
            raise InputError(f"data.root={root} is not a folder")
        return folder
    if not os.path.exists(source):
        return Path.cwd()  # a hub id; a misspelt file is reported by the reader
    path = Path(os.path.abspath(source))
    return path if path.is_dir() else path.parent


def parse_row(
    number: int, default_id: str, values: dict[str, Any], root: Path, required: tuple[str, ...] = REQUIRED
) -> Row:
    """One row of a table whose columns have the names of a dataset file's.

    Args:
        number: place in the table, from 1.
        default_id: for a row without one.
        values: column -> cell; other columns are ignored, and empty cells are absent ones.
        root: an absolute folder, which relative paths start from.
        required: columns that may not be empty.

    Raises:
        BadRow: a cell is missing or not what its column holds.
    """
    present = {name: value for name, value in values.items() if not is_absent(value)}
    for name in required:
        if name not in present:
            more = ": only training with flow matching (loss=flow) takes text to image" if name == "edit_image" else ""
            raise BadRow(f"{name} is missing or empty{more}")
    sources = _edit_images(present["edit_image"]) if "edit_image" in present else []
    edit_image = tuple(resolve_path(value, "edit_image", root) for value in sources)
    if len(edit_image) > MAX_SOURCES:
        raise BadRow(f"edit_image has {len(edit_image)} images, the model takes at most {MAX_SOURCES}")
    bridge_image = _whole_number(present.get("bridge_image", 0), "bridge_image")
    if bridge_image not in range(max(1, len(edit_image))):
        raise BadRow(f"bridge_image={bridge_image} but edit_image has {len(edit_image)} image(s), counted from 0")
    return Row(
        number=number,
        id=str(present["id"]) if type(present.get("id")) is int else plain_text(present.get("id", default_id), "id"),
        prompt=plain_text(present["prompt"], "prompt"),
        image=resolve_path(present["image"], "image", root),
        edit_image=edit_image,
        bridge_image=bridge_image,
        ref_gt=resolve_path(present["ref_gt"], "ref_gt", root) if "ref_gt" in present else None,
        back_mask=resolve_path(present["back_mask"], "back_mask", root) if "back_mask" in present else None,
        negative_prompt=plain_text(present.get("negative_prompt", ""), "negative_prompt"),
        split=plain_text(present.get("split", "train"), "split"),
        tag=plain_text(present.get("tag", ""), "tag"),
        group=plain_text(present.get("group", ""), "group"),
        weight=_weight(present.get("weight", 1.0)),
    )


def is_absent(value: Any) -> bool:
    """Whether a cell counts as empty: None, blank text, an empty list, or pandas' NaN."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or value == [] or value != value


def plain_text(value: Any, name: str) -> str:
    """The text of a cell.

    Args:
        value: the cell.
        name: name of its column.

    Raises:
        BadRow: not text, not UTF-8, or with a zero byte.
    """
    if not isinstance(value, str):
        raise BadRow(f"{name} must be text, got {reprlib.repr(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{name} is not UTF-8 text") from None
    if "\0" in value:
        raise BadRow(f"{name} holds a zero byte: {reprlib.repr(value)}")
    return value


def _whole_number(value: Any, name: str) -> int:
    """An int, or what CSV ("1") and pandas (1.0) make of one."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if isinstance(value, bool) or not number.is_integer():
        raise BadRow(f"{name} must be a whole number, got {reprlib.repr(value)}")
    return int(number)


def _weight(value: Any) -> float:
    """A number above 0, or the text of one."""
    try:
        weight = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if not 0 < weight < math.inf:
        raise BadRow(f"weight must be a number above 0, got {reprlib.repr(value)}")
    return weight


def _edit_images(value: Any) -> list[Any]:
    """One path, a list of paths, or a JSON list in a text cell."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise BadRow(f"edit_image looks like a JSON list but is not one: {error}") from None
    if isinstance(value, list) and not value:
        raise BadRow("edit_image is an empty list")
    return value if isinstance(value, list) else [value]


def resolve_path(value: Any, name: str, root: Path) -> Path:
    """The absolute path that a cell of a table means. Relative ones may not leave `root` (a symbolic link inside it may).

    Args:
        value: the cell.
        name: name of its column.
        root: an absolute folder.

    Raises:
        BadRow: not the path of a file, or it leaves `root`.
    """
    text = plain_text(value, name)
    if re.match(r"[a-z][a-z0-9+.-]*://", text, re.IGNORECASE):
        raise BadRow(f"{name} must be the path of a file, got {text!r}")
    path = Path(os.path.normpath(root / text))
    if not os.path.isabs(text) and not path.is_relative_to(root):
        raise BadRow(f"{name} {text!r} is outside the root folder {root}")
    return path
