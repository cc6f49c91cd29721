"""A table of edits -> jobs: which images, what is asked of them, and which rows cannot be used.

Columns: `image` (with `image_2` and `image_3`, or a JSON list) or `image_id`; `overlay_text` or `overlay_image`, laid over the
first image before it is edited; `mask`; `id`; and the knobs of an edit, each of which overrides the option of its name.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from PIL import Image

from data_prep.builders.overlay.overlay_table import Photographs
from data_prep.builders.overlay.style import PARSERS as STYLE
from data_prep.builders.overlay.style import parse_style
from data_prep.errors import InputError
from data_prep.rows.rows import RejectedRow, is_absent, plain_text, resolve_path
from data_prep.rows.tables import BadRow, read_file
from eval.request.knobs import Control, Declared, cell_texts
from eval.request.request import CONTROLLED, KNOBS, MASKED, EditRequest

IMAGES = ("image", "image_2", "image_3")
OVERLAYS = ("overlay_text", "overlay_image")


KNOB_COLUMNS = {each.name: each for each in KNOBS}
COLUMNS = ("id", *IMAGES, "image_id", *OVERLAYS, "mask", *KNOB_COLUMNS, *STYLE)


@dataclass(frozen=True)
class Overlay:
    """What is laid over the first image."""

    content: str
    """`overlay_text` or `overlay_image`."""
    path: Path
    style: dict[str, str]
    """Cells that say how it looks."""


@dataclass(frozen=True)
class Job:
    """One row: its files, not yet opened, and what is asked."""

    number: int
    """Place in the table, from 1."""
    id: str
    """The column `id`, or the first image's name."""
    images: tuple[Path, ...]
    shown: str
    """The first image as the table names it."""
    knobs: dict[str, Any] = field(default_factory=dict)
    """Fields of `EditRequest`."""
    mask: Path | None = None
    overlay: Overlay | None = None

    @property
    def files(self) -> list[Path]:
        """Everything that is read: images, overlay, mask."""
        return [*self.images, *([self.overlay.path] if self.overlay else []), *([self.mask] if self.mask else [])]

    def request(self, images: list[Image.Image], mask: Image.Image | None) -> EditRequest:
        """The request, of opened images.

        Raises:
            InputError: a value is not one that the mode takes.
        """
        values: dict[str, Any] = {"prompt": "", **self.knobs}
        return EditRequest(images=images, mask=mask, **values)

    def placeholder(self) -> EditRequest:
        """The request without its pictures, to find what is wrong with it before they are opened.

        Raises:
            InputError: as `request`.
        """
        picture = Image.new("RGB", (64, 64), "white")  # as a mask: the edit may go everywhere
        return self.request([picture] * len(self.images), picture.convert("L") if self.mask else None)

    def reject(self, reason: str, path: Path | None = None) -> RejectedRow:
        """The report on this row."""
        return RejectedRow(self.number, self.id, str(path or self.images[0]), reason)


def describe(request: EditRequest) -> dict[str, Any]:
    """What is asked, as JSON has it, without the contents of files."""
    values = {each.name: getattr(request, each.name) for each in fields(request)}
    for name in ("images", "mask", "adapters", "original"):
        values.pop(name)
    for name in ("bridge_image", "geometry", "sizing"):  # no column: a table's keys are as they were before these
        if not values[name]:
            values.pop(name)
    return json.loads(json.dumps(values, default=asdict))  # a Size is a list; Focus and Control are dataclasses


def check_knobs(knobs: Mapping[str, Any]) -> None:
    """Finds what is wrong with options before any row is read; a row may still add a mask and controls.

    Raises:
        InputError: a value is out of its range.
    """
    picture, mode = Image.new("RGB", (64, 64)), knobs.get("mode")
    values: dict[str, Any] = {**knobs, "images": [picture], "prompt": "" if mode == "variation" else "x"}
    values["mask"] = picture.convert("L") if mode in MASKED else None
    if mode in CONTROLLED and not knobs.get("controls"):
        values["controls"] = (Control("canny"),)
    EditRequest(**values)


