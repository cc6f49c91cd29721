"""Where on the path a training sample lies. Every sampler is called as `sigma = sampler(generator, num_tokens)`, (B,).

Draws are stratified over the samples of a step: a step has each part of a distribution in its proportion.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from losses.randomness import SampleRandom

PURPOSE = "sigma"


class SigmaSampler(Protocol):
    """Draws positions in [0, 1], 1 = start."""

    def __call__(self, generator: SampleRandom, num_tokens: int) -> Tensor:
        """`num_tokens`: image tokens of the output, h * w / 4 in latent cells, for shifts that depend on resolution."""
        ...


class UniformSigma:
    """Uniform in (0, 1]: the start itself may be drawn, the target never."""

    def __call__(self, generator: SampleRandom, num_tokens: int) -> Tensor:
        """(B,)."""
        return (1 - generator.stratified(PURPOSE)).float()


class LogitNormalSigma:
    """sigmoid(mean + std * normal) (Stable Diffusion 3, arXiv 2403.03206, section 3.1)."""

    def __init__(self, mean: float = 0.0, std: float = 1.0):
        if not 0 < std < math.inf:
            raise ValueError(f"std must be positive, got {std}")
        self.mean = mean
        self.std = std

    def __call__(self, generator: SampleRandom, num_tokens: int) -> Tensor:
        """(B,)."""
        normal = torch.special.ndtri(generator.stratified(PURPOSE).clamp_min(2**-53))
        return torch.sigmoid(self.mean + self.std * normal).float()


class DiscreteSigma:
    """One of a few values: the positions that a sampler of as many steps visits.

    Args:
        values: in (0, 1].
        probabilities: one per value, any positive scale; uniform by default.
    """

    def __init__(self, values: Sequence[float] = (1.0, 0.75, 0.5, 0.25), probabilities: Sequence[float] | None = None):
        weights = [1.0] * len(values) if probabilities is None else list(probabilities)
        if not values or not all(0 < value <= 1 for value in values):
            raise ValueError(f"values must lie in (0, 1], got {list(values)}")
        if len(weights) != len(values) or min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(f"probabilities must be {len(values)} numbers of 0 or more, not all 0, got {weights}")
        self.values = torch.tensor(list(values))
        self.drawn = sorted({value for value, weight in zip(values, weights, strict=True) if weight > 0}, reverse=True)
        """The values that may be drawn, the largest first."""
        self.probabilities = torch.tensor(weights, dtype=torch.float64) / sum(weights)

    def __call__(self, generator: SampleRandom, num_tokens: int) -> Tensor:
        """(B,)."""
        edges = self.probabilities.cumsum(0)[:-1]
        return self.values[torch.searchsorted(edges, generator.stratified(PURPOSE), right=True)]


class QwenShiftedSigma:
    """Another sampler's draws (uniform by default) shifted towards the start, the more the larger the picture."""

    def __init__(self, base: SigmaSampler | None = None):
        self.base = base or UniformSigma()

    def __call__(self, generator: SampleRandom, num_tokens: int) -> Tensor:
        """(B,)."""
        return qwen_shift(self.base(generator, num_tokens), num_tokens)


def qwen_shift_mu(num_tokens: int) -> float:
    """Qwen-Image's shift exponent: linear in the number of image tokens, 0.5 at 256 and 0.9 at 8192."""
    return 0.5 + (0.9 - 0.5) * (num_tokens - 256) / (8192 - 256)


def qwen_shift(sigma: Tensor, num_tokens: int) -> Tensor:
    """e^mu / (e^mu + 1/sigma - 1), with 0 and 1 fixed (Stable Diffusion 3, arXiv 2403.03206, equation 23, alpha = e^mu)."""
    scale = math.exp(qwen_shift_mu(num_tokens))
    return scale * sigma / (1 + (scale - 1) * sigma)
