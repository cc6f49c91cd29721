"""What a mean over few rows can say: bootstrap intervals, and a paired test between two methods."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import bootstrap, permutation_test

CONFIDENCE = 0.95
RESAMPLES = 9999
AT_ONCE = 10_000_000
"""Numbers that a resampling may hold in memory."""
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Interval:
    """A mean over rows and the 95 % interval of where it would be with other rows of the kind."""

    mean: float
    num_rows: int
    low: float | None = None
    """None with fewer than two rows."""
    high: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Two methods on the rows that both have."""

    first: str
    second: str
    difference: Interval
    """Interval of the first minus the second."""
    p: float | None
    """Probability of a difference this large if the two were alike; None with fewer than two rows."""
    p_holm: float | None = None
    """The same, corrected for the comparisons of this metric that are of its kind (Holm 1979)."""


def mean_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """The mean and its bootstrap interval: percentiles of the means of 9999 resamples of the rows (Efron 1979)."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Interval(mean, count)
    if min(values) == max(values):
        return Interval(mean, count, mean, mean)
    found = bootstrap(
        (np.asarray(values, dtype=np.float64),),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, AT_ONCE // count),
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, count, float(found.low), float(found.high))


def paired_p(differences: Sequence[float], seed: int = 0) -> float | None:
    """Two-sided p of the mean difference being 0, by a permutation test: every row's sign is as likely as its opposite.

    All combinations of signs up to 13 rows, 9999 random ones beyond. None with fewer than two rows.
    """
    if len(differences) < 2:
        return None
    if not any(differences):
        return 1.0
    result = permutation_test(
        (np.asarray(differences, dtype=np.float64),),
        lambda values, axis: values.mean(axis=axis),
        permutation_type="samples",
        n_resamples=RESAMPLES,
        batch=max(1, AT_ONCE // len(differences)),
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected so that the chance of any false one among them stays what each alone would have (Holm 1979).

    The smallest is multiplied by their number, the next by one less, and so on; none becomes smaller than one before it.
    """
    corrected, running = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        running = max(running, min(1.0, p_values[index] * (len(p_values) - place)))
        corrected[index] = running
    return corrected


def compare_methods(
    scores: Mapping[str, Mapping[str, float]], baselines: Mapping[str, str] | None = None, seed: int = 0
) -> list[Comparison]:
    """Every method with its baseline, then every two methods, on one metric.

    They answer two questions, whether anything was gained and which method is better, and are corrected as two families.

    Args:
        scores: method -> row's id -> value.
        baselines: method -> the one that it is held against; that one is no method itself.
        seed: random seed of the resampling.
    """
    known = {method: baseline for method, baseline in (baselines or {}).items() if {method, baseline} <= scores.keys()}
    methods = [name for name in scores if name not in (baselines or {}).values()]
    families = (known.items(), itertools.combinations(methods, 2))
    return [each for pairs in families for each in _corrected([_compare(scores, *pair, seed) for pair in pairs])]


def _compare(scores: Mapping[str, Mapping[str, float]], first: str, second: str, seed: int) -> Comparison | None:
    """Two methods on the rows that both have; None if there are none."""
    shared = [row for row in scores[first] if row in scores[second]]
    differences = [scores[first][row] - scores[second][row] for row in shared]
    if not differences:
        return None
    return Comparison(first, second, mean_interval(differences, seed), paired_p(differences, seed))


def _corrected(family: Sequence[Comparison | None]) -> list[Comparison]:
    """The comparisons of a family, each with its `p_holm`."""
    found = [each for each in family if each is not None]
    corrected = iter(holm([each.p for each in found if each.p is not None]))
    return [each if each.p is None else replace(each, p_holm=next(corrected)) for each in found]
