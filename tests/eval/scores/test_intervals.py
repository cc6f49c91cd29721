"""Intervals and tests against what can be worked out by hand, and what an evaluation makes of them."""

import numpy as np
import pytest

from eval.report.evaluation_page import unmeasured_groups
from eval.report.summary import best_methods, build_report, ranked_rows, unmeasured
from eval.scores.intervals import compare_methods, holm, mean_interval, paired_p
from eval.scores.metrics.metric import METRICS
from eval.scores.recorder import Kind, Measured, label


def test_the_interval_of_two_values_are_the_values():
    """Resampled means are 0, 0.5 and 1 with probabilities 1/4, 1/2, 1/4: the 2.5 % and 97.5 % points are 0 and 1."""
    interval = mean_interval([0.0, 1.0])
    assert (interval.mean, interval.low, interval.high, interval.num_rows) == (0.5, 0.0, 1.0, 2)


def test_the_interval_of_many_is_the_normal_one():
    values = np.random.default_rng(0).normal(3, 2, 400)
    interval, half = mean_interval(values.tolist()), 1.96 * values.std() / 20
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert mean_interval(values.tolist()) == interval  # of one seed


def test_too_few_and_equal_values():
    alone, equal = mean_interval([2.0]), mean_interval([2.0, 2.0, 2.0])
    assert (alone.mean, alone.low, alone.high) == (2, None, None)
    assert (equal.mean, equal.low, equal.high) == (2, 2, 2)
    assert paired_p([1.0]) is None
    assert paired_p([0.0, 0.0]) == 1


def test_p_is_the_share_of_signs_that_give_as_much():
    assert paired_p([1.0, 2.0, 3.0]) == pytest.approx(2 / 8)  # +++ and −−−
    assert paired_p([1.0, 2.0, -3.0]) == pytest.approx(1)
    assert paired_p([1.0, 2.0, -1.0, 4.0]) == pytest.approx(6 / 16)  # |sum| of 6 or more
    assert paired_p([1.0] * 30) == pytest.approx(2 / 10000, abs=2e-4)  # random signs beyond 13 rows


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_methods_are_compared_on_the_rows_that_both_have():
    found = compare_methods({"a": {"1": 1.0, "2": 2.0, "3": 9.0}, "b": {"1": 0.0, "2": 0.0}, "c": {"9": 1.0}})
    (pair,) = found
    assert (pair.first, pair.second, pair.difference.mean, pair.difference.num_rows) == ("a", "b", 1.5, 2)
    assert pair.p == pair.p_holm == 0.5


def test_gains_on_the_source_and_differences_between_methods_are_corrected_apart():
    rows = [f"r{number}" for number in range(8)]
    source = dict.fromkeys(rows, 0.0)
    scores = {"source": source} | {
        name: {row: height + 0.01 * place for place, row in enumerate(rows)} for name, height in (("a", 1), ("b", 2))
    }
    found = {(each.first, each.second): each for each in compare_methods(scores, {"a": "source", "b": "source"})}
    assert found.keys() == {("a", "source"), ("b", "source"), ("a", "b")}
    assert all(each.p == pytest.approx(2 / 256) for each in found.values())
    assert found["a", "b"].p_holm == pytest.approx(2 / 256)  # alone in its family
    assert found["a", "source"].p_holm == found["b", "source"].p_holm == pytest.approx(4 / 256)
    assert {pair for pair in found if "c" in pair} == set()
    assert compare_methods({"a": source, "source": source}, {"a": "source-2"})[0].second == "source"  # of another size


def measured(name: str, values: list[float], metric: str = "psnr") -> Measured:
    adapter, slash, steps = name.partition("/steps_")
    rows = {f"r{number}": {metric: value} for number, value in enumerate(values)}
    if not slash:
        return Measured(name, rows=rows, kind="source" if name == "source" else "target")
    return Measured(name, adapter, int(steps), "flow", 1.0, rows, baseline="source")


PROMPTS = {f"r{number}": "edit" for number in range(8)}
BASE = [20.0, 21, 22, 23, 24, 25, 26, 27]


def higher(*gains: float) -> list[float]:
    """The values of `BASE` with gains of their own, in turn."""
    return [value + gains[number % len(gains)] for number, value in enumerate(BASE)]


def marked(*methods: Measured, metric: str = "psnr") -> set[str]:
    return best_methods(build_report("t", methods, PROMPTS, {}, {"dataset": "d"}), metric)


