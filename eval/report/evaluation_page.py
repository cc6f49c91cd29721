"""An evaluation as a page: one file with everything inside, and its tables on the terminal."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from rich.console import Console
from rich.table import Table

from data_prep.files import write_text
from eval.report.chart import line_chart
from eval.report.run_history import RunSummary, curves
from eval.report.summary import (
    Report,
    best_methods,
    is_significant,
    main_methods,
    ranked_rows,
    show_value,
    tests_of,
)
from eval.scores.fidelity import MAX_PSNR, mean_scores
from eval.scores.metrics.metric import METRICS, Metric
from eval.scores.row_results import SOURCE, TARGET

THUMBNAIL = 320
"""Longest side of a picture on the page, in pixels."""
PRINTED = 5
"""Metrics side by side on the terminal."""
ARROWS = {"higher": "↑", "lower": "↓"}
CHARTED = (
    "psnr",
    "psnr_edited",
    "psnr_background",
    "ssim",
    "lpips",
    "dists",
    "clip_i",
    "dino",
    "clip_score",
    "structure",
)

MAX_PROMPTS = 12
"""Instructions that have a table of their own."""
EQUAL = "equal"

PictureFile = Callable[[str, str], Path]
"""Method's name, row's id -> the file of the picture."""


@dataclass(frozen=True)
class ScoreCell:
    """A mean as it is shown."""

    text: str
    interval: str = ""
    gain: str = ""
    """Difference to the source unchanged, where that is comparable."""
    better: bool = False
    """Whether that is a gain."""
    best: bool = False


@dataclass(frozen=True)
class ScoreTable:
    """Methods by metrics of one kind."""

    title: str
    note: str
    headings: list[Metric]
    rows: list[tuple[dict[str, Any], list[ScoreCell]]]
    """A method of the report, and its cells."""


GROUPS: dict[str, tuple[str, Callable[[Metric], bool]]] = {
    "Against the target": (
        "How close the image is to the ground truth.",
        lambda metric: metric.against == "target" and not _is_part(metric),
    ),
    "Edited part and background": (
        "Rows with a mask, measured only on the pixels of the part, against the target.",
        lambda metric: _is_part(metric) and not metric.name.endswith("_pie"),
    ),
    "Edited part and background, as in PIE-Bench": (
        "The same rows, with everything outside the part made black. The background is compared with the source.",
        lambda metric: metric.name.endswith("_pie"),
    ),
    "Against the instruction and the source": (
        "Whether the instruction was followed, and whether everything else stayed the same.",
        lambda metric: not _is_part(metric) and metric.against != "target" and not metric.name.startswith("drift"),
    ),
    "Registration": (
        "Shift and zoom of the background against the source. “Drifted” is the share of images beyond 1 px or 0.3 %. The line "
        "“target” shows the drift in the data itself.",
        lambda metric: metric.name.startswith("drift"),
    ),
}


def _is_part(metric: Metric) -> bool:
    return "_edited" in metric.name or "_background" in metric.name


def score_tables(report: Report) -> list[ScoreTable]:
    """The report's tables, those that have anything."""
    tables = []
    for title, (note, belongs) in GROUPS.items():
        headings = [METRICS[name] for name in report["metrics"] if belongs(METRICS[name])]
        best = {metric.name: best_methods(report, metric.name) for metric in headings}
        rows = [
            (method, [_cell(report, method, metric, best[metric.name]) for metric in headings])
            for method in report["methods"]
            if any(metric.name in method["scores"] for metric in headings)
        ]
        if headings:
            tables.append(ScoreTable(title, note, headings, rows))
    return tables


