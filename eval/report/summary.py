"""An evaluation as numbers: `report.json`, from which page, table and card are made."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from eval.scores.intervals import SIGNIFICANT, compare_methods, mean_interval
from eval.scores.metrics.metric import METRICS, Metric
from eval.scores.recorder import Measured, label
from train.record.provenance import provenance

FORMAT_VERSION = 1

Report = dict[str, Any]


def build_report(
    title: str,
    methods: Sequence[Measured],
    prompts: Mapping[str, str],
    unavailable: Mapping[str, str],
    settings: Mapping[str, Any],
    seed: int = 0,
) -> Report:
    """The content of `report.json`: JSON values only.

    Args:
        title: title of the page.
        methods: what was measured; the sources unchanged and the targets among them.
        prompts: instruction by row's id.
        unavailable: reason by metric's name.
        settings: how it was made.
        seed: random seed of the resampling.
    """
    names = [name for name in METRICS if any(name in scores for each in methods for scores in _all_scores(each))]
    return {
        "format_version": FORMAT_VERSION,
        "title": title,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "num_rows": len(prompts),
        "metrics": {name: asdict(METRICS[name]) for name in names},
        "unavailable": dict(unavailable),
        "methods": [_method(each, names, seed) for each in methods],
        "tests": [test for name in names for test in _tests(name, methods, seed)],
        "settings": dict(settings),
        "environment": provenance(),
        "per_row": [
            {
                "id": row,
                "prompt": prompt,
                "scores": {each.name: each.rows[row] for each in methods if row in each.rows},
            }
            for row, prompt in prompts.items()
        ],
    }


def unmeasured(chosen: Iterable[str], methods: Sequence[Measured], unavailable: Mapping[str, str]) -> dict[str, str]:
    """Why each chosen metric is not in the report, in the order of tables: its own reason, or no row has what it looks at."""
    found = {name for each in methods for scores in _all_scores(each) for name in scores}
    reasons = dict.fromkeys(chosen, "no row has what it needs: a mask, or a face") | dict(unavailable)
    return {name: reasons[name] for name in METRICS if name in reasons and name not in found}


def _all_scores(method: Measured) -> list[dict[str, float]]:
    return [*method.rows.values(), method.whole]


def _values(method: Measured, name: str) -> dict[str, float]:
    return {row: scores[name] for row, scores in method.rows.items() if name in scores}


def _method(method: Measured, names: Sequence[str], seed: int) -> dict[str, Any]:
    scores = {}
    for name in names:
        if values := _values(method, name):
            scores[name] = asdict(mean_interval(list(values.values()), seed))
        elif name in method.whole:
            scores[name] = {"mean": method.whole[name], "num_rows": len(method.rows), "low": None, "high": None}
    return {
        "name": method.name,
        "kind": method.kind,
        "baseline": method.baseline,
        "label": label(method.name, method.kind),
        "adapter": method.adapter,
        "steps": method.steps,
        "objective": method.objective,
        "seconds_per_edit": method.seconds,
        "scores": scores,
    }


def _tests(name: str, methods: Sequence[Measured], seed: int) -> list[dict[str, Any]]:
    """On one metric, every edit with the source unchanged, and every two edits; the target is none."""
    measured = {each.name: _values(each, name) for each in methods if each.kind != "target"}
    baselines = {each.name: each.baseline for each in methods if each.baseline}
    found = compare_methods({method: values for method, values in measured.items() if values}, baselines, seed)
    return [{"metric": name, **asdict(each)} for each in found]


def main_methods(report: Report) -> list[dict[str, Any]]:
    """The methods that made edits, without sources and targets."""
    return [method for method in report["methods"] if method["kind"] == "edit"]


def best_methods(report: Report, metric: str) -> set[str]:
    """Names of the method with the best mean and of those that its paired tests (corrected, 0.05) cannot tell from it.

    Empty if that is all of them: then the rows tell nothing apart. In a metric against the target only those count whose mean is
    better than that of the source unchanged.
    """
    means = {each["name"]: each["scores"][metric]["mean"] for each in main_methods(report) if metric in each["scores"]}
    tests = [test for test in tests_of(report, metric) if {test["first"], test["second"]} <= means.keys()]
    if not means or {test[place] for test in tests for place in ("first", "second")} < means.keys():
        return set()
    best = (max if METRICS[metric].better == "higher" else min)(means, key=lambda name: means[name])
    alike = {best}
    for test in tests:
        pair = {test["first"], test["second"]}
        if best in pair and not is_significant(test):
            alike |= pair
    return {name for name in alike if _gains(report, metric, name)} if alike < means.keys() else set()


def is_significant(test: Mapping[str, Any]) -> bool:
    """Whether a comparison's corrected p is below 0.05."""
    return test["p_holm"] is not None and test["p_holm"] < SIGNIFICANT


def _gains(report: Report, metric: str, name: str) -> bool:
    """Whether a method is nearer to the target than the source unchanged, or nobody asks."""
    methods = {each["name"]: each for each in report["methods"]}
    baseline = methods.get(methods[name]["baseline"], {"scores": {}})["scores"].get(metric)
    if METRICS[metric].against != "target" or baseline is None:
        return True
    gain = methods[name]["scores"][metric]["mean"] - baseline["mean"]
    return gain > 0 if METRICS[metric].better == "higher" else gain < 0


def tests_of(report: Report, metric: str) -> list[dict[str, Any]]:
    """The comparisons on one metric."""
    return [test for test in report["tests"] if test["metric"] == metric]


def ranked_rows(report: Report, metric: str) -> list[str]:
    """Rows' ids from best to worst, by the mean of the metric over all methods that made edits."""
    edited = {method["name"] for method in main_methods(report)}
    means = {}
    for row in report["per_row"]:
        values = [scores[metric] for name, scores in row["scores"].items() if name in edited and metric in scores]
        if values:
            means[row["id"]] = sum(values) / len(values)
    return sorted(means, key=lambda row: means[row], reverse=METRICS[metric].better == "higher")


def show_value(metric: Metric, value: float) -> str:
    """With the metric's digits."""
    return f"{value:.{metric.digits}f}"