def test_marks_are_by_the_corrected_p():
    """Eight signs give a p of 2/256; of 21 pairs, as seven methods have, that is 0.16, and of three 0.02."""
    few = [measured(f"m{number}/steps_1", higher(number + 1)) for number in range(3)]
    assert marked(*few) == {"m2/steps_1"}
    many = [measured(f"m{number}/steps_1", higher(number + 1)) for number in range(7)]
    assert marked(*many) == set()
    assert marked(measured("source", BASE), *few) == {"m2/steps_1"}  # the pairs with the source take nothing away


@pytest.mark.parametrize(("metric", "sign"), [("psnr", 1), ("lpips", -1)])
def test_what_is_further_from_the_target_than_the_source_is_never_marked(metric, sign):
    source = measured("source", [sign * value for value in higher(0)], metric)
    worse = [measured(f"m{n}/steps_1", [sign * value for value in higher(-n - 1)], metric) for n in range(3)]
    assert marked(source, *worse, metric=metric) == set()
    assert marked(*worse, metric=metric) == {"m0/steps_1"}  # without a source nobody can know
    better = measured("b/steps_1", [sign * value for value in higher(1)], metric)
    assert marked(source, better, *worse, metric=metric) == {"b/steps_1"}
    alike = measured("c/steps_1", [sign * value for value in higher(-9, 10)], metric)  # mean: +0.5
    below = measured("d/steps_1", [sign * value for value in higher(-10, 9)], metric)  # mean: −0.5
    assert marked(source, better, alike, below, worse[2], metric=metric) == {"b/steps_1", "c/steps_1"}


def test_against_the_source_there_is_nothing_to_beat():
    source = measured("source", [0.0] * 8, "structure")
    edits = [measured(f"m{n}/steps_1", higher(n), "structure") for n in range(2)]
    assert marked(source, *edits, metric="structure") == {"m0/steps_1"}


def test_a_run_may_be_called_target_or_source():
    methods = [measured("source", BASE), measured("target", [1.0] * 8, "drifted")]
    methods += [measured("target-removal/steps_1", higher(1)), measured("source/steps_1", higher(2))]
    report = build_report("t", methods, PROMPTS, {}, {"dataset": "d"})
    names = {"target-removal/steps_1", "source/steps_1"}
    assert {each["name"] for each in report["methods"] if each["kind"] == "edit"} == names
    assert {(each["first"], each["second"]) for each in report["tests"]} == {
        ("target-removal/steps_1", "source"),
        ("source/steps_1", "source"),
        ("target-removal/steps_1", "source/steps_1"),
    }
    assert best_methods(report, "psnr") == {"source/steps_1"}


def test_the_best_is_marked_with_those_that_cannot_be_told_from_it():
    methods = [measured("source", BASE), measured("a/steps_1", BASE)]
    methods += [measured("a/steps_4", higher(3)), measured("b/steps_4", higher(6, -0.2))]
    report = build_report("t", methods, PROMPTS, {}, {"dataset": "d"})
    assert best_methods(report, "psnr") == {"a/steps_4", "b/steps_4"}
    assert ranked_rows(report, "psnr")[-1] == "r1"  # means over the three: 21.9; r0: 23
    few = build_report(
        "t",
        [measured(each.name, [*values]) for each, values in zip(methods, ([1], [1], [2], [3]), strict=True)],
        PROMPTS,
        {},
        {"dataset": "d"},
    )
    assert best_methods(few, "psnr") == set()  # one row tells nothing apart


def test_every_chosen_metric_is_measured_or_has_a_reason():
    missing = {"dists": "no file", "clip_i": "no weights", "lpips": "no file", "clip_score": "no weights"}
    reasons = unmeasured({"psnr", "identity", *missing}, [measured("a/steps_1", [1.0])], missing)
    assert reasons == missing | {"identity": "no row has what it needs: a mask, or a face"}
    assert [name for name in METRICS if name in reasons] == list(reasons)  # the same in every report
    assert unmeasured_groups({"unavailable": reasons}) == {
        "no file": ["lpips", "dists"],
        "no weights": ["clip_score", "clip_i"],
        reasons["identity"]: ["identity"],
    }


def test_labels():
    named: dict[str, Kind] = {"a/steps_1": "edit", "my-run/steps_4": "edit", "source": "source", "target-2": "target"}
    assert [label(name, kind) for name, kind in named.items()] == [
        "a, 1 step",
        "my-run, 4 steps",
        "source unchanged",
        "target, size 2",
    ]