def prompt_tables(report: Report) -> list[ScoreTable]:
    """Means against the target by instruction, of those that several rows have."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in report["per_row"]:
        rows.setdefault(row["prompt"], []).append(row["scores"])
    several = [prompt for prompt, some in rows.items() if len(some) > 1][:MAX_PROMPTS] if len(rows) > 1 else []
    headings = [METRICS[name] for name in CHARTED if name in report["metrics"] and METRICS[name].against == "target"]
    shown = [method for method in report["methods"] if method["kind"] != "target"]
    tables = []
    for prompt in several:
        names = [method["name"] for method in shown]
        means = {name: mean_scores([scores[name] for scores in rows[prompt] if name in scores]) for name in names}
        lines = [
            (each, [score_cell(metric, means[each["name"]], means.get(each["baseline"])) for metric in headings])
            for each in shown
        ]
        tables.append(ScoreTable(f"“{prompt}”", "", headings, lines))
    return tables


def _cell(report: Report, method: dict[str, Any], metric: Metric, best: set[str]) -> ScoreCell:
    scores = {
        each["name"]: {name: score["mean"] for name, score in each["scores"].items()} for each in report["methods"]
    }
    cell = score_cell(metric, scores[method["name"]], scores.get(method["baseline"]))
    score = method["scores"].get(metric.name)
    if score is None or score["low"] is None or cell.text == EQUAL:
        return cell
    interval = f"{show_value(metric, score['low'])} – {show_value(metric, score['high'])}"
    return replace(cell, interval=interval, best=method["name"] in best)


def score_cell(metric: Metric, scores: Mapping[str, float], source: Mapping[str, float] | None = None) -> ScoreCell:
    """A mean, beside that of the source unchanged."""
    value, before = scores.get(metric.name), (source or {}).get(metric.name)
    if value is None:
        return ScoreCell("–")
    if metric.unit == "dB" and value >= MAX_PSNR:
        return ScoreCell(EQUAL)
    text = show_value(metric, value)
    if before is None or metric.against != "target" or (metric.unit == "dB" and before >= MAX_PSNR):
        return ScoreCell(text)
    gain = value - before
    return ScoreCell(text, gain=f"{gain:+.{metric.digits}f}", better=(gain > 0) == (metric.better == "higher"))


def step_charts(report: Report) -> list[tuple[str, Markup]]:
    """Quality against steps, a chart for each of the main metrics, with the intervals; the source unchanged as a line."""
    edited = [method for method in main_methods(report) if method["steps"]]
    counts = sorted({method["steps"] for method in edited})
    charts = []
    for name in (name for name in CHARTED if name in report["metrics"]):
        lines: dict[str, list[tuple[float, float]]] = {}
        bars: dict[str, list[tuple[float, float, float]]] = {}
        for method in edited:
            if score := method["scores"].get(name):
                lines.setdefault(method["adapter"], []).append((method["steps"], score["mean"]))
                if score["low"] is not None:
                    bars.setdefault(method["adapter"], []).append((method["steps"], score["low"], score["high"]))
        source = next((each for each in report["methods"] if each["name"] == SOURCE), None)
        if source and name in source["scores"] and source["scores"][name]["mean"] < MAX_PSNR and len(counts) > 1:
            mean = source["scores"][name]["mean"]
            lines[source["label"]] = [(counts[0], mean), (counts[-1], mean)]
        if lines:
            charts.append((_heading(METRICS[name]), line_chart(lines, "steps", bars)))
    return charts


def _heading(metric: Metric) -> str:
    unit = f", {metric.unit}" if metric.unit and "10" not in metric.unit else ""
    return f"{metric.label}{unit}\N{NO-BREAK SPACE}{ARROWS[metric.better]}"


def shown_rows(report: Report, rank_by: str) -> list[tuple[str, dict[str, Any]]]:
    """The best, the median and the worst row, with what it is."""
    ranked = ranked_rows(report, rank_by)
    if not ranked:
        return []
    places = {"best": 0, "median": len(ranked) // 2, "worst": len(ranked) - 1}
    rows = {row["id"]: row for row in report["per_row"]}
    found: dict[str, str] = {}
    for word, place in places.items():
        found.setdefault(ranked[place], word)  # of fewer than three rows, each once
    return [(word, rows[row]) for row, word in found.items()]


def strip(report: Report, row: dict[str, Any], rank_by: str) -> list[tuple[str, str, str]]:
    """Method's name, label and caption of every picture that is shown of a row: source, edits, target."""
    metric = METRICS[rank_by]
    names = [method["name"] for method in main_methods(report)]
    labels = {method["name"]: method["label"] for method in report["methods"]}
    shown = [(SOURCE, "source"), *((name, labels[name]) for name in names), (TARGET, "target")]

    def caption(name: str) -> str:
        value = row["scores"].get(name, {}).get(rank_by) if name != TARGET else None
        return "" if value is None else f"{metric.label} {show_value(metric, value)}"

    return [(name, text, caption(name)) for name, text in shown]


