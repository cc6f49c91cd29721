"""Texts and pictures laid over photographs: pairs with and without them, in either direction, and the exact mask."""

import os
import random
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from PIL import Image

from data_prep.builders.coco.annotations import image_names
from data_prep.builders.common.dataset import build_dataset
from data_prep.builders.common.prompts import Templates, make_templates, read_text
from data_prep.builders.common.results import exact_mask, save_result
from data_prep.builders.overlay.composite import add_picture, add_text
from data_prep.builders.overlay.overlay_table import Photographs, read_overlays
from data_prep.builders.overlay.style import DEFAULT_STYLE, BackingName, Style, parse_style
from data_prep.builders.overlay.typography import DEFAULT_FONT, AlignName, check_font, missing_characters
from data_prep.cli import CORES, Engine, OnError, Out, Processes, Seed
from data_prep.errors import InputError
from data_prep.jobs.engines import make_engine
from data_prep.jobs.items import Item
from data_prep.rows.images import RejectedImage, file_digest, open_cut_out, open_image
from data_prep.rows.tables import BadRow

DirectionName = Literal["add", "remove", "both"]

MAX_TEXT = 2000
"""Characters. More cannot be read on a photograph, and would take long to lay out."""
PROMPT_FIELDS = ("text", "name")
"""What prompt templates may speak of: the text that is laid over, and the file name of an overlay."""
_FIELD = re.compile(r"\{(text|name)\}")
PRELOAD = ("numpy", "PIL.Image", "PIL.ImageFont", "fontTools.ttLib", "matplotlib")


def command(
    table: Annotated[
        Path,
        typer.Option(help="Table (CSV, TSV, JSONL or Parquet) with image_id and overlay_text, overlay_image or text."),
    ],
    images: Annotated[Path, typer.Option(help="Folder with the photographs.")],
    out: Out,
    direction: Annotated[
        DirectionName, typer.Option(help="Make rows that add the overlay, rows that remove it, or both.")
    ] = "add",
    prompt_add: Annotated[
        str | None,
        typer.Option(help="Instruction for adding, for table rows without one. It may use {text} and {name}."),
    ] = None,
    prompt_remove: Annotated[
        str | None, typer.Option(help="Instruction for removing, for table rows without one.")
    ] = None,
    root: Annotated[
        Path | None, typer.Option(help="Folder that the paths of overlays start from.", show_default="the table's")
    ] = None,
    coco: Annotated[
        Path | None,
        typer.Option(help="COCO file for the table's image ids. Names like 000000000123.jpg are found without it."),
    ] = None,
    font: Annotated[
        list[Path] | None,
        typer.Option(
            help="Font file. Repeatable: each row draws one of those that contain its characters.",
            show_default="DejaVu Sans",
        ),
    ] = None,
    font_size: Annotated[
        str, typer.Option(help="Text height as a share of the image's height, a range of shares, or fit.")
    ] = DEFAULT_STYLE["font_size"],
    overlay_size: Annotated[
        str,
        typer.Option(help="Share of the image's width and height that an overlaid image fills, or a range of shares."),
    ] = DEFAULT_STYLE["overlay_size"],
    position: Annotated[
        str,
        typer.Option(help="Position of the overlay: random, top-left, top, center, …, or its centre as x,y in 0–1."),
    ] = DEFAULT_STYLE["position"],
    max_width: Annotated[
        float, typer.Option(help="Width at which lines break, as a share of the image's width.")
    ] = 0.8,
    align: Annotated[AlignName, typer.Option(help="Alignment of the lines of text.")] = "center",
    colour: Annotated[
        str, typer.Option(help="Text colour: #rrggbb, a name, or auto for one that contrasts with the image.")
    ] = DEFAULT_STYLE["colour"],
    backing: Annotated[
        BackingName,
        typer.Option(help="What is drawn behind the text. auto: something only where it would be hard to read."),
    ] = "auto",
    opacity: Annotated[
        str, typer.Option(help="Opacity of the overlay, 0.05–1, or a range such as 0.5:1.")
    ] = DEFAULT_STYLE["opacity"],
    rotation: Annotated[
        str, typer.Option(help="Rotation in degrees, counter-clockwise, or a range such as -10:10.")
    ] = DEFAULT_STYLE["rotation"],
    seed: Seed = 0,
    processes: Processes = CORES,
    engine: Engine = "local",
    on_error: OnError = "raise",
) -> None:
    """Makes pairs by laying texts or images over photographs. The edit adds the overlay or removes it.

    Each row of the table names a photograph in image_id (a file name with or without its ending, or a COCO id) and fills one
    of overlay_text (path of a UTF-8 text file), overlay_image (path of an image, which may be transparent) and text (the text
    itself). The column prompt is the instruction for the row's direction (for adding if the direction is both); prompt_add
    and prompt_remove are for one direction. {text} and {name} in them stand for the overlay's text and file name. The columns
    position, font_size, overlay_size, colour, opacity, rotation and direction override the options of these names.

    data_prep/run.py overlay --table overlays.csv --images photos --out data/overlay --direction both
    --prompt-remove 'Remove the text "{text}".'
    """
    texts = {"font_size": font_size, "overlay_size": overlay_size, "position": position}
    texts |= {"colour": colour, "opacity": opacity, "rotation": rotation}
    fonts = _fonts(font or [DEFAULT_FONT])
    make = MakeOverlay(
        _style(texts, align, max_width, backing),
        fonts,
        tuple(map(file_digest, fonts)),
        direction,
        _templates(prompt_add, seed),
        _templates(prompt_remove, seed),
        seed,
    )
    if not images.is_dir():
        raise InputError(f"--images {images} is not a folder")
    photographs = Photographs(Path(os.path.abspath(images)), image_names(coco) if coco else {})
    items = read_overlays(table, Path(os.path.abspath(root or table.parent)), photographs)
    workers = make_engine(engine, processes, PRELOAD)
    build_dataset(items, make, out, workers, title="laying over", on_error=on_error, writes=("masks", "pictures"))


