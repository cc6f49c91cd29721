"""From a start to the target: the bridge sampler and the flow-matching sampler.

Both integrate `velocity = d x / d sigma` from sigma = 1 to 0 in float32 and take their noise from the sample's own
generator, so that a picture depends on its seed and not on the batch that it was made in.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from data_prep.errors import InputError
from losses.batch import Condition, Edit
from losses.patches import PATCH, patchify, unpatchify
from losses.paths import Prediction
from losses.randomness import SampleRandom
from losses.sigmas import qwen_shift

SHIFT_TERMINAL = 0.02
"""The last sigma before 0, from Qwen-Image's scheduler_config.json."""

Velocity = Callable[[Tensor, Tensor, Condition], Tensor]
"""`velocity = denoiser(latents (B, 16, h, w), sigma (B,), condition)`."""

OnStep = Callable[[int, Tensor], None]
"""Called after every step with the number of steps done and the latents (B, 16, h, w)."""


@dataclass(frozen=True)
class Keep:
    """What sampling leaves as it is: after every step the latents outside the mask are put where their own path is."""

    latents: Tensor
    """Latents of the image that is kept, (B, 16, h, w)."""
    mask: Tensor
    """1 where the edit may go, 0 where nothing changes, between them a blend, (B, 1, h, w)."""

    def blend(self, latents: Tensor, start: Tensor, sigma: float) -> Tensor:
        """The latents inside the mask, and outside the point at `sigma` of the path from `start` to what is kept."""
        kept = sigma * start + (1 - sigma) * self.latents
        return self.mask * latents + (1 - self.mask) * kept


class Sampler(Protocol):
    """Latents of the edited images, (B, 16, h, w), float32."""

    def __call__(
        self,
        denoiser: Velocity,
        edit: Edit,
        num_steps: int,
        generator: SampleRandom,
        on_step: OnStep | None = None,
        keep: Keep | None = None,
    ) -> Tensor: ...

    @property
    def guided(self) -> bool:
        """Whether the edit needs a negative condition."""
        ...

    @property
    def draws(self) -> bool:
        """Whether another seed gives another picture."""
        ...

    def calls(self, num_steps: int) -> int:
        """How often `on_step` is called."""
        ...


@dataclass(frozen=True)
class BridgeSampler:
    """Samples a bridge that was trained by Latent Bridge Matching (arXiv 2503.07535), on evenly spaced sigmas.

    With start a, from s to s' < s (ε standard normal, no noise is left at s' = 0):

        deterministic             x ← x − (s − s')·v̂
        stochastic, drift         x ← x − (s − s')·v̂ + bridge_noise·sqrt(s'(s − s')/s)·ε
        stochastic, displacement  x ← s'·a + (1 − s')·(a − v̂) + bridge_noise·sqrt(s'(1 − s'))·ε

    Both stochastic forms have the bridge's marginal variance bridge_noise²·s(1 − s) after every step.
    """

    start: Literal["source", "white"] = "source"
    """Where the bridge begins: the source's latents (main stream) or those of a white canvas (sub stream)."""
    stochastic: bool = False
    bridge_noise: float = 0.0
    """The bridge's noise scale, as trained; read only by the stochastic forms."""
    prediction: Prediction = "displacement"
    """What the denoiser was trained to predict; read only by the stochastic forms."""

    def __post_init__(self):
        if self.start not in ("source", "white"):
            raise ValueError(f"start must be 'source' or 'white', got {self.start!r}")
        if self.prediction not in ("displacement", "drift"):
            raise ValueError(f"prediction must be 'displacement' or 'drift', got {self.prediction!r}")
        if self.bridge_noise < 0:
            raise ValueError(f"bridge_noise must not be negative, got {self.bridge_noise}")

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
        """Walks from the start to the target in `num_steps` calls of the denoiser.

        Raises:
            ValueError: `num_steps` is not positive.
        """
        latents = edit.source_latents if self.start == "source" else edit.sub_noise
        assert latents is not None, "white is encoded where a bridge starts there"
        start = latents = latents.float()
        for step, (sigma, next_sigma) in enumerate(pairwise(linear_sigmas(num_steps)), start=1):
            velocity = denoiser(latents, latents.new_full(latents.shape[:1], sigma), edit.condition)
            if self.stochastic and self.prediction == "displacement":
                latents = start - (1 - next_sigma) * velocity
            else:
                latents = latents - (sigma - next_sigma) * velocity
            if scale := self._noise_scale(sigma, next_sigma):
                noise = generator.normal(f"bridge_noise_{step}", latents.shape[1:])
                latents = latents + scale * noise.to(latents)
            if keep:
                latents = keep.blend(latents, start, next_sigma)
            if on_step:
                on_step(step, latents)
        return latents

    @property
    def guided(self) -> bool:
        """Never: a bridge has no classifier-free guidance."""
        return False

    @property
    def draws(self) -> bool:
        """Only the stochastic forms do."""
        return self.stochastic and self.bridge_noise > 0

    def calls(self, num_steps: int) -> int:
        """One a step."""
        return num_steps

    def _noise_scale(self, sigma: float, next_sigma: float) -> float:
        """Standard deviation of the noise that a step adds."""
        if not self.stochastic:
            return 0.0
        reached = sigma if self.prediction == "drift" else 1.0
        return self.bridge_noise * (next_sigma * (reached - next_sigma) / reached) ** 0.5


