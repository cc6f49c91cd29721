"""Rectified-flow inversion: a real picture walked up its own path to noise, then down again with an instruction.

Unlike noise that is drawn, the noise that is reached knows the picture: walked down without an instruction it gives the
picture back, and with one it keeps what the instruction leaves alone.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from eval.qwen.samplers import FlowSampler, Keep, OnStep, Velocity
from eval.qwen.samplers.sigmas import walked_steps
from eval.qwen.samplers.solvers import Flow
from losses.batch import Condition, Edit
from losses.patches import PATCH
from losses.randomness import SampleRandom


def integrate_second_order(flow: Flow, latents: Tensor, sigmas: list[float], on_step: OnStep | None = None) -> Tensor:
    """Solves d x / d sigma = flow(x, sigma) along `sigmas`, upwards or downwards, by midpoints with one call a step.

    From s to s' = s + h, with the velocity v₋ of the step before (FireFlow, arXiv 2412.07517; the first step takes v₋ from
    a call of its own at its start, with the midpoint's sigma):

        v = flow(x + h/2·v₋, s + h/2),    x ← x + h·v

    It is of second order, because v₋ is wrong by O(h) and moves the midpoint by O(h²) only: with twice the steps the error
    is 1/4 (measured on a path that is known, with even steps: 1/3.8 to 1/4.0), and there and back 1/8 (1/7.3 to 1/7.8),
    because most of both ways' errors cancels. It undoes itself best of the solvers compared at 40 calls a way on the tiny
    model: root mean square error of latents 0.0006, against 0.0019 of the explicit midpoint and RF-Solver (arXiv
    2411.04746), 0.0025 of Heun's, and 0.073 of Euler's. And it never asks for the velocity at sigma = 0 or 1, at the rim of
    what a model was trained on.

    Args:
        latents: where the path begins, at `sigmas[0]`, (B, 16, h, w).
        sigmas: two or more positions in [0, 1]; it makes `len(sigmas)` calls.
    """
    slope = None
    for step, (sigma, next_sigma) in enumerate(pairwise(sigmas), start=1):
        length = next_sigma - sigma
        middle = latents.new_full(latents.shape[:1], sigma + length / 2)
        if slope is None:
            slope = flow(latents, middle)
        slope = flow(latents + length / 2 * slope, middle)
        latents = latents + length * slope
        if on_step:
            on_step(step, latents)
    return latents


def invert(flow: Flow, latents: Tensor, sigmas: list[float], on_step: OnStep | None = None) -> Tensor:
    """The point at `sigmas[-1]` of the path that ends in a picture.

    Args:
        flow: usually with an empty instruction.
        latents: latents of the picture, (B, 16, h, w).
        sigmas: ascending from 0.

    Raises:
        ValueError: `sigmas` are not.
    """
    if sigmas[0] != 0 or any(sigma >= next_sigma for sigma, next_sigma in pairwise(sigmas)):
        raise ValueError(f"an inversion needs sigmas that ascend from 0, got {sigmas}")
    return integrate_second_order(flow, latents, sigmas, on_step)


@dataclass(frozen=True)
class InversionSampler:
    """Edits a picture from its own inverted noise. Nothing is random: every seed gives the same picture."""

    flow: FlowSampler
    """Spacing of the sigmas, and the guidance on the way down; the way up has none."""
    strength: float = 1.0
    """The sigma up to which the picture is inverted, in (0, 1]: less stays nearer to the picture."""

    def __post_init__(self):
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength must be in (0, 1], got {self.strength}")

    @torch.no_grad()
    def __call__(
        self,
        denoiser: Velocity,
        edit: Edit,
        num_steps: int,
        generator: SampleRandom,
        on_step: OnStep | None = None,
        keep: Keep | None = None,
        empty: Condition | None = None,
    ) -> Tensor:
        """Walks up with the empty instruction and down with the edit's, `calls(num_steps)` steps in all.

        Args:
            empty: the edit's condition with an empty instruction.

        Raises:
            ValueError: `num_steps` is not positive, or `empty` is not given.
            InputError: guidance is asked for and the edit has no negative condition.
        """
        assert keep is None, "no mode inverts a part of a picture"
        if empty is None:
            raise ValueError("an inversion needs the condition with an empty instruction")
        latents = edit.source.float()
        walked = self.calls(num_steps) // 2
        way = replace(self.flow, strength=self.strength)
        down = way.sigmas(num_steps, latents.shape[-2] * latents.shape[-1] // PATCH**2)

        def count_on(step: int, reached: Tensor) -> None:
            if on_step:
                on_step(walked + step, reached)

        noise = invert(lambda x, sigma: denoiser(x, sigma, empty), latents, down[::-1], on_step)
        return integrate_second_order(
            lambda x, sigma: self.flow.velocity(denoiser, x, sigma, edit), noise, down, count_on
        )

    @property
    def guided(self) -> bool:
        """As its flow sampler."""
        return self.flow.guided

    @property
    def draws(self) -> bool:
        """Never: its noise is the picture's own."""
        return False

    def calls(self, num_steps: int) -> int:
        """As many steps up as down."""
        return 2 * walked_steps(num_steps, self.strength)
