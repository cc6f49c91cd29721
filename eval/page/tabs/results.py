"""Finished pictures: kept in the output folder, shown with what made them."""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape
from PIL import Image

from data_prep.model.geometry import Size, fit
from data_prep.rows.images import open_image
from eval.request.provenance import write_png
from eval.request.request import EditResult

FOLDER = "results"
FIRST = ("prompt", "mode", "seed", "steps", "seconds", "width", "height", "sampler", "adapters", "base", "model")
"""Settings that are shown first, in this order."""


@dataclass(frozen=True)
class Picture:
    """One result, as the page keeps it between clicks."""

    path: Path
    """The PNG with its settings inside."""
    settings: dict[str, Any]
    """With the time that it took, for reading."""


def save_results(results: Sequence[EditResult], sources: Sequence[tuple[str, str]], out: Path) -> list[Picture]:
    """Writes one PNG for each result into `out/results`, named by time and seed."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    pictures = []
    for result in results:
        path = _free(out / FOLDER / f"edit-{stamp}-seed{result.seed}.png")
        write_png(result, sources, path)
        pictures.append(Picture(path, result.settings | {"seconds": round(result.seconds, 2)}))
    return pictures


def _free(path: Path) -> Path:
    """The path, or the first numbered one that is not there yet."""
    number, free = 2, path
    while free.exists():
        free, number = path.with_stem(f"{path.stem}-{number}"), number + 1
    return free


def beside(source: Image.Image, result: Path) -> tuple[Image.Image, Image.Image]:
    """The source in the result's size, and the result: what the slider compares."""
    after = open_image(result)
    return fit(source, Size.of(after)), after


def settings_html(settings: dict[str, Any]) -> Markup:
    """A table for reading; the file itself carries the settings for machines."""
    ordered = [name for name in FIRST if name in settings] + [name for name in settings if name not in FIRST]
    rows = (f"<tr><th>{escape(_label(name))}</th><td>{escape(_text(settings[name]))}</td></tr>" for name in ordered)
    return Markup(f'<table class="settings">{"".join(rows)}</table>')


def _label(name: str) -> str:
    return name.replace("_", " ")


def _text(value: Any) -> str:
    """JSON without what is noise to a reader: quotes and brackets of simple values."""
    if isinstance(value, dict):
        return ", ".join(f"{_label(str(name))}: {_text(each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(map(_text, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    if value is None:
        return "–"
    return re.sub(r"\s+", " ", value).strip() or "–" if isinstance(value, str) else json.dumps(value)
