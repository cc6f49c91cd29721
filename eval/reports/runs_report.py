"""A page that compares runs by their last validations: what `eval/report.py` writes."""

import base64
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich.console import Console
from rich.table import Table

from data_prep.errors import InputError
from data_prep.files import write_text
from eval.reports.chart import line_chart
from eval.scores.fidelity import MAX_PSNR
from eval.scores.methods import OBJECTIVES
from eval.scores.row_results import method_label

METRICS = {
    "psnr": "PSNR",
    "psnr_edited": "PSNR edited",
    "psnr_background": "PSNR background",
    "ssim": "SSIM",
    "seconds": "s per edit",
}
SCORED = re.compile(r"validation/(white/)?steps_\d+/psnr")
MAX_PROMPTS = 12
SOURCE = "source unchanged"


@dataclass(frozen=True)
class RunSummary:
    """What a report knows of a run."""

    name: str
    metrics: dict[str, Any]
    """The content of a `metrics.json`."""
    grid: Path | None = None
    """Its picture grid."""
    step: int | None = None
    """Optimizer steps at that validation."""
    history: list[dict[str, float]] = field(default_factory=list)
    """The lines of `metrics.jsonl`; empty if there was no training here."""

    @property
    def objective(self) -> str:
        """In words."""
        name: str = self.metrics["sampler"]["name"]
        return OBJECTIVES.get(name, name)

    @property
    def methods(self) -> list[str]:
        """`steps_1`, `steps_4`, …, by number of steps; then those from white, `white/steps_1`, …"""
        return sorted(self.metrics["seconds_per_edit"], key=_by_start_and_steps)


@dataclass(frozen=True)
class Line:
    """One line of a table: a method and its scores, `METRICS` name -> value."""

    label: str
    scores: dict[str, float]


@dataclass(frozen=True)
class Cell:
    """A value as it is shown."""

    text: str
    gain: str = ""
    """Difference to the source unchanged, where that is comparable."""
    best: bool = False


def read_run(folder: Path) -> RunSummary:
    """The last validation of a run, and its history.

    Raises:
        InputError: the folder has no validation.
    """
    found = sorted(folder.glob("validation/step-*/metrics.json"))
    if not found:
        raise InputError(f"{folder} has no validation/step-…/metrics.json: train with validate=lbm or validate=flow")
    history = folder / "metrics.jsonl"
    return RunSummary(
        name=folder.resolve().name,
        metrics=json.loads(found[-1].read_text(encoding="utf-8")),
        grid=found[-1].with_name("grid.png"),
        step=int(found[-1].parent.name.removeprefix("step-")),
        history=[json.loads(line) for line in history.read_text().splitlines()] if history.exists() else [],
    )


def table_lines(runs: Sequence[RunSummary], prompt: str | None = None) -> list[Line]:
    """The source unchanged, then every run at every step count; over all rows, or one instruction's."""
    lines: list[Line] = []
    for run in runs:
        scores = run.metrics if prompt is None else run.metrics["by_prompt"].get(prompt)
        if scores is None:
            continue
        source = Line(SOURCE, scores["source"])
        if source not in lines:  # again for a run that was validated on other rows
            lines.append(source)
        for method in run.methods:
            seconds = {"seconds": run.metrics["seconds_per_edit"][method]}
            lines.append(Line(f"{run.name}, {method_label(method)}", scores[method] | seconds))
    return lines


def _by_start_and_steps(method: str) -> tuple[str, int]:
    start, _, steps = method.rpartition("/")
    return start, int(steps.removeprefix("steps_"))


def table_columns(lines: Sequence[Line]) -> dict[str, str]:
    """The metrics that any line has, with their headings."""
    return {name: heading for name, heading in METRICS.items() if any(name in line.scores for line in lines)}


def table_cells(lines: Sequence[Line]) -> list[tuple[str, list[Cell]]]:
    """Every line's label and cells, the best of each column marked."""
    columns = table_columns(lines)
    best = {name: _best(name, lines) for name in columns}
    rows, source = [], {}
    for line in lines:
        if line.label == SOURCE:
            source = line.scores
        rows.append((line.label, [_cell(name, line, source, best[name]) for name in columns]))
    return rows


def _best(name: str, lines: Sequence[Line]) -> float | None:
    values = [line.scores[name] for line in lines if line.label != SOURCE and name in line.scores]
    if len(values) < 2:
        return None
    return min(values) if name == "seconds" else max(values)


def _cell(name: str, line: Line, source: dict[str, float], best: float | None) -> Cell:
    if name not in line.scores:
        return Cell("–")
    value, digits = line.scores[name], 2 if name.startswith("psnr") else 3
    if name.startswith("psnr") and value >= MAX_PSNR:
        return Cell("equal")
    comparable = source.get(name, MAX_PSNR) < MAX_PSNR
    gain = f"{value - source[name]:+.{digits}f}" if comparable else ""
    return Cell(f"{value:.{digits}f}", gain, value == best and line.label != SOURCE)


def curves(run: RunSummary) -> list[tuple[str, Markup]]:
    """Charts of a run's history by title: its losses, and PSNR by step count if it was validated more than once."""
    names = dict.fromkeys(name for line in run.history for name in line)
    terms = [name for name in names if name.startswith("loss/")] or [name for name in names if name == "loss"]
    charts = {f"{run.name}: loss": {name.removeprefix("loss/"): _series(run, name) for name in terms}}
    scored = [name for name in names if SCORED.fullmatch(name)]
    if scored and len(_series(run, scored[0])) > 1:
        shown = {method_label(name[len("validation/") : -len("/psnr")]): _series(run, name) for name in scored}
        shown[SOURCE] = _series(run, "validation/source/psnr")
        charts[f"{run.name}: PSNR of the validation rows, dB"] = shown
    return [(title, line_chart(series, "optimizer step")) for title, series in charts.items() if any(series.values())]


def _series(run: RunSummary, name: str) -> list[tuple[float, float]]:
    """Finite points alone: the loss of a run that failed is not a number."""
    return [(line["step"], line[name]) for line in run.history if name in line and math.isfinite(line[name])]


def write_report(path: Path, title: str, runs: Sequence[RunSummary]) -> None:
    """Writes the page, with all pictures inside, atomically."""
    prompts = dict.fromkeys(prompt for run in runs for prompt in run.metrics["by_prompt"])
    shown = list(prompts)[:MAX_PROMPTS] if len(prompts) > 1 else []
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    page = environment.get_template("runs_report.html.j2").render(
        title=title,
        runs=runs,
        tables=[(prompt, table_lines(runs, prompt)) for prompt in (None, *shown)],
        num_hidden=len(prompts) - len(shown) if shown else 0,
        columns=table_columns,
        cells=table_cells,
        charts=[chart for run in runs for chart in curves(run)],
        picture=_data_url,
    )
    write_text(path, page)


def _data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def print_table(runs: Sequence[RunSummary]) -> None:
    """The report's tables on the terminal."""
    prompts = list(dict.fromkeys(prompt for run in runs for prompt in run.metrics["by_prompt"]))
    for prompt in (None, *(prompts[:MAX_PROMPTS] if len(prompts) > 1 else [])):
        lines = table_lines(runs, prompt)
        table = Table(title=prompt or "all instructions", title_justify="left")
        table.add_column("", no_wrap=True)
        for heading in table_columns(lines).values():
            table.add_column(heading, justify="right")
        for label, cells in table_cells(lines):
            table.add_row(label, *(f"[bold]{cell.text}[/]" if cell.best else cell.text for cell in cells))
        Console().print(table)
