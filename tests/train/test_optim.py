"""Optimizers: schedules in closed form, averaged weights that leave training as it was, state restored bit for bit.

Prodigy, which updates many tensors at once, equals its library, which updates one after the other. On a GPU if there is one.
"""

import json
import math
import sys
from typing import Any

import pytest
import torch
from prodigyplus import ProdigyPlusScheduleFree
from torch import nn

from train.optim import AdamW, Prodigy, optimizer_state, restore_optimizer_state, stacked_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

EIGHT_BITS = {"lr": 0.05, "bits": 8, "shape": (80, 64)}
"""bitsandbytes leaves tensors of fewer than 4,096 numbers in 32 bits."""


def quadratic(optimizer_class, steps: int, shape=(40, 36), **options):
    """Trains towards fixed targets; returns the parameters, the optimizer and a function that takes one more step."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE)), nn.Parameter(torch.zeros(7).to(DEVICE))]
    goals = [torch.randn(p.shape, generator=generator).to(DEVICE) for p in params]
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


def test_adamw_shows_the_moving_average_and_goes_on_unchanged():
    """By the recursion itself, in float64, from the weights after each step."""
    params, optimizer, advance, _ = quadratic(AdamW, 0, lr=0.05, ema=0.8)
    plain_params, plain, plain_advance, _ = quadratic(AdamW, 0, lr=0.05)
    with optimizer.averaged():  # before the first step: the weights
        assert torch.equal(params[0], plain_params[0])
    average = torch.zeros_like(params[0], dtype=torch.float64)
    for step in range(30):
        advance(step)
        own = params[0].detach().double().clone()
        decay = min(0.8, (1 + step) / (10 + step)) if step else 0.0
        average = decay * average + (1 - decay) * own
    for step in range(30):
        plain_advance(step)
    with optimizer.averaged(), plain.averaged():
        assert torch.allclose(params[0].double(), average, atol=1e-6)
        assert not torch.allclose(params[0], plain_params[0], atol=1e-3)
    assert torch.equal(params[0], plain_params[0])
    with pytest.raises(ValueError, match=r"optim.ema must lie between 0 and 1, got 1"):
        AdamW(params, ema=1)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (AdamW, {"lr": 0.05, "ema": 0.9}),
        (AdamW, EIGHT_BITS | {"ema": 0.9}),
        (Prodigy, {}),
        (Prodigy, {"betas": [0.95, 0.99]}),
    ],
)
def test_state_is_restored_bit_for_bit(kind, options):
    params, optimizer, advance, _ = quadratic(kind, 20, **options)
    tensors, values = optimizer_state(optimizer.torch_optimizer)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    weights = [p.detach().clone() for p in params]
    expected = [advance(step) for step in range(20, 30)]

    with optimizer.averaged():
        averaged = [p.detach().clone() for p in params]

    fresh_params, fresh, fresh_advance, _ = quadratic(kind, 0, **options)
    for p, weight in zip(fresh_params, weights, strict=True):
        p.data.copy_(weight)
    restore_optimizer_state(fresh.torch_optimizer, tensors, values)
    again, _ = optimizer_state(fresh.torch_optimizer)
    assert all(again[name].dtype == tensor.dtype for name, tensor in tensors.items())
    assert [fresh_advance(step) for step in range(20, 30)] == expected
    with fresh.averaged():
        assert all(torch.equal(p, average) for p, average in zip(fresh_params, averaged, strict=True))


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


SHAPES = [*[(64, 80)] * 5, *[(80, 64)] * 5, *[(48, 48)] * 2, *[(40,)] * 3, *[(8, 8)] * 2, (5,), ()]
"""Wide as A, tall as B, square, vectors as DoRA's, too small for factors; every second one starts at zero."""


