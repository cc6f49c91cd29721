"""From noise, or the partly noised source, to the target, with classifier-free guidance."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from data_prep.errors import InputError
from eval.qwen.samplers.sampler import Keep, OnStep, Velocity
from eval.qwen.samplers.sigmas import lightning_sigmas, linear_sigmas, qwen_sigmas, walked_steps
from eval.qwen.samplers.solvers import SOLVERS, SolverName, make_step
from losses.batch import Edit
from losses.patches import PATCH, patchify, unpatchify
from losses.randomness import SampleRandom


@dataclass(frozen=True)
class FlowSampler:
    """Samples a flow-matching model from noise, with classifier-free guidance as diffusers does it."""

    cfg_scale: float = 1.0
    """Strength of classifier-free guidance against the negative condition; 1 is without, at half the cost."""
    cfg_rescale: bool = True
    """Bring each guided token back to the length of the unguided one (diffusers does, DiffSynth does not)."""
    shift: Literal["qwen", "lightning", "none"] = "qwen"
    """Spacing of the sigmas: Qwen's resolution shift, the one that step-distilled adapters (Lightning) were made for, or even."""
    strength: float = 1.0
    """Share of noise in the start, in (0, 1]: its sigma. Less than 1 starts at the partly noised source (SDEdit, arXiv
    2108.01073), in as many steps fewer as diffusers' pipelines make then."""
    solver: SolverName = "euler"
    """The method of the steps."""

    def __post_init__(self):
        if self.shift not in ("qwen", "lightning", "none"):
            raise ValueError(f"shift must be 'qwen', 'lightning' or 'none', got {self.shift!r}")
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength must be in (0, 1], got {self.strength}")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {self.solver!r}")
        if self.cfg_scale < 1:
            raise ValueError(f"cfg_scale must be at least 1 (1 is without guidance), got {self.cfg_scale}")

    @torch.no_grad()
    def __call__(
        self,
        denoiser: Velocity,
        edit: Edit,
        num_steps: int,
        generator: SampleRandom,
        on_step: OnStep | None = None,
        keep: Keep | None = None,
    ) -> Tensor:
        """Walks from noise, or the partly noised source, to the target in `calls(num_steps)` steps.

        Raises:
            ValueError: `num_steps` is not positive.
            InputError: guidance is asked for and the edit has no negative condition.
        """
        like = edit.source
        noise = generator.normal("noise", like.shape[1:]).to(like.device)
        sigmas = self.sigmas(num_steps, like.shape[-2] * like.shape[-1] // PATCH**2)
        make = make_step(self.solver, sigmas)
        latents = sigmas[0] * noise + (1 - sigmas[0]) * like.float()
        for step, next_sigma in enumerate(sigmas[1:], start=1):
            latents = make(lambda x, sigma: self.velocity(denoiser, x, sigma, edit), latents, step - 1)
            if keep:
                latents = keep.blend(latents, noise, next_sigma)
            if on_step:
                on_step(step, latents)
        return latents

    @property
    def guided(self) -> bool:
        """With classifier-free guidance."""
        return self.cfg_scale > 1

    @property
    def draws(self) -> bool:
        """Always: its start is noise."""
        return True

    def calls(self, num_steps: int) -> int:
        """Steps that are walked."""
        return walked_steps(num_steps, self.strength)

    def sigmas(self, num_steps: int, num_tokens: int) -> list[float]:
        """`calls(num_steps)` + 1 positions from `strength` to 0 for an image of `num_tokens` tokens (2 x 2 latent cells)."""
        walked = self.calls(num_steps)
        if self.shift == "qwen":
            return qwen_sigmas(walked, num_tokens, self.strength)
        return linear_sigmas(walked, self.strength) if self.shift == "none" else lightning_sigmas(walked, self.strength)

    def velocity(self, denoiser: Velocity, latents: Tensor, sigma: Tensor, edit: Edit) -> Tensor:
        """The denoiser's velocity at `latents` (B, 16, h, w) and `sigma` (B,), guided if it is to be.

        Raises:
            InputError: guidance is asked for and the edit has no negative condition.
        """
        positive = denoiser(latents, sigma, edit.condition)
        if self.cfg_scale == 1:
            return positive
        if edit.negative is None:
            raise InputError(
                f"cfg_scale={self.cfg_scale} needs a negative prompt's embedding beside each record: "
                "cache with negative prompts, or set cfg_scale=1"
            )
        negative = denoiser(latents, sigma, edit.negative)
        return guide(positive, negative, self.cfg_scale, self.cfg_rescale)


def guide(positive: Tensor, negative: Tensor, scale: float, rescale: bool) -> Tensor:
    """Classifier-free guidance of velocities (B, 16, h, w): negative + scale·(positive − negative).

    With `rescale`, every token (2 x 2 patch, 64 channels) keeps the length that it has in `positive`, as in diffusers'
    QwenImageEditPlusPipeline.
    """
    guided = negative + scale * (positive - negative)
    if not rescale:
        return guided
    tokens, length = patchify(guided), patchify(positive).norm(dim=-1, keepdim=True)
    tokens = tokens * (length / tokens.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(tokens.dtype).tiny))
    return unpatchify(tokens, *positive.shape[-2:])
