"""Latent Bridge Matching: from the source's latents, or from white, to the target."""

import math
from typing import Literal

import torch
from torch import Tensor

from losses.batch import Batch, Condition
from losses.errors import squared_error
from losses.flow_matching import Denoiser
from losses.paths import BridgePath, PathSample, Prediction, per_sample, predict_target
from losses.pixel import Decode, PixelTerm
from losses.preservation import Preservation
from losses.randomness import SampleRandom
from losses.sigmas import DiscreteSigma, SigmaSampler
from losses.terms import LossTerms, by_sigma

DISTANCE_FLOOR = 0.05
"""Smallest mean squared distance that a stream is normalised by, in normalised latents (whose variance is about 1), so
that pairs which hardly differ do not dominate."""


SIGMA_PROBABILITIES = (0.55, 0.15, 0.15, 0.15)
"""Probabilities of sigma 1, 0.75, 0.5 and 0.25. The first step does most of the work, and is the only one in one-step edits."""


class LatentBridgeMatchingLoss:
    """Bridge matching in latent space (Chadebec et al. 2025, arXiv 2503.07535, equations 4 to 7), with two streams.

    The main stream starts at `source_latents`, the sub stream at `sub_noise` (white). What is minimised, in expectation, is

        main_weight * (loss of the main stream) + sub_weight * (loss of the sub stream)

    whatever `sub_prob` is, which only decides how it is estimated. Stream and sigma are stratified over the samples of a step.

    Rollout: states of a true bridge give the target away at sigma < 1, where a sampler meets states of its own making. With
    a = start and v the denoiser, a sample that is drawn for it takes the sampler's state in place of the bridge's,

        x = a - (1 - sigma) v(a, 1)        computed without gradient
        velocity = (x - target) / sigma

    so that later steps learn to correct the first one. A perfect first step gives the bridge without noise. An error of the
    first step enters (1 - sigma) / sigma times, which is meant for discrete sigmas that stay away from 0.

    Args:
        sigma: distribution that sigma is drawn from in training. By default it is one of 1, 0.75, 0.5 and 0.25, the values
            that sampling in one, two or four steps visits, with the probabilities 0.55, 0.15, 0.15 and 0.15.
        bridge_noise: scale of the bridge's noise, 0 or more.
        prediction: what the model predicts as velocity: "displacement" (start − target) or "drift" ((x − target) / sigma), which
            allows more `bridge_noise`.
        sub_prob: probability of the sub stream with `combine="choice"`. With 0 only the main stream is trained and with 1 only
            the sub stream, also with `combine="sum"`.
        combine: how the two streams are combined. "choice" draws one stream per sample and divides its loss by the stream's
            probability: one forward pass, with the same expectation as "sum", which runs both streams for every sample.
        main_weight: weight of the main stream, which starts from the source, in the loss.
        sub_weight: weight of the sub stream, which starts from white, in the loss.
        rollout: probability, in [0, 1], that a sample with sigma < 1 starts from the model's own first step, as in sampling.
        normalise: divide each sample's error by the mean squared distance between its start and its target (at least 0.05),
            weighted like the error. Otherwise the sub stream would dominate, because white is far from the target.
        mask_weight: weight of the background in the loss, as marked by a row's `back_mask`. The edited area has weight 1.
        preserve: share of the samples, in [0, 1), on which the adapter is trained to follow another instruction
            (`data.preserve_prompts`) from noise as the base model does, so that the base model's other abilities are kept. Such
            a sample has weight 1.
        pixel: losses on the decoded prediction of the target, added to the latent loss.
        decode: needed with `pixel`.

    Raises:
        ValueError: an argument is out of its range, no stream that is trained has a weight, or `decode` is missing.
    """

    objective = "lbm"
    needs_source = True

    def __init__(
        self,
        sigma: SigmaSampler | None = None,
        bridge_noise: float = 0.005,
        prediction: Prediction = "displacement",
        sub_prob: float = 0.25,
        combine: Literal["choice", "sum"] = "choice",
        main_weight: float = 1.0,
        sub_weight: float = 1.0,
        rollout: float = 0.0,
        normalise: bool = True,
        mask_weight: float = 1.0,
        preserve: float = 0.0,
        pixel: PixelTerm | None = None,
        decode: Decode | None = None,
    ):
        for name, probability in (("sub_prob", sub_prob), ("rollout", rollout)):
            if not 0 <= probability <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {probability}")
        if combine not in ("choice", "sum"):
            raise ValueError(f"combine must be 'choice' or 'sum', got {combine!r}")
        if not all(0 <= weight < math.inf for weight in (main_weight, sub_weight, mask_weight)):
            raise ValueError(f"weights must be 0 or more, got {main_weight=}, {sub_weight=}, {mask_weight=}")
        if main_weight * (1 - sub_prob) + sub_weight * sub_prob == 0:
            raise ValueError(f"nothing to train with {sub_prob=}, {main_weight=}, {sub_weight=}")
        if pixel is not None and decode is None:
            raise ValueError("pixel terms need decode, the VAE's decoder")
        if preserve and combine == "sum" and 0 < sub_prob < 1:
            raise ValueError(f"{preserve=} needs combine='choice': a sample that is preserved has one forward, not two")
        self.preservation = Preservation(preserve)
        self.path = BridgePath(bridge_noise, prediction)
        self.sigma = sigma or DiscreteSigma(probabilities=SIGMA_PROBABILITIES)
        self.sub_prob = sub_prob
        self.combine = combine
        self.weights = {"main": main_weight, "sub": sub_weight}
        self.rollout = rollout
        self.normalise = normalise
        self.mask_weight = mask_weight
        self.pixel = pixel
        self.decode = decode

    @property
    def trained_sigmas(self) -> list[float] | None:
        """The sigmas that are trained, the largest first; None if there are more than a few."""
        return self.sigma.drawn if isinstance(self.sigma, DiscreteSigma) else None

    def __call__(self, denoiser: Denoiser, batch: Batch, generator: SampleRandom) -> LossTerms:
        """The terms of a batch; every draw is the sample's own."""
        size = len(batch.target_latents)
        device = batch.target_latents.device
        if self.combine == "sum" and 0 < self.sub_prob < 1:
            main = self._stream(denoiser, batch, generator, torch.zeros(size, dtype=torch.bool, device=device))
            sub = self._stream(denoiser, batch, generator, torch.ones(size, dtype=torch.bool, device=device))
            loss = self.weights["main"] * main.loss + self.weights["sub"] * sub.loss
            shared = {
                name: torch.where(main.logged[name].isnan(), sub.logged[name], main.logged[name])
                for name in main.logged
            }
            return LossTerms(loss, shared)
        is_sub = (generator.stratified("stream") < self.sub_prob).to(device)
        terms = self._stream(denoiser, batch, generator, is_sub)
        importance = torch.where(is_sub, *self._importance(terms.loss))
        if self.preservation.share:
            importance = importance.masked_fill(self.preservation.drawn(generator).to(device), 1.0)
        return LossTerms(terms.loss * importance, terms.logged)

    def _importance(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """weight / probability of the sub and of the main stream; a stream that is the only one has probability 1."""
        probabilities = {"sub": self.sub_prob, "main": 1 - self.sub_prob}
        values = (self.weights[name] / p if p else 0.0 for name, p in probabilities.items())
        sub, main = (like.new_tensor(value) for value in values)
        return sub, main

    def _stream(self, denoiser: Denoiser, batch: Batch, generator: SampleRandom, is_sub: Tensor) -> LossTerms:
        """One forward in which each sample starts at white where `is_sub` (B,) and at its source elsewhere."""
        target = batch.target_latents.float()
        start = torch.where(is_sub[:, None, None, None], batch.sub_noise.float(), batch.source.float())
        sigma = self.sigma(generator, target.shape[-2] * target.shape[-1] // 4).to(target.device)
        noise = generator.normal("noise", target.shape[1:]).to(target.device)
        distance = squared_error(start, target, batch.mask, self.mask_weight)
        sample = self.path.sample(start, target, sigma, noise, distance)
        if self.rollout:
            sample = self._rolled_out(denoiser, batch.condition, start, target, sigma, sample, generator)
        condition, mask = batch.condition, batch.mask
        if lesson := self.preservation.lesson(denoiser, batch, generator):
            sample, condition, mask = lesson.put_into(sample), lesson.condition, lesson.unmasked(mask)
            sigma = sigma.index_copy(0, lesson.places, lesson.sigma)
            distance = distance.index_fill(0, lesson.places, 1.0)
        velocity = denoiser(sample.latents, sigma, condition)

        latent = sample.weight * squared_error(velocity, sample.velocity, mask, self.mask_weight)
        if self.normalise:
            latent = latent / distance.clamp_min(DISTANCE_FLOOR)
        terms = {"latent": latent}
        if self.pixel is not None and self.decode is not None:
            pixel = self.pixel(predict_target(sample.latents, velocity, sigma), target, self.decode, generator)
            if self.preservation.share:  # what is preserved has no target
                drawn = self.preservation.drawn(generator).to(target.device)
                pixel = {name: value.masked_fill(drawn, 0.0) for name, value in pixel.items()}
            terms |= pixel
        shown, logged = {name: value.detach() for name, value in terms.items()}, {}
        if self.preservation.share:
            apart = {name: self.preservation.apart(value, generator) for name, value in shown.items()}
            shown, logged = {name: own for name, (own, _) in apart.items()}, apart["latent"][1]
        for name, value in shown.items():
            logged[f"{name}/main"] = torch.where(is_sub, math.nan, value)
            logged[f"{name}/sub"] = torch.where(is_sub, value, math.nan)
        for name in ("latent/main", "latent/sub"):
            logged |= by_sigma(name, logged[name], sigma)
        return LossTerms(torch.stack(list(terms.values())).sum(0), logged)

    def _rolled_out(
        self,
        denoiser: Denoiser,
        condition: Condition,
        start: Tensor,
        target: Tensor,
        sigma: Tensor,
        sample: PathSample,
        generator: SampleRandom,
    ) -> PathSample:
        """The sample, in which those that are drawn for it stand where the model's own first step leads.

        Where a sample of any rank is drawn, every rank makes this forward, since under ZeRO-3 they need each other.
        """
        if not self._draw_rollout(generator.everywhere).any():
            return sample
        drawn = self._draw_rollout(generator).nonzero().flatten().to(target.device)
        places = drawn if len(drawn) else drawn.new_zeros(1)
        with torch.no_grad():
            velocity = denoiser(start[places], torch.ones_like(sigma[places]), condition.take(places))
        s = per_sample(sigma[drawn], target)
        latents = start[drawn] - (1 - s) * velocity[: len(drawn)]
        return PathSample(
            sample.latents.index_copy(0, drawn, latents),
            sample.velocity.index_copy(0, drawn, (latents - target[drawn]) / s),
            sample.weight.index_fill(0, drawn, 1.0),
        )

    def _draw_rollout(self, generator: SampleRandom) -> Tensor:
        """Which samples are rolled out, (B,) on the CPU: of those with sigma < 1, which no shift makes 1 or unmakes, and on which
        the base model does not teach."""
        drawn = (generator.stratified("rollout") < self.rollout) & (self.sigma(generator, 1) < 1)
        return drawn & ~self.preservation.drawn(generator)
