"""Which groups of rows become the validation: whole groups, as many rows as asked, each stratum by its share."""

from collections import Counter

import numpy as np
from numpy.typing import NDArray


def choose_validation(
    groups: NDArray[np.int64], strata: NDArray[np.int64], number: int, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Chooses about `number` rows, and of each stratum about the same share, without parting a group.

    Groups are taken in a random order: first those that bring the strata nearer to their shares, then any that fit. If
    none fits, the smallest is taken.

    Args:
        groups: each row's group, numbers from 0 without gaps, shape (N,).
        strata: each row's stratum, any numbers, shape (N,).
        number: rows wanted, in [1, N - 1].
        rng: random generator of all draws.

    Returns:
        Whether a row is chosen, shape (N,). Nobody is if there is one group.
    """
    chosen = np.zeros(len(groups), dtype=bool)
    codes = _pooled(strata, number)
    deficit = _apportion(np.bincount(codes), number, rng).tolist()
    rows = np.argsort(groups, kind="stable")
    sizes = np.bincount(groups)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    order = rng.permutation(len(sizes))

    left, later = number, []
    for group in order:
        size = sizes[group]
        members = rows[starts[group] : starts[group + 1]]
        if size <= left and _brings_nearer(codes[members], deficit):
            chosen[members] = True
            left -= size
        else:
            later.append(group)
        if not left:
            break
    for group in later:
        if sizes[group] <= left:
            chosen[rows[starts[group] : starts[group + 1]]] = True
            left -= sizes[group]
    if left == number and len(sizes) > 1:
        group = order[np.argmin(sizes[order])]
        chosen[rows[starts[group] : starts[group + 1]]] = True
    return chosen


def _brings_nearer(codes: NDArray[np.int64], deficit: list[int]) -> bool:
    """Whether these rows together fill more than they overfill. If so, they are subtracted from the deficit."""
    counts = Counter(codes.tolist())
    if sum(abs(deficit[code]) - abs(deficit[code] - count) for code, count in counts.items()) <= 0:
        return False
    for code, count in counts.items():
        deficit[code] -= count
    return True


def _pooled(strata: NDArray[np.int64], number: int) -> NDArray[np.int64]:
    """Strata as numbers from 0. Those too rare to have a row in the validation share one: prompts often occur once."""
    _, codes, counts = np.unique(strata, return_inverse=True, return_counts=True)
    rare = counts * number < len(strata)
    return np.where(rare, 0, np.cumsum(~rare))[codes]


def _apportion(counts: NDArray[np.int64], number: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """`number` parted in proportion to the counts: rounded down, the rest to the largest remainders."""
    exact = counts * number / counts.sum()
    whole = np.floor(exact).astype(np.int64)
    drawn = rng.permutation(len(counts))  # among equal remainders
    by_remainder = drawn[np.argsort(-(exact - whole)[drawn], kind="stable")]
    whole[by_remainder[: number - whole.sum()]] += 1
    return whole