@dataclass(frozen=True)
class MakeOverlay:
    """A photograph and what is laid over it -> one row, or one in each direction."""

    style: Style
    fonts: tuple[Path, ...]
    font_digests: tuple[str, ...]
    """Another font in a file of the same name makes other pictures."""
    direction: DirectionName
    """The direction of rows that do not give one."""
    prompt_add: Templates | None
    prompt_remove: Templates | None
    seed: int

    def __call__(self, item: Item, out: Path) -> list[dict[str, Any]]:
        cells: dict[str, str] = item.values["cells"]
        photo_path, content = Path(item.values["photo"]), item.values["content"]
        style, directions = self._style(cells), self._directions(cells)
        kind = "image" if content == "overlay_image" else "text"
        text = self._text(item) if kind == "text" else ""
        known = {"text": " ".join(text.split()), "name": _words(item.files[0].stem) if content != "text" else ""}
        prompts = [self._prompt(direction, item.id, cells, directions, known) for direction in directions]

        photo = open_image(photo_path)
        target = self._laid_over(photo, text, item, style)
        mask = save_result(exact_mask(photo, target), out / "masks", item.id)
        with_overlay = save_result(target, out / "pictures", item.id)
        pairs = {"add": (photo_path, with_overlay), "remove": (with_overlay, photo_path)}
        return [
            {
                "id": f"{item.id}-{direction}" if len(directions) > 1 else item.id,
                "prompt": prompt,
                "image": pairs[direction][1],
                "edit_image": pairs[direction][0],
                "back_mask": mask,
                "tag": f"{direction}-{kind}",
                "group": item.values["group"],
            }
            for direction, prompt in zip(directions, prompts, strict=True)
        ]

    def lay_over(self, photo: Image.Image, item: Item) -> Image.Image:
        """A photograph with an item's overlay on it: what a row that adds has as its target.

        Raises:
            RejectedImage, BadRow: the overlay cannot be used.
        """
        text = "" if item.values["content"] == "overlay_image" else self._text(item)
        return self._laid_over(photo, text, item, self._style(item.values["cells"]))

    def _laid_over(self, photo: Image.Image, text: str, item: Item, style: Style) -> Image.Image:
        rng = random.Random(f"{self.seed}/{item.id}/overlay")
        if not text:
            return add_picture(photo, open_cut_out(item.files[0]), style, rng)
        return add_text(photo, text, self._font(text, rng), style, rng)

    def _text(self, item: Item) -> str:
        """The text of a row, in composed characters, with spaces for tabs."""
        literal = item.values["content"] == "text"
        try:
            text = item.values["cells"]["text"] if literal else read_text(item.files[0])
            return _checked_text(text)
        except BadRow as error:
            if literal:
                raise BadRow(f"text {error}") from None
            raise RejectedImage(item.files[0], f"the overlay's text {error}") from None

    def _font(self, text: str, rng: random.Random) -> Path:
        missing = {font: missing_characters(text, font) for font in self.fonts}
        if usable := [font for font in self.fonts if not missing[font]]:
            return rng.choice(usable)
        font, characters = min(missing.items(), key=lambda pair: len(pair[1]))
        shown = ", ".join(f"{each} (U+{ord(each):04X})" for each in characters[:10])
        more = f" and {len(characters) - 10} more" if len(characters) > 10 else ""
        raise BadRow(f"the font {font.name} has no picture for {shown}{more}: give a --font that has")

    def _style(self, cells: Mapping[str, str]) -> Style:
        try:
            return self.style.override(cells)
        except ValueError as error:
            raise BadRow(str(error)) from None

    def _directions(self, cells: Mapping[str, str]) -> tuple[str, ...]:
        direction = cells.get("direction", self.direction)
        if direction not in ("add", "remove", "both"):
            raise BadRow(f"direction must be add, remove or both, got {direction!r}")
        return ("add", "remove") if direction == "both" else (direction,)

    def _prompt(
        self, direction: str, id: str, cells: Mapping[str, str], directions: tuple[str, ...], known: Mapping[str, str]
    ) -> str:
        """The column of this direction, then `prompt`, which is the first direction's, then the template.

        In a column {text} and {name} are filled as in a template, and other braces are text.
        """
        if own := cells.get(f"prompt_{direction}") or (cells.get("prompt") if direction == directions[0] else None):
            return _FIELD.sub(lambda field: known[field[1]] or field[0], own)
        template = self.prompt_add if direction == "add" else self.prompt_remove
        if template is None:
            way_out = f"fill the column prompt_{direction}, or give --prompt-{direction}"
            raise BadRow(f"there is no instruction to {direction}: {way_out}")
        return template.fill(id, known)