class Run:
    """Tensors that approach goals by noisy gradients, which some lack at times and one always; `Library` or `Prodigy`."""

    def __init__(self, kind, **options):
        generator = torch.Generator().manual_seed(0)
        starts = [torch.randn(s, generator=generator) * (0.1 if i % 2 else 0.0) for i, s in enumerate(SHAPES)]
        self.goals = [torch.randn(s, generator=generator).to(DEVICE) for s in SHAPES]
        self.starts = [start.to(DEVICE) for start in starts]
        self.parameters = [nn.Parameter(start.clone()) for start in self.starts]
        self.optimizer = kind(self.parameters, **options)
        self.torch_optimizer: Any = getattr(self.optimizer, "torch_optimizer", self.optimizer)

    def advance(self, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for index, (p, goal) in enumerate(zip(self.parameters, self.goals, strict=True)):
                noise = torch.randn(p.shape, generator=generator).to(DEVICE)
                lacks = index == 3 or (index + step) % 7 == 0
                p.grad = None if lacks else (p.detach() - goal + 0.3 * noise) * 1e-3
            if isinstance(self.optimizer, Prodigy):
                self.optimizer.step(step)
            else:
                self.optimizer.step()

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        tensors, values = optimizer_state(self.torch_optimizer)
        return {name: t.clone().cpu() for name, t in tensors.items()}, json.loads(json.dumps(values))

    def resumed(self, kind, **options) -> "Run":
        run = Run(kind, **options)
        for p, weight in zip(run.parameters, self.parameters, strict=True):
            p.data.copy_(weight)
        restore_optimizer_state(run.torch_optimizer, *self.state())
        return run


def largest(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max((x.detach() - y.detach()).abs().max().item() for x, y in zip(a, b, strict=True))


def difference(ours: Run, library: Run) -> dict[str, float]:
    """Of the step size and of what it is made from, relative; of weights and averages, in units of the way they went."""
    mine, its = (run.torch_optimizer.param_groups[0] for run in (ours, library))
    found = {n: abs(mine[n] / its[n] - 1) for n in ("d", "d_numerator", "d_denom", "effective_lr", "weight_sum")}
    way = largest(library.parameters, library.starts)
    found["weights"] = largest(ours.parameters, library.parameters) / way
    with ours.optimizer.averaged():
        library.torch_optimizer.eval()
        found["averages"] = largest(ours.parameters, library.parameters) / way
    library.torch_optimizer.train()
    return found


EQUAL = {"d": 1e-6, "d_numerator": 1e-4, "d_denom": 2e-3, "effective_lr": 1e-6, "weight_sum": 1e-5}
EQUAL |= {"weights": 2e-5, "averages": 2e-5}
"""Sums of float32 in another order; a tensor's part of the denominator is rounded to bfloat16."""


@pytest.fixture
def few_together(monkeypatch):
    """Stacks of three (64, 80), then of two."""
    for limit in ("NUMBERS_TOGETHER", "NUMBERS_IN_CACHE"):
        monkeypatch.setattr(stacked_step, limit, 3 * 64 * 80)


@pytest.mark.usefixtures("few_together")
@pytest.mark.parametrize("d0", [1e-6, 3e-4])  # 50 steps in which d grows, and some in which it has stopped
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"betas": (0.95, 0.98), "beta3": 0.9, "d_coef": 2.0},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "weight_decay_by_lr": False},
        {"prodigy_steps": 20},
        {"schedulefree_c": 5.0},
        {"eps": None},
        {"factored": False, "use_stableadamw": False},
        {"use_grams": True},
        {"use_focus": True},
    ],
    ids=str,
)
def test_many_tensors_at_once_equal_the_library(options, d0):
    ours, library = Run(Prodigy, d0=d0, **options), Run(ProdigyPlusScheduleFree, d0=d0, **options)
    for run in (ours, library):
        run.advance(range(50))
    found = difference(ours, library)
    assert {name: value for name, value in found.items() if value > EQUAL[name]} == {}
    mine, its = ours.state(), library.state()
    assert {n: (t.shape, t.dtype) for n, t in mine[0].items()} == {n: (t.shape, t.dtype) for n, t in its[0].items()}
    assert mine[1]["state"] == its[1]["state"]


def test_without_a_limit_on_growth_rounding_grows_with_the_step_size():
    ours, library = (Run(kind, d_limiter=False) for kind in (Prodigy, ProdigyPlusScheduleFree))
    for run in (ours, library):
        run.advance(range(50))
    assert max(difference(ours, library)[name] for name in ("d", "weights", "averages")) < 5e-3


