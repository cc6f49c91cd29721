"""Optimizers: schedules in closed form, averaged weights that leave training as it was, state restored bit for bit."""

import math
import sys

import pytest
import torch
from torch import nn

from train.optim import AdamW, Prodigy, optimizer_state, restore_optimizer_state

EIGHT_BITS = {"lr": 0.05, "bits": 8, "shape": (80, 64)}
"""bitsandbytes leaves tensors of fewer than 4,096 numbers in 32 bits."""


def quadratic(optimizer_class, steps: int, shape=(40, 36), **options):
    """Trains towards fixed targets; returns the parameters, the optimizer and a function that takes one more step."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)), nn.Parameter(torch.zeros(7))]
    goals = [torch.randn(p.shape, generator=generator) for p in params]
    optimizer = optimizer_class(params, num_steps=100, **options)

    def advance(step: int) -> float:
        loss = torch.stack([((p - goal) ** 2).mean() for p, goal in zip(params, goals, strict=True)]).sum()
        loss.backward()
        optimizer.step(step)
        return loss.detach().item()

    losses = [advance(step) for step in range(steps)]
    return params, optimizer, advance, losses


def test_schedules():
    cosine = AdamW([nn.Parameter(torch.zeros(1))], lr=2.0, warmup_steps=3, schedule="cosine", num_steps=13)
    assert [cosine.lr_at(step) for step in range(3)] == pytest.approx([0.5, 1.0, 1.5])
    for step in range(3, 13):
        assert cosine.lr_at(step) == pytest.approx(1 + math.cos(math.pi * (step - 3) / 10))
    constant = AdamW([nn.Parameter(torch.zeros(1))], lr=2.0, num_steps=5)
    assert {constant.lr_at(step) for step in range(5)} == {2.0}


@pytest.mark.parametrize(("kind", "options"), [(AdamW, {"lr": 0.05}), (AdamW, EIGHT_BITS), (Prodigy, {})])
def test_it_learns(kind, options):
    *_, losses = quadratic(kind, 60, **options)
    assert losses[-1] < 0.9 * losses[0]


def test_prodigy_exports_the_average_and_goes_on_unchanged():
    """Schedule-free: x is the running mean that y = (1 - beta1) z + beta1 x is made of; evaluation must show x."""
    params, optimizer, advance, _ = quadratic(Prodigy, 30)
    before = [p.detach().clone() for p in params]
    beta1 = optimizer.torch_optimizer.param_groups[0]["betas"][0]
    with optimizer.averaged():
        for p, y in zip(params, before, strict=True):
            z = optimizer.torch_optimizer.state[p]["z"]
            assert torch.allclose(p, (y - (1 - beta1) * z) / beta1, atol=1e-5)
            assert not torch.equal(p, y)
    assert all(torch.equal(p, y) for p, y in zip(params, before, strict=True))
    other_params, _, other_advance, _ = quadratic(Prodigy, 30)
    for step in range(30, 40):
        assert advance(step) == other_advance(step)
    assert all(torch.equal(a, b) for a, b in zip(params, other_params, strict=True))


@pytest.mark.parametrize(
    ("kind", "options"),
    [(AdamW, {"lr": 0.05}), (AdamW, EIGHT_BITS), (Prodigy, {}), (Prodigy, {"betas": [0.95, 0.99]})],
)
def test_state_is_restored_bit_for_bit(kind, options):
    params, optimizer, advance, _ = quadratic(kind, 20, **options)
    tensors, values = optimizer_state(optimizer.torch_optimizer)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    weights = [p.detach().clone() for p in params]
    expected = [advance(step) for step in range(20, 30)]

    fresh_params, fresh, fresh_advance, _ = quadratic(kind, 0, **options)
    for p, weight in zip(fresh_params, weights, strict=True):
        p.data.copy_(weight)
    restore_optimizer_state(fresh.torch_optimizer, tensors, values)
    again, _ = optimizer_state(fresh.torch_optimizer)
    assert all(again[name].dtype == tensor.dtype for name, tensor in tensors.items())
    assert [fresh_advance(step) for step in range(20, 30)] == expected


def test_eight_bits_are_a_quarter_of_the_memory_and_near_thirty_two():
    states, losses = {}, {}
    for bits in (8, 32):
        _, optimizer, _, losses[bits] = quadratic(AdamW, 60, **EIGHT_BITS | {"bits": bits})
        states[bits], _ = optimizer_state(optimizer.torch_optimizer)
    large = {name for name, tensor in states[8].items() if tensor.dtype == torch.uint8}
    assert {tensor.numel() for name, tensor in states[8].items() if name in large} == {80 * 64}
    assert len(large) == 2
    assert losses[8] == pytest.approx(losses[32], abs=0.01 * losses[32][0])


def test_without_bitsandbytes_there_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim.adamw", None)
    with pytest.raises(ValueError, match=r"optim.bits=8 needs bitsandbytes .* run `uv pip install bitsandbytes`"):
        AdamW([nn.Parameter(torch.zeros(1))], bits=8)
    with pytest.raises(ValueError, match="bits must be 8 or 32, got 16"):
        AdamW([nn.Parameter(torch.zeros(1))], bits=16)  # type: ignore[arg-type]


def test_options_that_do_nothing_are_refused():
    params = [nn.Parameter(torch.zeros(1))]
    with pytest.raises(ValueError, match="fused_back_pass"):
        Prodigy(params, fused_back_pass=True)
    with pytest.raises(ValueError, match=r"d_coef=0.84 .* never lets the step size grow"):
        Prodigy(params, d_coef=0.84)
    Prodigy(params, d_coef=0.84, d_limiter=False)
    with pytest.raises(ValueError, match="schedule must be constant or cosine"):
        AdamW(params, schedule="linear")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lr must be positive"):
        AdamW(params, lr=0)
