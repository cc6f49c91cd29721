"""Rows with pictures in them -> rows of a dataset file: each picture is saved once, as a file below the dataset's folder."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from data_prep.builders.common.columns import map_cells, text_fields
from data_prep.builders.common.prompts import Templates
from data_prep.builders.common.results import save_png
from data_prep.builders.hf.hub import Source, open_columns, picture_bytes, split_of_rows
from data_prep.builders.hf.pictures import MaskStyle, ordinary_ending, read_mask
from data_prep.files import write_bytes
from data_prep.jobs.items import Item
from data_prep.rows.images import RejectedImage, check_mask_shape, file_digest, open_image
from data_prep.rows.rows import Row, parse_row

PICTURES = ("image", "edit_image", "ref_gt", "back_mask")
IMAGES, ORIGINALS = "images", ".originals"
"""Folders below the dataset's: of the pictures that rows name, and of those that are still to be made into such."""


@dataclass(frozen=True)
class SaveRow:
    """Saves the pictures of a row, and sees that they can be used.

    An item's values are `split` and, for a dataset on this machine, `index`; for a stream, `cells` as `place` gives them.
    """

    source: Source
    fingerprints: tuple[str, ...]
    """Fingerprints of the splits, as `datasets` computes them: they change with the contents. Empty for a stream."""
    columns: dict[str, dict[str, tuple[str, ...]]]
    """Split -> dataset column -> columns there."""
    mask: MaskStyle
    templates: Templates | None

    def __call__(self, item: Item, out: Path) -> list[dict[str, Any]]:
        split = item.values["split"]
        if (cells := item.values.get("cells")) is None:
            row = open_columns(self.source, split, self.needed(split))[item.values["index"]]
            cells = self.place(row, split, item.id, out)
        values = {"split": split_of_rows(split), **map_cells(cells, self.columns[split])}
        if self.templates is not None:
            values["prompt"] = self.templates.fill(item.id, text_fields(cells))
        return [self._finish(parse_row(item.number, item.id, values, out), out, item.id)]

    def needed(self, split: str) -> tuple[str, ...]:
        """The columns that are read."""
        fields = self.templates.fields() if self.templates else ()
        return tuple(sorted({*itertools.chain(*self.columns[split].values()), *fields}))

    def place(self, cells: dict[str, Any], split: str, id: str, out: Path) -> dict[str, Any]:
        """Writes the pictures in cells to files, and puts their paths below `out` in their place.

        Raises:
            BadRow: a cell that should hold a picture holds something else.
        """
        placed, columns = dict(cells), self.columns[split]
        for name, column in [(part, each) for part in PICTURES for each in columns.get(part, ())]:
            cell, stem = cells[column], f"{id}-{quote(column, safe='')}"
            if isinstance(cell, list):
                files = [picture_bytes(each, column) for each in cell]
                placed[column] = [_place(file, f"{stem}-{n}", out) for n, file in enumerate(files, start=1)]
            elif cell is not None:
                placed[column] = _place(picture_bytes(cell, column), stem, out, original=name == "back_mask")
        return placed

    def _finish(self, row: Row, out: Path, id: str) -> dict[str, Any]:
        """The row of the dataset file. Raises `RejectedImage` for the dataset, with the column at fault."""
        group = row.group or self._checked("edit_image", row.edit_image[row.bridge_image], file_digest)
        image = self._checked("image", row.image, open_image)
        mask = row.back_mask and self._checked("back_mask", row.back_mask, lambda path: self._read_mask(path, image))
        if mask:
            save_png(mask, out / IMAGES / f"{id}-mask.png")
        return {
            "id": row.id,
            "prompt": row.prompt,
            "image": self._saved("image", row.image, out),
            "edit_image": [self._saved("edit_image", path, out) for path in row.edit_image],
            "bridge_image": row.bridge_image or None,
            "ref_gt": row.ref_gt and self._saved("ref_gt", row.ref_gt, out),
            "back_mask": out / IMAGES / f"{id}-mask.png" if mask else None,
            "negative_prompt": row.negative_prompt,
            "split": row.split,
            "tag": row.tag,
            "group": group,
            "weight": row.weight if row.weight != 1 else None,
        }

    def _saved(self, name: str, path: Path, out: Path) -> Path:
        """The picture that the row names: the file itself, if it is an ordinary one, else a PNG made of it."""
        image = self._checked(name, path, open_image)
        if path.parent.name == IMAGES:
            return path
        save_png(image, made := out / IMAGES / f"{path.name}.png")
        return made

    def _read_mask(self, path: Path, image: Image.Image) -> Image.Image:
        mask = read_mask(path, self.mask)
        check_mask_shape(mask, image, path)
        return mask

    def _checked(self, name: str, path: Path, read: Callable[[Path], Any]) -> Any:
        try:
            return read(path)
        except RejectedImage as error:
            path.unlink(missing_ok=True)
            raise RejectedImage(Path(self.source.dataset), f"{name}: {error.reason}") from None


def _place(data: bytes, stem: str, out: Path, original: bool = False) -> str:
    """Where the file is, below `out`: in its final place, or among those that need work."""
    ending = None if original else ordinary_ending(data)
    path = Path(IMAGES, stem + ending) if ending else Path(ORIGINALS, stem)
    write_bytes(out / path, data)
    return str(path)
