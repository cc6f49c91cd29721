"""What the page reads of a training run, also while the run is writing it."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from data_prep.errors import InputError
from eval.report.evaluation_page import score_cell
from eval.report.run_history import RunSummary, curves
from eval.scores.metrics.metric import METRICS
from eval.scores.recorder import label
from eval.scores.row_results import SOURCE

HISTORY = "metrics.jsonl"
NOT_YET = "No numbers yet: they come with the first logged step."


@dataclass(frozen=True)
class Validation:
    """One validation of a run."""

    step: int
    metrics: dict[str, Any] | None
    """The content of its `metrics.json`; None if that is not there or not whole."""
    grid: Path | None
    """Its pictures."""


def find_runs(folder: Path) -> dict[str, Path]:
    """Name -> folder of every run below a folder, the one that was written to last first; links are not followed."""
    found = []
    for root, folders, files in os.walk(folder):
        if HISTORY in files:
            path = Path(root)
            found.append(((path / HISTORY).stat().st_mtime, path.relative_to(folder).as_posix(), path))
            folders.clear()
        folders[:] = [name for name in folders if not name.startswith(".")]
    return {name: path for _, name, path in sorted(found, reverse=True)}


def read_history(path: Path) -> list[dict[str, float]]:
    """The whole lines of a `metrics.jsonl`; the last may be half written, and is left out then."""
    if not path.is_file():
        return []
    history = []
    for line in path.read_bytes().split(b"\n"):
        try:
            fields = json.loads(line)
        except ValueError:
            continue  # being written, or cut off by a kill; the rest is good
        if isinstance(fields, dict) and isinstance(fields.get("step"), int | float):
            history.append({name: value for name, value in fields.items() if isinstance(value, int | float)})
    return history


def read_validations(run: Path) -> list[Validation]:
    """Those of a run, by step; none if it never validated."""
    validations = []
    for folder in sorted(run.glob("validation/step-*")):
        number, grid = folder.name.removeprefix("step-"), folder / "grid.png"
        if number.isdecimal():
            validations.append(Validation(int(number), _metrics(folder), grid if grid.is_file() else None))
    return validations


def _metrics(folder: Path) -> dict[str, Any] | None:
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return metrics if isinstance(metrics, dict) else None


def chosen_run(name: str | None, folder: Path) -> Path:
    """The run of that name; only found ones can be chosen, never a path.

    Raises:
        InputError: it is not there.
    """
    found = find_runs(folder)
    if name not in found:
        raise InputError(f"there is no run {name} any more: look again with the button beside it")
    return found[name]


def curves_html(name: str, history: Sequence[Mapping[str, float]]) -> Markup:
    """The charts of a run, side by side."""
    charts = curves(RunSummary(name, {}, history=[dict(line) for line in history]))
    if not charts:
        why = "None of its losses is a finite number." if any("loss" in line for line in history) else NOT_YET
        return Markup('<p class="quiet">{}</p>').format(why)
    figures = (Markup("<figure><h4>{}</h4>{}</figure>").format(title, chart) for title, chart in charts)
    return Markup('<div class="charts">{}</div>').format(Markup("").join(figures))


def summary_html(history: Sequence[Mapping[str, float]], num_checkpoints: int) -> Markup:
    """The latest numbers of a run in a line."""
    if not history:
        return Markup("")
    latest: dict[str, float] = {}
    for line in history:
        latest |= line
    shown = {"step": f"{int(latest['step']):,}", "checkpoints": str(num_checkpoints)}
    for name, title, form in (
        ("loss", "loss", ".4g"),
        ("lr", "learning rate", ".3g"),
        ("grad_norm", "gradient norm", ".3g"),
    ):
        if name in latest:
            shown[title] = format(latest[name], form)
    if "seconds/step" in latest:
        shown["seconds a step"] = f"{latest['seconds/step']:.3g}"
    if "memory_peak_gib" in latest:
        shown["peak memory"] = f"{latest['memory_peak_gib']:.3g} GiB"
    cells = (Markup("<div><b>{}</b><span>{}</span></div>").format(text, label) for label, text in shown.items())
    return Markup('<div class="numbers">{}</div>').format(Markup("").join(cells))


def scores_html(run: str, validation: Validation) -> Markup:
    """The table of one validation."""
    if validation.metrics is None or "seconds_per_edit" not in validation.metrics:
        return Markup('<p class="quiet">This validation has no metrics.json, or it is being written.</p>')
    scores, seconds = validation.metrics, validation.metrics["seconds_per_edit"]
    methods = [SOURCE, *RunSummary(run, scores).methods]
    metrics = [metric for metric in METRICS.values() if any(metric.name in scores[method] for method in methods)]
    head = Markup("").join(Markup("<th>{}</th>").format(each.label) for each in metrics)
    rows = Markup("")
    for method in methods:
        cells = [score_cell(metric, scores[method], scores[SOURCE] if method != SOURCE else None) for metric in metrics]
        shown = Markup("").join(Markup("<td>{} <small>{}</small></td>").format(each.text, each.gain) for each in cells)
        took = f"{seconds[method]:.3f}" if method in seconds else "–"
        rows += Markup("<tr><td>{}</td>{}<td>{}</td></tr>").format(
            label(method, SOURCE if method == SOURCE else "edit"), shown, took
        )
    rows_text = escape(validation.metrics.get("num_rows", "?"))
    note = Markup('<p class="quiet">{} held-out rows; small numbers: the difference to the source.</p>').format(
        rows_text
    )
    return Markup(
        '<table class="scores"><thead><tr><th></th>{}<th>s per edit</th></tr></thead><tbody>{}</tbody></table>{}'
    ).format(head, rows, note)
