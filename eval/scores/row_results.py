"""Rows and their scores: what a row's files say, and the files that a validation and an evaluation write of all of them."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_prep.files import atomic_file, write_text
from data_prep.model.geometry import Size, fit, fit_back_mask, to_image, to_pixels
from data_prep.rows.images import open_image, open_mask
from eval.scores.fidelity import mean_scores
from eval.scores.grid import GridRow, draw_grid, side_by_side
from eval.scores.metrics.metric import Example, Scores
from train.record.loggers import Picture

SOURCE = "source"
"""The baseline's name among the methods: the source image, returned unchanged."""
TARGET = "target"

GRID_ROWS = 8
"""Rows that a grid shows."""
QUALITY = 92


@dataclass(frozen=True)
class Truth:
    """What a row's picture is compared with: RGB pixels in [0, 1], (3, H, W)."""

    target: Tensor
    source: Tensor
    background: Tensor | None
    """True where the picture must stay as it was, (H, W); None without a mask."""

    def example(self, id: str, prompt: str, method: str, prediction: Tensor) -> Example:
        """A picture beside it, pixels as these."""
        return Example(id, prompt, method, prediction, self.target, self.source, self.background)


def read_truth(target: str | Path, source: str | Path, back_mask: str | Path | None, size: Size) -> Truth:
    """Reads a row's files at the size of its picture.

    Raises:
        RejectedImage: one cannot be used.
    """
    pixels = [(to_pixels(fit(open_image(path), size)) + 1) / 2 for path in (target, source)]
    background = None
    if back_mask:
        background = torch.from_numpy(np.array(fit_back_mask(open_mask(back_mask), size)) >= 128)
    return Truth(pixels[0], pixels[1], background)


@dataclass
class RowResult:
    """One row: its scores by method (`source`, `steps_1`, …) and, if it is shown, its pictures at the target's size."""

    id: str
    prompt: str
    scores: dict[str, Scores] = field(default_factory=dict)
    pictures: dict[str, Image.Image] = field(default_factory=dict)
    """By method, and the `target`."""


def unit_image(unit: Tensor) -> Image.Image:
    """Pixels in [0, 1], (3, H, W), as a picture."""
    return to_image(unit * 2 - 1)


def write_results(
    folder: Path,
    rows: Sequence[RowResult],
    shown: Sequence[RowResult],
    seconds: dict[str, list[float]],
    sampler: dict[str, Any] | None,
) -> tuple[dict[str, Any], dict[str, Picture]]:
    """Writes `metrics.json`, `grid.png` and `row-N.jpg`: source, edit with most steps, and target of a row.

    Args:
        folder: is made.
        rows: all of them, each with scores of the source and of every method.
        shown: those that have pictures.
        seconds: per edit, several of each method; the methods are the grid's columns.
        sampler: what made the pictures.

    Returns:
        The content of `metrics.json`, and the pictures: `grid`, then `row-0` and on.
    """
    metrics = summarise(rows, seconds) | {"sampler": sampler}
    pictures = _write_pictures(folder, shown, list(seconds))
    write_text(folder / "metrics.json", json.dumps(metrics, indent=1, ensure_ascii=False) + "\n")
    return metrics, pictures


def _write_pictures(folder: Path, rows: Sequence[RowResult], methods: Sequence[str]) -> dict[str, Picture]:
    with atomic_file(folder / "grid.png") as temporary:
        _draw(rows, methods).save(temporary, format="png")
    pictures = {"grid": Picture(folder / "grid.png")}
    last = [method for method in methods if "/" not in method][-1]
    for number, row in enumerate(rows):
        file = folder / f"row-{number}.jpg"
        with atomic_file(file) as temporary:
            strip = side_by_side([row.pictures[name] for name in (SOURCE, last, TARGET)])
            strip.save(temporary, format="jpeg", quality=QUALITY)
        caption = f"{row.prompt} · {row.scores[last]['psnr']:.1f} dB ({row.id}: source, {last}, target)"
        pictures[f"row-{number}"] = Picture(file, caption)
    for old in set(folder.glob("row-*.jpg")) - {picture.path for picture in pictures.values()}:
        old.unlink()  # of an earlier run with more rows
    return pictures


def _draw(rows: Sequence[RowResult], methods: Sequence[str]) -> Image.Image:
    lines = []
    for row in rows:
        pictures = [row.pictures[name] for name in (SOURCE, *methods, TARGET)]
        captions = [f"{row.scores[method]['psnr']:.1f} dB" for method in (SOURCE, *methods)]
        lines.append(GridRow(row.prompt, pictures, [*captions, ""]))
    return draw_grid(["source", *map(method_label, methods), "target"], lines)


def method_label(method: str) -> str:
    """`4 steps` for `steps_4`, `lbm, white, 4 steps` for `lbm/white/steps_4`; other words as they are."""
    *start, last = method.split("/")
    steps = last.removeprefix("steps_")
    return ", ".join([*start, steps_label(int(steps)) if steps != last else last])


def steps_label(steps: int) -> str:
    """`4 steps`."""
    return f"{steps} step{'s' * (steps > 1)}"


def summarise(rows: Sequence[RowResult], seconds: dict[str, list[float]]) -> dict[str, Any]:
    """The content of `metrics.json`: means by method, over all rows and per instruction, and every row's scores.

    `seconds_per_edit` is the median of sampling and decoding, where they were timed.
    """
    by_prompt: dict[str, list[RowResult]] = {}
    for row in rows:
        by_prompt.setdefault(row.prompt, []).append(row)
    return {
        "num_rows": len(rows),
        **_means(rows),
        "seconds_per_edit": {method: statistics.median(values) for method, values in seconds.items() if values},
        "by_prompt": {prompt: {"num_rows": len(some), **_means(some)} for prompt, some in by_prompt.items()},
        "per_row": [{"id": row.id, "prompt": row.prompt, **row.scores} for row in rows],
    }


def _means(rows: Sequence[RowResult]) -> dict[str, Scores]:
    return {method: mean_scores([row.scores[method] for row in rows]) for method in rows[0].scores}