@pytest.mark.parametrize(
    "fault",
    [
        {"betas": (0.9, 0.991)},
        {"betas": (0.91, 0.99)},
        {"beta3": 0.99},
        {"use_stableadamw": False},
        {"factored": False},
        {"d0": 1.01e-6},
    ],
    ids=str,
)
def test_the_comparison_sees_faults(fault):
    ours, library = Run(Prodigy, **fault), Run(ProdigyPlusScheduleFree)
    for run in (ours, library):
        run.advance(range(50))
    assert any(value > EQUAL[name] for name, value in difference(ours, library).items())


@pytest.mark.parametrize("options", [{}, {"prodigy_steps": 10}, {"use_speed": True}])
def test_many_tensors_resume_bit_for_bit(options):
    whole, half = Run(Prodigy, d0=3e-4, **options), Run(Prodigy, d0=3e-4, **options)
    whole.advance(range(40))
    half.advance(range(20))
    rest = half.resumed(Prodigy)  # options come with the state
    rest.advance(range(20, 40))
    assert all(torch.equal(a, b) for a, b in zip(rest.parameters, whole.parameters, strict=True))
    mine, its = rest.state(), whole.state()
    assert mine[1] == its[1]
    assert all(torch.equal(mine[0][name], tensor) for name, tensor in its[0].items())


def test_a_checkpoint_of_the_library_goes_on():
    library = Run(ProdigyPlusScheduleFree, d0=3e-4)
    library.advance(range(20))
    ours = library.resumed(Prodigy)
    for run in (ours, library):
        run.advance(range(20, 50))
    found = difference(ours, library)
    assert {name: value for name, value in found.items() if value > EQUAL[name]} == {}


def test_other_options_are_the_library_s_own_step_and_a_warning(caplog):
    ours, library = Run(Prodigy, use_cautious=True), Run(ProdigyPlusScheduleFree, use_cautious=True)
    assert "tensor by tensor, which is slow on a GPU, because of use_cautious=true" in caplog.text
    for run in (ours, library):
        run.advance(range(20))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters, library.parameters, strict=True))
    caplog.clear()
    Prodigy([nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))])
    assert "because of parameters not in float32" in caplog.text
    with ours.optimizer.averaged(), pytest.raises(Exception, match="Not in train mode"):
        ours.advance(range(20, 21))


@pytest.mark.parametrize("was_fused", [False, True])
@pytest.mark.parametrize("is_fused", [False, True])
def test_adamw_goes_on_fused_or_not(was_fused, is_fused):
    """Fused is one kernel for all tensors, on a GPU; checkpoints go from one kind to the other."""
    params, optimizer, advance, _ = quadratic(AdamW, 0, lr=0.05)
    assert optimizer.torch_optimizer.param_groups[0]["fused"] is (DEVICE == "cuda" or None)
    optimizer.torch_optimizer.param_groups[0]["fused"] = was_fused
    for step in range(20):
        advance(step)
    state = optimizer_state(optimizer.torch_optimizer)
    tensors, values = {n: t.clone().cpu() for n, t in state[0].items()}, json.loads(json.dumps(state[1]))
    weights = [p.detach().clone() for p in params]
    expected = [advance(step) for step in range(20, 30)]

    fresh_params, fresh, fresh_advance, _ = quadratic(AdamW, 0, lr=0.05)
    fresh.torch_optimizer.param_groups[0]["fused"] = is_fused
    for p, weight in zip(fresh_params, weights, strict=True):
        p.data.copy_(weight)
    restore_optimizer_state(fresh.torch_optimizer, tensors, values)
    assert fresh.torch_optimizer.param_groups[0]["fused"] is is_fused
    found = [fresh_advance(step) for step in range(20, 30)]
    assert found == (expected if was_fused == is_fused else pytest.approx(expected, rel=1e-5))


@pytest.mark.parametrize(("kind", "on_device"), [("step", False), ("p0", True)])
def test_scalars_go_where_the_optimizer_wants_them(kind, on_device):
    """The meta device stands for a GPU: AdamW counts steps on the CPU unless it is fused."""
    parameter = nn.Parameter(torch.zeros(3, device="meta"))
    for fused in (None, True):
        optimizer = torch.optim.AdamW([parameter])
        optimizer.param_groups[0]["fused"] = fused
        restore_optimizer_state(optimizer, {f"0/{kind}": torch.tensor(5.0)}, {"state": {}, "param_groups": [{}]})
        assert optimizer.state[parameter][kind].is_meta == (on_device or bool(fused))
