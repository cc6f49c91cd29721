"""`check.html`: the report as one file with all pictures in it."""

import base64
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image, ImageChops, ImageOps

from data_prep.check.findings import ERRORS, KINDS, Finding
from data_prep.check.report.facts import Facts, caching_text, kind_counts, size_text
from data_prep.check.report.plots import TITLES, histogram
from data_prep.check.report.summary import quantiles
from data_prep.files import write_text
from data_prep.rows.images import RejectedImage, open_image, open_mask
from data_prep.rows.rows import RejectedRow, Row, read_rows

SHEET = 24
"""Rows on the contact sheet."""
THUMBNAIL = 176
"""Pixels of a picture's longer side."""
LISTED_BUCKETS = 30


@dataclass(frozen=True)
class Picture:
    """One picture of a row."""

    label: str
    data: str | None
    """A `data:` URI; None if it cannot be read."""
    title: str
    """Its path, or why it cannot be read."""


@dataclass(frozen=True)
class Shown:
    """A row with its pictures, and what there is to say about it."""

    row: int
    prompt: str
    message: str
    pictures: tuple[Picture, ...]


def write_page(path: Path, facts: Facts) -> None:
    """Writes the page. The few rows that are shown are looked up in the dataset once more, and their pictures read again."""
    worst = facts.survey.worst()
    sample = _sample(facts)
    wanted = {number for found in worst.values() for each in found for number in (each.row, each.other_row) if number}
    rows = _find(facts, wanted | set(sample))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    spreads = facts.spreads
    text = environment.get_template("check.html.j2").render(
        facts=facts,
        kinds=KINDS,
        errors=ERRORS,
        counts=kind_counts(facts),
        worst={kind: [_shown(finding, rows) for finding in worst[kind]] for kind, _ in kind_counts(facts)},
        charts=[(*TITLES[name][:1], quantiles(v), histogram(name, v)) for name, v in spreads.items() if len(v)],
        buckets=facts.layout.buckets[:LISTED_BUCKETS],
        num_more_buckets=len(facts.layout.buckets[LISTED_BUCKETS:]),
        cache=size_text(facts.layout.cache_bytes),
        caching=caching_text(facts),
        sheet=[_pair(rows[number]) for number in sample],
    )
    write_text(path, text)


def _sample(facts: Facts) -> list[int]:
    """Numbers of usable rows, evenly spaced."""
    usable = np.flatnonzero(facts.survey.columns["usable"])
    places = np.linspace(0, len(usable) - 1, min(SHEET, len(usable))).round().astype(int)
    return [int(usable[place]) + 1 for place in places]


def _find(facts: Facts, wanted: set[int]) -> dict[int, Row | RejectedRow]:
    return {row.number: row for row in read_rows(facts.dataset, facts.root, text_to_image=True) if row.number in wanted}


def _pair(row: Row | RejectedRow) -> Shown:
    assert isinstance(row, Row)
    return Shown(row.number, row.prompt, "", tuple(_pictures(row))[:2])


def _shown(finding: Finding, rows: dict[int, Row | RejectedRow]) -> Shown:
    """A finding with the pictures of its row, and of the other row if there is one."""
    row, other = rows[finding.row], rows.get(finding.other_row or 0)
    pictures = list(_pictures(row)) if isinstance(row, Row) else []
    if isinstance(other, Row):
        pictures = pictures[:2] + [_named(each, f"row {other.number}: {each.label}") for each in _pictures(other)][:2]
    message = f"{finding.message} ({finding.path})" if finding.path else finding.message
    return Shown(finding.row, row.prompt if isinstance(row, Row) else "", message, tuple(pictures))


def _named(picture: Picture, label: str) -> Picture:
    return Picture(label, picture.data, picture.title)


def _pictures(row: Row) -> Iterator[Picture]:
    """Source, target, their difference, and the mask; what there is of them."""
    source, target = row.edit_image[row.bridge_image] if row.edit_image else None, row.image
    if source:
        yield _picture("source", source, lambda: open_image(source))
    yield _picture("target", target, lambda: open_image(target))
    if source:
        yield _picture("difference", target, lambda: _difference(open_image(source), open_image(target)))
    if mask := row.back_mask:
        yield _picture("mask", mask, lambda: open_mask(mask))


def _difference(source: Image.Image, target: Image.Image) -> Image.Image:
    """Twice as strong, at a size where a pixel of drift is still seen."""
    small = ImageOps.contain(target, (2 * THUMBNAIL, 2 * THUMBNAIL))
    return ImageChops.difference(ImageOps.fit(source, small.size), small).point(
        [min(255, 2 * level) for level in range(256)] * 3
    )


def _picture(label: str, path: Path, read: Callable[[], Image.Image]) -> Picture:
    try:
        image = read()
    except RejectedImage as error:
        return Picture(label, None, error.reason)
    image.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL))  # twice, for screens of two pixels a pixel
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    data = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    return Picture(label, data, str(path))
