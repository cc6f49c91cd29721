"""Solvers on equations whose solution is known, against their formulas in float64, and against diffusers' own schedules."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from eval.qwen.samplers.sigmas import linear_sigmas, qwen_sigmas
from eval.qwen.samplers.solvers import SOLVERS, Flow, make_step

MEAN, SPREAD = 0.7, 0.4
START = torch.linspace(-2, 2, 32, dtype=torch.float64).view(2, 16, 1, 1)


def path(start: Tensor, sigma: float) -> Tensor:
    """Of noise to a normal distribution (MEAN, SPREAD): the probability flow is known."""
    return (1 - sigma) * MEAN + math.sqrt(sigma**2 + ((1 - sigma) * SPREAD) ** 2) * start


def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
    """d path / d sigma at the point of the path that `latents` are."""
    s = sigma[:, None, None, None]
    variance = s**2 + ((1 - s) * SPREAD) ** 2
    return -MEAN + (s - (1 - s) * SPREAD**2) / variance * (latents - (1 - s) * MEAN)


def solve(solver: str, flow: Flow, latents: Tensor, sigmas: list[float]) -> Tensor:
    step = make_step(solver, sigmas)  # type: ignore[arg-type]
    for k in range(len(sigmas) - 1):
        latents = step(flow, latents, k)
    return latents


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("dpmpp-2m", 2), ("unipc", 2)])
@pytest.mark.parametrize("spacing", ["even", "qwen"])
def test_the_error_falls_with_the_solvers_order(solver, order, spacing):
    """Measured over the way to the last position before 0, beyond which every solver takes one step of Euler's, on sigmas
    that are refined between two fixed ends. UniPC does better than its predictor's order."""
    errors = []
    for num_steps in (40, 80, 160):
        whole = linear_sigmas(num_steps) if spacing == "even" else qwen_sigmas(num_steps, 4096)
        ways = [sigma for sigma in whole if sigma > 0.0999]
        sigmas = [0.9 * (sigma - ways[-1]) / (1 - ways[-1]) + 0.1 for sigma in ways]
        step, reached = make_step(solver, [*sigmas, 0.0]), START.float()  # type: ignore[arg-type]
        for k in range(len(sigmas) - 1):
            reached = step(velocity, reached, k)
        errors.append((reached - path(START, sigmas[-1])).abs().max().item())
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert min(orders) > order - 0.3
    assert solver == "unipc" or max(orders) < order + 0.4


@pytest.mark.parametrize("solver", SOLVERS)
def test_it_ends_at_the_solution(solver):
    """In 40 of Qwen's steps: the last one, from sigma = 0.02, costs every solver the same."""
    reached = solve(solver, velocity, START.float(), qwen_sigmas(40, 4096))
    assert (reached - path(START, 0)).abs().max() < (0.06 if solver == "euler" else 0.03)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_straight_path_is_walked_without_error(solver):
    target = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(2))
    for num_steps in (1, 2, 3, 20):
        reached = solve(solver, lambda x, sigma: noise - target, noise, qwen_sigmas(num_steps, 256))
        assert torch.allclose(reached, target, atol=2e-5)


def heun(flow: Flow, x: Tensor, sigmas: list[float]) -> Tensor:
    """Karras et al., algorithm 1, on d x / d sigma = flow."""
    for sigma, following in pairwise(sigmas):
        slope = flow(x, x.new_full((2,), sigma))
        euler = x + (following - sigma) * slope
        if following:
            other = flow(euler, x.new_full((2,), following))
            euler = x + (following - sigma) * (slope + other) / 2
        x = euler
    return x


def dpmpp_2m(flow: Flow, x: Tensor, sigmas: list[float]) -> Tensor:
    """Lu et al., algorithm 2, with alpha = 1 − sigma: the first and the last step are of first order."""
    before = before_snr = None
    for sigma, following in pairwise(sigmas):
        picture = x - sigma * flow(x, x.new_full((2,), sigma))
        snr = math.log((1 - sigma) / sigma) if sigma < 1 else -math.inf
        snr_following = math.log((1 - following) / following) if following else math.inf
        drawn = picture
        if before is not None and following and before_snr != -math.inf:
            ratio = (snr - before_snr) / (snr_following - snr)
            drawn = (1 + 1 / (2 * ratio)) * picture - 1 / (2 * ratio) * before
        x = following / sigma * x + (1 - following) * -math.expm1(snr - snr_following) * drawn
        before, before_snr = picture, snr
    return x


