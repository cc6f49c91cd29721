"""Intervals and tests against what can be worked out by hand, and what an evaluation makes of them."""

import numpy as np
import pytest

from eval.evaluation.intervals import compare_methods, holm, mean_interval, paired_p
from eval.evaluation.recorder import Measured, label
from eval.evaluation.summary import best_methods, build_report, ranked_rows, unmeasured


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


def measured(name: str, values: list[float], metric: str = "psnr") -> Measured:
    adapter, slash, steps = name.partition("/steps_")
    rows = {f"r{number}": {metric: value} for number, value in enumerate(values)}
    return Measured(name, adapter if slash else None, int(steps) if slash else None, "flow", 1.0, rows)


def test_the_best_is_marked_with_those_that_cannot_be_told_from_it():
    base = [20.0, 21, 22, 23, 24, 25, 26, 27]
    better, alike = [value + 3 for value in base], [value + 3.1 * (-1) ** i + 2.9 for i, value in enumerate(base)]
    methods = [measured("source", base), measured("a/steps_1", base)]
    methods += [measured("a/steps_4", better), measured("b/steps_4", alike)]
    prompts = {f"r{number}": "edit" for number in range(8)}
    report = build_report("t", methods, prompts, {}, {"dataset": "d"})
    assert best_methods(report, "psnr") == {"a/steps_4", "b/steps_4"}
    assert ranked_rows(report, "psnr")[-1] == "r1"  # means over the three: 21.9; r0: 23
    few = build_report(
        "t",
        [measured(each.name, [*values]) for each, values in zip(methods, ([1], [1], [2], [3]), strict=True)],
        prompts,
        {},
        {"dataset": "d"},
    )
    assert best_methods(few, "psnr") == set()  # one row tells nothing apart


def test_every_chosen_metric_is_measured_or_has_a_reason():
    reasons = unmeasured(["psnr", "identity", "lpips"], [measured("a/steps_1", [1.0])], {"lpips": "no weights"})
    assert reasons == {"lpips": "no weights", "identity": "no row has what it looks at: a mask, or a face"}


def test_labels():
    assert [label(name) for name in ("a/steps_1", "my-run/steps_4", "source", "target-2")] == [
        "a, 1 step",
        "my-run, 4 steps",
        "source unchanged",
        "target, size 2",
    ]
