"""Flow matching: from noise to the target."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from losses.batch import Batch
from losses.errors import squared_error
from losses.paths import FlowPath
from losses.preservation import Preservation
from losses.randomness import SampleRandom
from losses.sigmas import QwenShiftedSigma, SigmaSampler
from losses.terms import LossTerms, by_sigma

Denoiser = Callable[..., Tensor]
"""`velocity = denoiser(latents, sigma, condition)`."""


class GaussianWeighting:
    """DiffSynth's weight: exp(-2 (sigma - 1/2)^2), less its smallest value, scaled to a mean of 1 over its 1000 timesteps.

    It is 0 at sigma = 1, so a bridge, which starts there, must never use it.
    """

    def __init__(self, num_timesteps: int = 1000):
        table = self._bell(torch.linspace(1, 0, num_timesteps + 1, dtype=torch.float64)[:-1])
        self.lowest, self.scale = table.min().item(), 1 / (table - table.min()).mean().item()

    def __call__(self, sigma: Tensor) -> Tensor:
        """(B,) in [0, 1] -> (B,), 0 or more."""
        return (self._bell(sigma) - self.lowest).clamp_min(0) * self.scale

    @staticmethod
    def _bell(sigma: Tensor) -> Tensor:
        return torch.exp(-2 * (sigma - 0.5) ** 2)


class FlowMatchingLoss:
    """Mean squared error of the velocity noise - target (Lipman et al., arXiv 2210.02747; Liu et al., arXiv 2209.03003).

    It starts from noise, so that it trains text to image (samples without a source) too.

    Args:
        sigma: distribution that sigma is drawn from in training. By default it is uniform with Qwen's resolution shift.
        weighting: weight of each sample by its sigma, such as `GaussianWeighting`. By default all weights are 1.
        mask_weight: weight of the background in the loss, as marked by a row's `back_mask`. The edited area has weight 1.
        preserve: share of the samples, in [0, 1), on which the adapter is trained to follow another instruction
            (`data.preserve_prompts`) as the base model does, so that the base model's other abilities are kept.
    """

    objective = "flow"
    needs_source = False

    def __init__(
        self,
        sigma: SigmaSampler | None = None,
        weighting: Callable[[Tensor], Tensor] | None = None,
        mask_weight: float = 1.0,
        preserve: float = 0.0,
    ):
        if not 0 <= mask_weight < math.inf:
            raise ValueError(f"mask_weight must be 0 or more, got {mask_weight}")
        self.sigma = sigma or QwenShiftedSigma()
        self.weighting = weighting
        self.mask_weight = mask_weight
        self.preservation = Preservation(preserve)

    def __call__(self, denoiser: Denoiser, batch: Batch, generator: SampleRandom) -> LossTerms:
        """The terms of a batch; every draw is the sample's own."""
        target = batch.target_latents.float()
        sigma = self.sigma(generator, target.shape[-2] * target.shape[-1] // 4).to(target.device)
        noise = generator.normal("noise", target.shape[1:]).to(target.device)
        sample, condition, mask = FlowPath().sample(noise, target, sigma), batch.condition, batch.mask
        lesson = self.preservation.lesson(denoiser, batch, generator, self.sigma)
        if lesson:
            sample, condition, mask = lesson.put_into(sample), lesson.condition, lesson.unmasked(mask)
        velocity = denoiser(sample.latents, sigma, condition)
        error = squared_error(velocity, sample.velocity, mask, self.mask_weight)
        weight = self.weighting(sigma) if self.weighting else torch.ones_like(sigma)
        own, logged = error.detach(), {}
        if self.preservation.share:
            own, logged = self.preservation.apart(own, generator)
        return LossTerms(weight * error, {"flow": own, **by_sigma("flow", own, sigma), **logged})
