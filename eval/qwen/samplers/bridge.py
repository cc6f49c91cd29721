"""From the source, or white, to the target along a trained bridge."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from eval.qwen.samplers.sampler import Keep, OnStep, Velocity
from eval.qwen.samplers.sigmas import linear_sigmas
from losses.batch import Edit
from losses.paths import Prediction
from losses.randomness import SampleRandom


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
        deviation: Tensor | float = 0.0  # from the straight line
        for step, (sigma, next_sigma) in enumerate(pairwise(linear_sigmas(num_steps)), start=1):
            velocity = denoiser(latents, latents.new_full(latents.shape[:1], sigma), edit.condition)
            if self.stochastic and self.prediction == "displacement":
                latents = start - (1 - next_sigma) * velocity
            else:
                latents = latents - (sigma - next_sigma) * velocity
            # With drift, what is there shrinks on the way to the target; else every step makes it anew.
            deviation = deviation * (next_sigma / sigma) if self.prediction == "drift" else 0.0
            if scale := self._noise_scale(sigma, next_sigma):
                noise = scale * generator.normal(f"bridge_noise_{step}", latents.shape[1:]).to(latents)
                latents, deviation = latents + noise, deviation + noise
            if keep:
                latents = keep.blend(latents, start, next_sigma, deviation)
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