def write_page(
    path: Path, report: Report, picture: PictureFile | None, rank_by: str, runs: Sequence[RunSummary] = ()
) -> None:
    """Writes the page, with all pictures inside, atomically.

    Args:
        picture: finds a row's pictures; None: there are none.
        runs: whose training is shown.
    """
    rows = [(word, row, strip(report, row, rank_by)) for word, row in shown_rows(report, rank_by)] if picture else []
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    page = environment.get_template("evaluation.html.j2").render(
        report=report,
        tables=score_tables(report),
        prompts=prompt_tables(report),
        runs=runs,
        curves=[chart for run in runs for chart in curves(run)],
        data_url=data_url,
        charts=step_charts(report),
        heading=_heading,
        rank_by=METRICS[rank_by],
        rows=rows,
        picture=lambda method, row: thumbnail(picture(method, row)) if picture else "",
        tests=[(METRICS[name], _test_lines(report, name)) for name in report["metrics"] if tests_of(report, name)],
        metrics=[METRICS[name] for name in report["metrics"]],
        unmeasured=unmeasured_groups(report),
        known=METRICS,
    )
    write_text(path, page)


def _test_lines(report: Report, name: str) -> list[tuple[str, str, str, str, bool]]:
    """Pair, difference, interval, p values, and whether the difference is significant."""
    labels = {method["name"]: method["label"] for method in report["methods"]}
    lines = []
    for test in tests_of(report, name):
        difference, metric = test["difference"], METRICS[name]
        pair = f"{labels[test['first']]} − {labels[test['second']]}"
        mean = f"{difference['mean']:+.{metric.digits}f}"
        interval, p = "–", "–"
        if difference["low"] is not None:
            interval = f"{difference['low']:+.{metric.digits}f} … {difference['high']:+.{metric.digits}f}"
            p = f"{test['p']:.2g} → {test['p_holm']:.2g}"
        lines.append((pair, mean, interval, p, is_significant(test)))
    return lines


def data_url(file: Path) -> str:
    """A PNG as it is."""
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()


def thumbnail(file: Path) -> str:
    """A picture as a data URL, reduced to the page's size."""
    with Image.open(file) as image:
        image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        data = io.BytesIO()
        image.save(data, format="jpeg", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def print_report(report: Report) -> None:
    """The tables on the terminal, means alone, and what could not be measured."""
    console = Console()
    for score_table in (*score_tables(report), *prompt_tables(report)):
        for start in range(0, len(score_table.headings), PRINTED):
            part = slice(start, start + PRINTED)
            table = Table(title=score_table.title, title_justify="left")
            table.add_column("", no_wrap=True)
            for metric in score_table.headings[part]:
                table.add_column(f"{metric.label} {ARROWS[metric.better]}", justify="right", min_width=6)
            for method, cells in score_table.rows:
                shown = (f"[bold]{cell.text}[/]" if cell.best else cell.text for cell in cells[part])
                table.add_row(method["label"], *shown)
            console.print(table)
    if report["settings"]["caution"]:
        console.print(f"caution: {report['settings']['caution']}", highlight=False, markup=False, soft_wrap=True)
    for reason, names in unmeasured_groups(report).items():
        line = f"not measured: {', '.join(names)} ({reason})"
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def unmeasured_groups(report: Report) -> dict[str, list[str]]:
    """The metrics that were not measured, by reason."""
    groups: dict[str, list[str]] = {}
    for name, reason in report["unavailable"].items():
        groups.setdefault(reason, []).append(name)
    return groups
