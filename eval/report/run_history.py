"""Training runs beside each other: the last validation of each, as an evaluation has it, and how the training went."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from data_prep.errors import InputError
from eval.report.chart import line_chart
from eval.report.summary import Report, build_report
from eval.scores.methods import OBJECTIVES, own_names
from eval.scores.recorder import Measured, label
from eval.scores.row_results import SOURCE, method_label

SCORED = re.compile(r"validation/(white/)?steps_\d+/psnr")


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
        return sorted(
            self.metrics["seconds_per_edit"], key=lambda method: (method.rpartition("/")[0], steps_of(method))
        )


def steps_of(method: str) -> int:
    """4 of `white/steps_4`."""
    return int(method.rpartition("steps_")[2])


def read_runs(folders: Sequence[Path]) -> list[RunSummary]:
    """The last validation of each run, and its history; names are their folders', numbered if they repeat.

    Raises:
        InputError: a folder has no validation.
    """
    names = own_names(folder.resolve().name for folder in folders)
    return [_read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def _read_run(folder: Path, name: str) -> RunSummary:
    found = sorted(folder.glob("validation/step-*/metrics.json"))
    if not found:
        raise InputError(f"{folder} has no validation/step-…/metrics.json: train with validate=lbm or validate=flow")
    history = folder / "metrics.jsonl"
    return RunSummary(
        name=name,
        metrics=json.loads(found[-1].read_text(encoding="utf-8")),
        grid=found[-1].with_name("grid.png"),
        step=int(found[-1].parent.name.removeprefix("step-")),
        history=[json.loads(line) for line in history.read_text().splitlines()] if history.exists() else [],
    )


def compare_runs(title: str, runs: Sequence[RunSummary]) -> Report:
    """The validations of runs as the content of a `report.json`; runs that were validated on other rows have another source."""
    prompts: dict[str, str] = {}
    sources: list[dict[str, Any]] = []
    methods: list[Measured] = []
    for run in runs:
        rows = {row["id"]: row for row in run.metrics["per_row"]}
        prompts |= {id: row["prompt"] for id, row in rows.items()}
        unchanged = {id: row[SOURCE] for id, row in rows.items()}
        if unchanged not in sources:
            sources.append(unchanged)
            number = len(sources)
            methods.append(Measured(SOURCE if number == 1 else f"{SOURCE}-{number}", rows=unchanged, kind="source"))
        baseline = next(each.name for each in methods if each.kind == "source" and each.rows == unchanged)
        for name in run.methods:
            scores = {id: row[name] for id, row in rows.items()}
            whose = ", ".join([run.name, *name.split("/")[:-1]])
            seconds = run.metrics["seconds_per_edit"][name]
            made = (f"{run.name}/{name}", whose, steps_of(name), run.objective, seconds, scores)
            methods.append(Measured(*made, baseline=baseline))
    settings = {"runs": {run.name: run.step for run in runs}, "caution": None, "batch_size": None}
    return build_report(title, methods, prompts, {}, settings)


def curves(run: RunSummary) -> list[tuple[str, Markup]]:
    """Charts of a run's history by title: its losses, and PSNR by step count if it was validated more than once."""
    names = dict.fromkeys(name for line in run.history for name in line)
    terms = [name for name in names if name.startswith("loss/")] or [name for name in names if name == "loss"]
    charts = {f"{run.name}: loss": {name.removeprefix("loss/"): _series(run, name) for name in terms}}
    scored = [name for name in names if SCORED.fullmatch(name)]
    if scored and len(_series(run, scored[0])) > 1:
        shown = {method_label(name[len("validation/") : -len("/psnr")]): _series(run, name) for name in scored}
        shown[label(SOURCE, SOURCE)] = _series(run, f"validation/{SOURCE}/psnr")
        charts[f"{run.name}: PSNR of the validation rows, dB"] = shown
    return [(title, line_chart(series, "optimizer step")) for title, series in charts.items() if any(series.values())]


def _series(run: RunSummary, name: str) -> list[tuple[float, float]]:
    """Finite points alone: the loss of a run that failed is not a number."""
    return [(line["step"], line[name]) for line in run.history if name in line and math.isfinite(line[name])]