def _checked_text(text: str) -> str:
    """What can be drawn of a text. `BadRow` messages continue a sentence that begins with its name."""
    text = unicodedata.normalize("NFC", "\n".join(text.replace("\t", " ").splitlines())).strip()
    if not text:
        raise BadRow("is empty")
    if len(text) > MAX_TEXT:
        raise BadRow(f"has {len(text)} characters, at most {MAX_TEXT} are allowed")
    if controls := sorted({each for each in text if unicodedata.category(each) == "Cc" and each != "\n"}):
        raise BadRow(f"has control characters ({', '.join(map(ascii, controls))}): is it a text file?")
    return text


def _words(stem: str) -> str:
    """A file's name as people say it: `red_cap-02` is "red cap"."""
    return " ".join(re.findall(r"[^\W\d_]+", stem)) or stem


def _style(texts: Mapping[str, str], align: AlignName, max_width: float, backing: BackingName) -> Style:
    if not 0.05 <= max_width <= 1:
        raise InputError(f"--max-width must be from 0.05 to 1, got {max_width:g}")
    try:
        return Style(**parse_style(texts), align=align, max_width=max_width, backing=backing)
    except ValueError as error:
        raise InputError(f"the option {error}") from None


def _fonts(paths: list[Path]) -> tuple[Path, ...]:
    for path in paths:
        check_font(path)
    return tuple(Path(os.path.abspath(path)) for path in paths)


def _templates(prompt: str | None, seed: int) -> Templates | None:
    templates = make_templates(prompt, None, seed)
    if templates is not None:
        templates.check_fields(PROMPT_FIELDS)
    return templates
