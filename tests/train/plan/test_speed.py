"""The time of a step against sums by hand, on a GPU of round numbers."""

import pytest

from train.config import ParallelConfig
from train.plan.gpus import Gpu
from train.plan.speed import BUSY, LINK_BUSY, Step, communication

PLAIN = Gpu("round", 10, tflops=100, int8=400, bandwidth=1000, pcie=10, nvlink=100)
OVER_PCIE = Gpu("round", 10, tflops=100, bandwidth=1000, pcie=10)
WORK = Step(flops=30 * 10**12, forward=1 / 3)
"""A second at 30 % of 100 TFLOP/s, a third of it forward."""
SECOND = round(10 * 1e9 * LINK_BUSY)
"""Bytes that PCIe brings in one."""


def seconds(gpu: Gpu = PLAIN, weights: str = "bf16", **more) -> float:
    return Step(WORK.flops, forward=WORK.forward, **more).seconds(gpu, weights, utilisation=0.3)


def test_copies_cost_what_they_take_longer_than_computing():
    """Each pass hides a copy as long as itself: a third of a second forward, two thirds backward."""
    assert seconds() == pytest.approx(1)
    assert seconds(copied=2 * SECOND // 3) == pytest.approx(1)
    assert seconds(copied=SECOND) == pytest.approx(1 / 2 + 2 / 3)
    assert seconds(copied=4 * SECOND) == pytest.approx(4)


def test_gathered_weights_share_pcie_with_copies_unless_there_is_nvlink():
    assert seconds(OVER_PCIE, gathered=SECOND, copied=SECOND) == pytest.approx(2)
    assert seconds(PLAIN, gathered=10 * SECOND, copied=SECOND) == pytest.approx(1 / 2 + 2 / 3)
    assert seconds(PLAIN, gathered=40 * SECOND) == pytest.approx(4)


def test_gradients_are_waited_for():
    assert seconds(OVER_PCIE, reduced=SECOND) == pytest.approx(2)
    assert seconds(PLAIN, reduced=SECOND) == pytest.approx(1.1)


def test_8_bit_products_have_their_own_speed_and_rounding_takes_memory():
    assert seconds(weights="int8", flops_8bit=120 * 10**12) == pytest.approx(2)
    assert seconds(weights="int8", rounded=1000 * 1e9 * BUSY) == pytest.approx(2)


def test_a_ring_brings_each_rank_what_the_others_have():
    frozen, lora, ranks = 800, 80, 4
    assert communication(ParallelConfig("ddp"), 1, 5, 5, frozen, lora) == (0, 0)
    assert communication(ParallelConfig("ddp"), ranks, 5, 5, frozen, lora) == (0, 120)
    assert communication(ParallelConfig("zero2"), ranks, 5, 5, frozen, lora) == (0, 60 * 13)
    assert communication(ParallelConfig("zero3"), ranks, 5, 5, frozen, lora) == (5 * 1200, 120)