def unipc(flow: Flow, x: Tensor, sigmas: list[float]) -> Tensor:
    """Zhao et al., UniPC-2 with B(h) = e^h − 1 for predicted pictures, warmed up by order 1, order 1 at the end."""

    def snr(sigma: float) -> float:
        return math.log((1 - sigma) / sigma) if sigma else math.inf

    sigmas = [min(sigmas[0], 1 - 1e-6), *sigmas[1:]]  # diffusers' start, where the ratio is finite
    pictures: list[Tensor] = []
    corrected = x
    for k, sigma in enumerate(sigmas[:-1]):
        now = x - sigma * flow(x, x.new_full((2,), sigma))
        if k:  # UniC: the step that led here again, with the picture that is seen here
            x = _unified(corrected, pictures[-2:], now, sigmas[max(0, k - 2) : k + 1], min(k, 2), snr)
        corrected = x
        pictures.append(now)
        order = 1 if k in (0, len(sigmas) - 2) else 2
        x = _unified(corrected, pictures[-2:], None, sigmas[max(0, k - 1) : k + 2], order, snr)
    return x


def _unified(x, pictures, seen, sigmas, order, snr):
    """From sigmas[-2] to sigmas[-1]: UniP without, UniC with the picture that is seen there."""
    sigma, following = sigmas[-2:]
    h = snr(following) - snr(sigma)
    base, weight = -math.expm1(-h), math.expm1(-h)  # B(h) of a predicted picture, hh = −h
    reached = following / sigma * x + (1 - following) * base * pictures[-1]
    ratios, differences = [], []
    if order == 2:
        ratios.append((snr(sigmas[-3]) - snr(sigma)) / h)
        differences.append((pictures[-2] - pictures[-1]) / ratios[0])
    if seen is not None:
        ratios.append(1.0)
        differences.append(seen - pictures[-1])
    if not ratios:
        return reached
    if len(ratios) == 1:
        rhos = [0.5]
    else:
        phi, factorial, right = math.expm1(-h) / -h - 1, 1, []
        for i in range(1, 3):
            right.append(phi * factorial / weight)
            factorial *= i + 1
            phi = phi / -h - 1 / factorial
        rhos = np.linalg.solve(np.array([[1.0, 1.0], ratios]), np.array(right)).tolist()
    drawn = sum(rho * difference for rho, difference in zip(rhos, differences, strict=True))
    return reached - (1 - following) * weight * drawn


@pytest.mark.parametrize("num_steps", [1, 2, 3, 8, 20])
@pytest.mark.parametrize(("solver", "formula"), [("heun", heun), ("dpmpp-2m", dpmpp_2m), ("unipc", unipc)])
def test_a_solver_is_its_formula_in_float64(solver, formula, num_steps):
    """Within float32's rounding of up to 20 steps of numbers up to 3; of UniPC's start, 1 − 1e-6, float32 rounds the distance
    to 1 by 6 %."""
    for start in (1.0, 0.6):
        sigmas = qwen_sigmas(num_steps, 1024, start)
        expected = formula(velocity, START, sigmas)
        reached = solve(solver, velocity, START.float(), sigmas).double()
        assert torch.allclose(reached, expected, atol=2e-4 if solver == "unipc" else 2e-5)


@pytest.mark.parametrize("num_steps", [4, 20])
def test_unipc_is_the_one_of_diffusers_on_qwens_own_schedule(num_steps):
    """Its scheduler shifts for the resolution and keeps the terminal; ours is given the same sigmas."""
    tokens = 1024
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        use_dynamic_shifting=True,
        time_shift_type="exponential",
        shift_terminal=0.02,
    )
    mu = 0.5 + 0.4 * (tokens - 256) / (8192 - 256)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps), mu=mu)
    sigmas = qwen_sigmas(num_steps, tokens)
    assert torch.allclose(torch.tensor(sigmas), scheduler.sigmas, atol=3e-6)
    latents = START.float()
    for k, timestep in enumerate(scheduler.timesteps):
        latents = scheduler.step(velocity(latents, torch.full((2,), sigmas[k])), timestep, latents, return_dict=False)[
            0
        ]
    assert torch.allclose(solve("unipc", velocity, START.float(), sigmas), latents, atol=2e-5)


@pytest.mark.parametrize(("solver", "calls"), [("euler", 5), ("heun", 9), ("dpmpp-2m", 5), ("unipc", 5)])
def test_the_calls_of_a_step(solver, calls):
    asked = []
    solve(solver, lambda x, sigma: asked.append(sigma[0].item()) or velocity(x, sigma), START.float(), linear_sigmas(5))
    assert len(asked) == calls
    assert min(asked) > 0
    assert max(asked) == 1


def test_another_solver_is_refused():
    with pytest.raises(ValueError, match="got 'ddim'"):
        make_step("ddim", [1.0, 0.0])  # type: ignore[arg-type]