def read_jobs(
    table: Path, root: Path, photographs: Photographs, options: Mapping[str, Any], ignore_columns: bool = False
) -> list[Job | RejectedRow]:
    """The rows of a table, good and bad, in order.

    Args:
        table: CSV, TSV, JSON, JSONL or Parquet.
        root: an absolute folder, from which relative paths start and which they may not leave.
        photographs: where the column `image_id` is looked up.
        options: fields of `EditRequest`, where a row says nothing else.
        ignore_columns: do without columns of other uses, instead of refusing them.

    Raises:
        InputError: a column is missing or unknown, or there are no rows.
    """

    def check(names: list[str], where: str, *, complete: bool) -> None:
        _check_columns(names, where, complete, ignore_columns)

    entries: list[Job | RejectedRow] = []
    seen: set[str] = set()
    for number, cells in enumerate(read_file(table, check), start=1):
        id = f"row-{number:06d}"
        try:
            if isinstance(cells, BadRow):
                raise cells
            texts = _known(cells)
            id = texts.get("id", id)
            if id in seen:
                raise BadRow(f"the id {id!r} is already used by an earlier row")
            seen.add(id)
            entries.append(_job(number, texts, root, photographs, options))
        except (BadRow, InputError) as error:
            entries.append(RejectedRow(number, id, str(table), str(error)))
    if not entries:
        raise InputError(f"{table} has no rows")
    return entries


def _job(number: int, texts: dict[str, str], root: Path, photographs: Photographs, options: Mapping[str, Any]) -> Job:
    images, shown = _images(texts, root, photographs)
    knobs = dict(options) | {
        knob.field: _parsed(knob, texts[name]) for name, knob in KNOB_COLUMNS.items() if name in texts
    }
    if "size" in texts or "aspect" in texts:  # either takes the place of both options
        knobs |= {name: None for name in ("size", "aspect") if name not in texts}
    if knobs.get("mode") == "variation" and "prompt" not in texts:
        knobs["prompt"] = ""
    mask = resolve_path(texts["mask"], "mask", root) if "mask" in texts else None
    job = Job(number, texts.get("id", images[0].stem), images, shown, knobs, mask, _overlay(texts, root))
    job.placeholder()
    return job


def _images(texts: Mapping[str, str], root: Path, photographs: Photographs) -> tuple[tuple[Path, ...], str]:
    """The files of a row, and the first as the table names it."""
    if ("image" in texts) == ("image_id" in texts):
        raise BadRow(
            f"a row must fill exactly one of image and image_id; this one fills {'both' if 'image' in texts else 'neither'}"
        )
    if "image_id" in texts:
        first = [photographs.find(texts["image_id"])]
    else:
        first = [resolve_path(text, "image", root) for text in _image_texts(texts["image"])]
    more = [resolve_path(text, name, root) for name in IMAGES[1:] for text in [texts.get(name)] if text]
    if not first:
        raise BadRow("image is an empty list")
    shown = first[0].relative_to(root) if first[0].is_relative_to(root) else first[0]
    return (*first, *more), str(shown)


def _overlay(texts: Mapping[str, str], root: Path) -> Overlay | None:
    filled = [name for name in OVERLAYS if name in texts]
    style = {name: texts[name] for name in STYLE if name in texts}
    if len(filled) > 1:
        raise BadRow("a row may fill only one of overlay_text and overlay_image; this one fills both")
    try:
        parse_style(style)
    except ValueError as error:
        raise BadRow(str(error)) from None
    return Overlay(filled[0], resolve_path(texts[filled[0]], filled[0], root), style) if filled else None


def _parsed(knob: Declared, text: str) -> Any:
    try:
        return knob.parse_cell(text)
    except (BadRow, InputError):
        raise
    except ValueError as error:
        reason = str(error) if "must" in str(error) or "looks like" in str(error) else f"must be a number, got {text!r}"
        raise BadRow(f"{knob.name} {reason}") from None


def _image_texts(text: str) -> list[str]:
    try:
        return cell_texts(text)
    except ValueError as error:
        raise BadRow(f"image {error}") from None


def _known(cells: Mapping[str, Any]) -> dict[str, str]:
    return {name: _cell(name, value) for name, value in cells.items() if name in COLUMNS and not is_absent(value)}


def _cell(name: str, value: Any) -> str:
    """A cell as text; 7.0 is what pandas makes of a column of whole numbers with gaps."""
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise BadRow(f"{name} must be text or a number, got {value!r}")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return plain_text(str(value).strip(), name)


def _check_columns(names: Iterable[str], where: str, complete: bool, ignore: bool) -> None:
    """An unknown column may be a misspelt one, which would be ignored without a word."""
    for name in names:
        if name not in COLUMNS and not ignore:
            nearest = difflib.get_close_matches(name, COLUMNS, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else "rename or remove it"
            raise InputError(f"unknown column {name!r} in {where}: {hint} (or --ignore-columns; {', '.join(COLUMNS)})")
    if complete and not {"image", "image_id"} & set(names):
        raise InputError(f"{where} has no column image or image_id, which names the image that each row edits")
