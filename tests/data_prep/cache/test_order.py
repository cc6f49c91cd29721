"""The order of records: fair after every step, whatever the buckets, and a pure function of seed and step."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.cache.order import Order
from data_prep.errors import InputError


def make_buckets(sizes: dict[str, int]) -> dict[str, list[int]]:
    """Consecutive indices, in buckets of these sizes."""
    buckets, first = {}, 0
    for name, size in sizes.items():
        buckets[name] = list(range(first, first + size))
        first += size
    return buckets


def drawn(order: Order, step: int) -> list[list[int]]:
    return [group.tolist() for group in order.groups(step)]


SIZES = st.dictionaries(st.text(max_size=3), st.integers(1, 20), min_size=1, max_size=6)
SEEDS = st.integers(0, 2**32)


@given(SIZES, SEEDS, st.integers(1, 8), st.integers(1, 9), st.integers(0, 50))
def test_draws_of_any_two_records_differ_by_at_most_one_after_any_number_of_steps(
    sizes, seed, group_size, groups_per_step, first
):
    buckets = make_buckets(sizes)
    order = Order(buckets, seed, group_size, groups_per_step)
    counts = Counter(dict.fromkeys(range(sum(sizes.values())), 0))
    for step in range(12):
        counts.update(index for group in drawn(order, step) for index in group)
        assert max(counts.values()) - min(counts.values()) <= 1
    again = Order(dict(reversed(buckets.items())), seed, group_size, groups_per_step)
    assert drawn(again, first) == drawn(order, first)


@given(SIZES, SEEDS, st.integers(1, 8), st.integers(1, 9), st.integers(0, 20))
def test_a_group_is_of_one_bucket_and_has_no_more_than_its_size(sizes, seed, group_size, groups_per_step, step):
    buckets = make_buckets(sizes)
    bucket_of = {index: name for name, indices in buckets.items() for index in indices}
    groups = drawn(Order(buckets, seed, group_size, groups_per_step), step)
    assert len(groups) == groups_per_step
    assert all(1 <= len(set(group)) == len(group) <= group_size for group in groups)
    names = [{bucket_of[index] for index in group} for group in groups]
    assert all(len(each) == 1 for each in names)
    assert names == sorted(names, key=min), "groups of one bucket are neighbours"


WEIGHTS = st.lists(st.sampled_from([1, 1.5, 2, 3, 10]) | st.floats(0.01, 100), min_size=2, max_size=20)
GOLDEN = [[[3, 2], [6, 7]], [[1, 4], [0]], [[1, 3], [5]], [[2, 4], [0]]]
"""Of the version before there were weights: two buckets of 5 and 3 records, seed 3, groups of 2, 2 a step."""


@given(WEIGHTS, SEEDS, st.integers(1, 4), st.integers(1, 8), st.integers(1, 9))
def test_draws_of_every_record_differ_by_at_most_one_from_its_share_after_any_number_of_steps(
    weights, seed, num_buckets, group_size, groups_per_step
):
    """Its share is its weight, in half draws an epoch of the greatest one, times the epochs that are over; and, as an epoch
    draws no record twice, times those and the one that has begun."""
    shares = np.array(weights) / max(weights) / (2 if min(weights) < max(weights) else 1)
    buckets = {str(n): np.arange(n, len(weights), num_buckets) for n in range(min(num_buckets, len(weights)))}
    order = Order(buckets, seed, group_size, groups_per_step, np.array(weights))
    counts = np.zeros(len(weights))
    for step in range(12):
        for group in order.groups(step):
            assert len(set(group.tolist())) == len(group) <= group_size
            assert len({index % num_buckets for index in group.tolist()}) == 1
            counts[group] += 1
        over = order.epochs(step + 1)
        for epochs in (over, over + 1):
            assert np.abs(counts - epochs * shares).max() <= 1 + 1e-9
    again = Order(buckets, seed, group_size, groups_per_step, np.array(weights))
    assert drawn(again, 7) == drawn(order, 7)


def test_of_all_draws_every_record_has_its_part():
    """Counted without epochs: 600 records of five weights in six buckets, after every step."""
    weights = np.random.default_rng(0).choice([1.0, 2.0, 3.0, 7.5, 20.0], 600)
    order = Order({str(n): np.arange(n, 600, 6) for n in range(6)}, 0, 4, 8, weights)
    counts = np.zeros(600)
    for step in range(400):
        counts += np.bincount(np.concatenate(order.groups(step)), minlength=600)
        assert np.abs(counts - counts.sum() * weights / weights.sum()).max() < 1.1
    assert counts.sum() > 11_000
    means = [counts[weights == weight].mean() for weight in (20.0, 1.0)]
    assert 19 < means[0] / means[1] < 21


def test_steps_mix_records_of_different_weights():
    """A quarter of 400 records weighs three times as much: half of the draws, and about that in every 100 of them."""
    weights = np.where(np.arange(400) < 100, 3.0, 1.0)
    order = Order({"a": np.arange(400)}, 0, 1, 100, weights)
    heavy = [sum(index < 100 for [index] in drawn(order, step)) for step in range(20)]
    assert 35 < min(heavy) <= max(heavy) < 65  # three standard deviations of 100 fair coins


def test_equal_weights_and_none_give_the_order_of_earlier_versions():
    buckets = make_buckets({"a": 5, "b": 3})
    for weights in (None, np.ones(8), np.full(8, 0.3)):
        order = Order(buckets, 3, 2, 2, weights)
        assert [drawn(order, step) for step in range(4)] == GOLDEN


def test_weights_that_nobody_means_are_refused():
    with pytest.raises(InputError, match="more than a million times as much"):
        Order({"a": [0, 1]}, 0, 1, 1, np.array([1e-7, 1.0]))


def test_an_epoch_has_as_few_groups_as_can_be():
    order = Order(make_buckets({"a": 9, "b": 4, "c": 1}), 0, 4, 2)
    assert order.groups_per_epoch == 3 + 1 + 1
    assert order.empty_share == 1 - 14 / 20
    assert sorted(index for step in range(5) for group in drawn(order, step) for index in group) == sorted(
        2 * [*range(14)]
    ), "five steps of two groups are two epochs"


def test_epochs_and_seeds_differ_within_a_bucket_and_between_groups():
    """One bucket of 40: another order each epoch. Forty buckets of one: another order of buckets each epoch."""
    for sizes in ({"a": 40}, {f"{number:02}": 1 for number in range(40)}):
        orders = [
            [drawn(Order(make_buckets(sizes), seed, 1, 1), 40 * epoch + step) for step in range(40)]
            for seed in (0, 1)
            for epoch in (0, 1)
        ]
        assert len({str(order) for order in orders}) == 4
    whole = [np.concatenate(Order(make_buckets({"a": 40}), 0, 40, 1).groups(epoch)).tolist() for epoch in (0, 1)]
    assert whole[0] != whole[1], "inside one group too"
    assert sorted(whole[0]) == sorted(whole[1]) == list(range(40))


def test_steps_mix_buckets():
    """16 groups of 1 from 30 buckets of 10: eight distinct buckets in a step would be a chance of 1 in 10,000."""
    buckets = make_buckets({f"{number:02}": 10 for number in range(30)})
    order = Order(buckets, 0, 1, 16)
    assert all(len({index // 10 for [index] in drawn(order, step)}) > 8 for step in range(15))


def test_a_step_far_away_in_a_million_records_shuffles_one_epoch(monkeypatch):
    sizes = np.random.default_rng(0).multinomial(1_000_000, np.full(60, 1 / 60))
    order = Order(make_buckets({f"{n:02}": int(size) for n, size in enumerate(sizes)}), 0, 4, 32)
    made = []
    generator = order._generator
    monkeypatch.setattr(order, "_generator", lambda *of: made.append(of) or generator(*of))
    assert sum(len(group) for group in order.groups(10_000_000)) <= 128
    order.groups(10_000_001)
    assert len(made) == 61  # a permutation of each bucket, and one of the groups