@dataclass(frozen=True)
class FlowSampler:
    """Samples a flow-matching model with Euler steps from noise, with classifier-free guidance as diffusers does it."""

    cfg_scale: float = 1.0
    """Strength of classifier-free guidance against the negative condition; 1 is without, at half the cost."""
    cfg_rescale: bool = True
    """Bring each guided token back to the length of the unguided one (diffusers does, DiffSynth does not)."""
    shift: Literal["qwen", "lightning", "none"] = "qwen"
    """Spacing of the sigmas: Qwen's resolution shift, the one that step-distilled adapters (Lightning) were made for, or even."""
    strength: float = 1.0
    """Share of the way that is walked, in (0, 1]: less starts at the partly noised source (SDEdit, arXiv 2108.01073)."""

    def __post_init__(self):
        if self.shift not in ("qwen", "lightning", "none"):
            raise ValueError(f"shift must be 'qwen', 'lightning' or 'none', got {self.shift!r}")
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength must be in (0, 1], got {self.strength}")
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
        """Walks from noise to the target; with a strength below 1, only the last of the `num_steps` steps.

        Raises:
            ValueError: `num_steps` is not positive.
            InputError: guidance is asked for and the edit has no negative condition.
        """
        like = edit.source
        noise = generator.normal("noise", like.shape[1:]).to(like.device)
        sigmas = self.sigmas(num_steps, like.shape[-2] * like.shape[-1] // PATCH**2)[-self.calls(num_steps) - 1 :]
        latents = sigmas[0] * noise + (1 - sigmas[0]) * like.float()
        for step, (sigma, next_sigma) in enumerate(pairwise(sigmas), start=1):
            velocity = self.velocity(denoiser, latents, latents.new_full(latents.shape[:1], sigma), edit)
            latents = latents - (sigma - next_sigma) * velocity
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
        """`num_steps` + 1 positions from 1 to 0 for an image of `num_tokens` tokens (2 x 2 latent cells)."""
        if self.shift == "qwen":
            return qwen_sigmas(num_steps, num_tokens)
        return linear_sigmas(num_steps) if self.shift == "none" else lightning_sigmas(num_steps)

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


def walked_steps(num_steps: int, strength: float) -> int:
    """The last steps of `num_steps` that a strength walks, rounded down, as diffusers does.

    Raises:
        ValueError: not even one.
    """
    steps = int(num_steps * strength + 1e-9)
    if steps < 1:
        raise ValueError(f"strength={strength} of {num_steps} step(s) is less than one step: take more of either")
    return steps


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


def linear_sigmas(num_steps: int) -> list[float]:
    """`num_steps` + 1 evenly spaced positions from 1 to 0.

    Raises:
        ValueError: `num_steps` is not positive.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be positive, got {num_steps}")
    return [1 - step / num_steps for step in range(num_steps + 1)]


def lightning_sigmas(num_steps: int) -> list[float]:
    """`linear_sigmas` shifted by exp(log 3) = 3 at every resolution, as Qwen-Image-Lightning was distilled.

    As diffusers' FlowMatchEulerDiscreteScheduler with base_shift = max_shift = log(3), exponential, without a terminal:
    s -> 3s / (1 + 2s).
    """
    return [3 * sigma / (1 + 2 * sigma) for sigma in linear_sigmas(num_steps)]


def qwen_sigmas(num_steps: int, num_tokens: int) -> list[float]:
    """`linear_sigmas` shifted for the resolution, then stretched so that the last one before 0 is SHIFT_TERMINAL.

    As diffusers' FlowMatchEulerDiscreteScheduler with Qwen-Image's configuration; one step, where its stretch divides
    0 by 0, goes straight from 1 to 0.
    """
    sigmas = torch.tensor(linear_sigmas(num_steps)[:-1], dtype=torch.float64)
    if num_steps > 1:
        sigmas = qwen_shift(sigmas, num_tokens)
        sigmas = 1 - (1 - sigmas) * (1 - SHIFT_TERMINAL) / (1 - sigmas[-1])
    return [*sigmas.tolist(), 0.0]


def describe_sampler(sampler: Sampler) -> dict[str, Any]:
    """Its class and settings, for JSON."""
    assert is_dataclass(sampler)
    assert not isinstance(sampler, type)
    return {"name": type(sampler).__name__, **asdict(sampler)}
