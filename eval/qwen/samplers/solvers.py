"""One step of an ordinary differential equation d x / d sigma = velocity(x, sigma), by four methods.

UniPC is diffusers' scheduler. The others are written out: diffusers' flow Heun takes no resolution shift, and its
DPM-Solver++ no sigmas, so that Qwen's terminal shift would be lost.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor

SolverName = Literal["euler", "heun", "dpmpp-2m", "unipc"]
SOLVERS: tuple[SolverName, ...] = get_args(SolverName)

Flow = Callable[[Tensor, Tensor], Tensor]
"""`velocity = flow(latents (B, 16, h, w), sigma (B,))`: the denoiser with its condition, guided or not."""
Step = Callable[[Flow, Tensor, int], Tensor]
"""`latents = step(flow, latents, k)`: from `sigmas[k]` to `sigmas[k + 1]`. The steps are made in order, each once."""


def make_step(solver: SolverName, sigmas: Sequence[float]) -> Step:
    """The method's step along `sigmas`.

    | solver | order | calls a step |
    |---|---|---|
    | `euler` | 1 | 1 |
    | `heun` | 2: the mean of the velocities at both ends (Karras et al., arXiv 2206.00364, algorithm 1) | 2, the last 1 |
    | `dpmpp-2m` | 2: the predicted picture, extrapolated from two steps (Lu et al., arXiv 2211.01095) | 1 |
    | `unipc` | 2: predictor and corrector in one (Zhao et al., arXiv 2302.04867) | 1 |

    Args:
        sigmas: two or more positions that descend to 0, the first at most 1.

    Raises:
        ValueError: there is no such method.
    """
    if solver == "euler":
        return lambda flow, x, k: x - (sigmas[k] - sigmas[k + 1]) * flow(x, _at(x, sigmas[k]))
    if solver == "heun":
        return lambda flow, x, k: _heun(flow, x, sigmas[k], sigmas[k + 1])
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    if solver == "dpmpp-2m":
        return _dpmpp_2m(sigmas)
    scheduler = _unipc(sigmas)

    def step(flow: Flow, x: Tensor, k: int) -> Tensor:
        return scheduler.step(flow(x, _at(x, sigmas[k])), scheduler.timesteps[k], x, return_dict=False)[0]

    return step


def _at(latents: Tensor, sigma: float) -> Tensor:
    return latents.new_full(latents.shape[:1], sigma)


def _heun(flow: Flow, x: Tensor, sigma: float, next_sigma: float) -> Tensor:
    """The last step, to sigma = 0 where no model was trained, is Euler's."""
    length = next_sigma - sigma
    slope = flow(x, _at(x, sigma))
    if next_sigma == 0:
        return x + length * slope
    return x + length / 2 * (slope + flow(x + length * slope, _at(x, next_sigma)))


def _dpmpp_2m(sigmas: Sequence[float]) -> Step:
    """In predicted pictures D and λ = log((1 − s)/s), with r = (λ − λ₋)/(λ' − λ) of the step before to this one:

    x ← s'/s·x + (1 − s'/s)·(D + (D − D₋)/2r)

    The step from sigma = 1, where λ is infinite, the one after it and the last are of first order: without D₋.
    """
    seen: list[Tensor] = []

    def step(flow: Flow, x: Tensor, k: int) -> Tensor:
        sigma, next_sigma = sigmas[k], sigmas[k + 1]
        picture = drawn = x - sigma * flow(x, _at(x, sigma))
        if seen and next_sigma > 0 and sigmas[k - 1] < 1:
            before, now, after = (math.log((1 - s) / s) for s in sigmas[k - 1 : k + 2])
            drawn = picture + (after - now) / (2 * (now - before)) * (picture - seen[-1])
        seen[:] = [picture]
        return next_sigma / sigma * x + (1 - next_sigma / sigma) * drawn

    return step


def _unipc(sigmas: Sequence[float]) -> Any:
    # only for those who ask for it
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2, solver_type="bh2"
    )
    scheduler.set_timesteps(sigmas=np.array(sigmas[:-1]))  # type: ignore[arg-type]  # it computes with an array
    scheduler.set_begin_index(0)
    return scheduler
