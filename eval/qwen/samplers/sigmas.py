"""Where samplers stop on the way from noise (sigma = 1) to the picture (sigma = 0)."""

import math

import torch
from torch import Tensor

from losses.sigmas import qwen_shift, qwen_shift_mu

SHIFT_TERMINAL = 0.02
"""The last sigma before 0, from Qwen-Image's scheduler_config.json."""
LIGHTNING_SHIFT = 3.0


def linear_sigmas(num_steps: int, start: float = 1.0) -> list[float]:
    """`num_steps` + 1 evenly spaced positions from `start` to 0.

    Raises:
        ValueError: `num_steps` is not positive.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be positive, got {num_steps}")
    return [start * (1 - step / num_steps) for step in range(num_steps + 1)]


def lightning_sigmas(num_steps: int, start: float = 1.0) -> list[float]:
    """`linear_sigmas` shifted by exp(log 3) = 3 at every resolution, as Qwen-Image-Lightning was distilled.

    As diffusers' FlowMatchEulerDiscreteScheduler with base_shift = max_shift = log(3), exponential, without a terminal:
    s -> 3s / (1 + 2s).
    """
    positions = linear_sigmas(num_steps, _unshifted(start, LIGHTNING_SHIFT))
    return [3 * sigma / (1 + 2 * sigma) for sigma in positions]


def qwen_sigmas(num_steps: int, num_tokens: int, start: float = 1.0) -> list[float]:
    """`linear_sigmas` shifted for the resolution, then stretched so that the last one before 0 is SHIFT_TERMINAL.

    As diffusers' FlowMatchEulerDiscreteScheduler with Qwen-Image's configuration; one step, where its stretch divides
    0 by 0, goes straight to 0. A way that begins below 1 is even in the same unshifted positions, and its stretch leaves its
    own first position where it is; one that begins at SHIFT_TERMINAL or below is not stretched.

    Args:
        num_tokens: image tokens of the result, 2 x 2 latent cells each.
        start: the first position, in (0, 1].
    """
    first = _unshifted(start, math.exp(qwen_shift_mu(num_tokens)))
    sigmas = torch.tensor(linear_sigmas(num_steps, first)[:-1], dtype=torch.float64)
    if num_steps > 1 or start < 1:
        sigmas = qwen_shift(sigmas, num_tokens)
    if num_steps > 1 and start > SHIFT_TERMINAL:
        sigmas = _stretched(sigmas, start)
    return [*sigmas.tolist(), 0.0]


def _stretched(sigmas: Tensor, start: float) -> Tensor:
    """Positions from `start` on, spread so that the last is SHIFT_TERMINAL."""
    return start - (start - sigmas) * (start - SHIFT_TERMINAL) / (start - sigmas[-1])


def _unshifted(sigma: float, scale: float) -> float:
    """What `scale`·s / (1 + (`scale` − 1)·s) makes `sigma` of."""
    return 1.0 if sigma == 1 else sigma / (scale - (scale - 1) * sigma)


def walked_steps(num_steps: int, strength: float) -> int:
    """How many of `num_steps` a strength walks: diffusers' `QwenImageImg2ImgPipeline.get_timesteps`, which rounds up.

    Raises:
        ValueError: not even one.
    """
    skipped = int(max(num_steps - min(num_steps * strength, num_steps), 0))
    if skipped >= num_steps:
        raise ValueError(f"strength={strength} of {num_steps} step(s) is less than one step: take more of either")
    return num_steps - skipped
