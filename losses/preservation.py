"""What keeps the base model's other abilities: on some samples it teaches, by itself, what it does for another instruction.

Known as differential output preservation. A sample that is drawn for it is asked another instruction than its own, at a point of
the base model's own path, from noise to the sample's target; the answer that counts is the base model's, which is the same
denoiser with the adapter switched off.
"""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from losses.batch import Batch, Condition
from losses.paths import FlowPath, PathSample
from losses.randomness import SampleRandom
from losses.sigmas import QwenShiftedSigma, SigmaSampler

BASE_SIGMA = QwenShiftedSigma()
"""Where on its path the base model is asked: as it was trained."""


@dataclass
class Lesson:
    """What the samples of a batch are asked where some of them are drawn.

    Attributes:
        places: places of these in the batch, (B',); there may be none.
        latents: the points on the path, (B', C, h, w).
        sigma: (B',).
        velocity: the base model's answers, (B', C, h, w).
        condition: condition of the whole batch, these with the other instruction.
    """

    places: Tensor
    latents: Tensor
    sigma: Tensor
    velocity: Tensor
    condition: Condition

    def put_into(self, sample: PathSample) -> PathSample:
        """The sample with these points and answers, each of weight 1."""
        return PathSample(
            sample.latents.index_copy(0, self.places, self.latents),
            sample.velocity.index_copy(0, self.places, self.velocity),
            sample.weight.index_fill(0, self.places, 1.0),
        )

    def unmasked(self, mask: Tensor | None) -> Tensor | None:
        """The background's mask, empty for these: the mask is of the sample's own edit."""
        return None if mask is None else mask.index_fill(0, self.places, 0.0)


class Preservation:
    """Draws the samples for which the base model teaches, and asks it.

    Args:
        share: share of all samples, in [0, 1); 0 for none, which costs nothing.

    Raises:
        ValueError: it is out of its range.
    """

    def __init__(self, share: float):
        if not 0 <= share < 1:
            raise ValueError(f"preserve must lie in [0, 1), got {share}")
        self.share = share

    def drawn(self, generator: SampleRandom) -> Tensor:
        """Which samples, (B,) on the CPU."""
        if not self.share:
            return torch.zeros(len(generator.numbers), dtype=torch.bool)
        return generator.stratified("preserve") < self.share

    def apart(self, errors: Tensor, generator: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        """Errors (B,) for the log: those of the others, NaN where a sample is drawn; and `preserve`, of these alone."""
        drawn = self.drawn(generator).to(errors.device)
        return torch.where(drawn, math.nan, errors), {"preserve": torch.where(drawn, errors, math.nan)}

    def lesson(
        self, denoiser: Any, batch: Batch, generator: SampleRandom, sampler: SigmaSampler = BASE_SIGMA
    ) -> Lesson | None:
        """The lesson of a batch; None where no sample of any rank is drawn.

        Where one is, every rank asks its base model, since under ZeRO-3 they need each other.

        Args:
            denoiser: with `without_adapter()`, a context in which it is the base model.
            sampler: sampler of positions on the path.

        Raises:
            ValueError: the batch has no other instruction.
        """
        if not (self.share and self.drawn(generator.everywhere).any()):
            return None
        if batch.preserved is None:
            raise ValueError("preserve needs the embeddings of other instructions, Batch.preserved")
        target = batch.target_latents.float()
        sigma = sampler(generator, target.shape[-2] * target.shape[-1] // 4).to(target.device)
        noise = generator.normal("noise", target.shape[1:]).to(target.device)
        latents = FlowPath().sample(noise, target, sigma).latents
        places = self.drawn(generator).nonzero().flatten().to(target.device)
        condition = batch.condition.with_texts(places, batch.preserved) if len(places) else batch.condition
        asked = places if len(places) else places.new_zeros(1)
        without: AbstractContextManager[Any] = denoiser.without_adapter()
        with torch.no_grad(), without:
            velocity = denoiser(latents[asked], sigma[asked], condition.take(asked))[: len(places)]
        return Lesson(places, latents[places], sigma[places], velocity.float(), condition)
