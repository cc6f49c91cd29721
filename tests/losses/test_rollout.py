"""Rollout: the model learns from the states that its own first step leads to."""

import pytest
import torch

from losses import DiscreteSigma, LatentBridgeMatchingLoss, SampleRandom, UniformSigma
from tests.losses.test_objectives import SHAPE, Oracle, always, draws, make_batch


class Biased:
    """The displacement of each sample of a batch that it knows by its start, and an error at sigma = 1."""

    def __init__(self, batch, start: torch.Tensor, error: float = 0.0):
        self.start, self.velocity, self.error = start, start - batch.target_latents, error
        self.seen, self.grad_enabled = [], []

    def __call__(self, latents, sigma, condition):
        self.seen.append((latents, sigma, condition.prompt_emb))
        self.grad_enabled.append(torch.is_grad_enabled())
        if (sigma < 1).any():
            return self.velocity
        places = [next(i for i, start in enumerate(self.start) if torch.equal(start, each)) for each in latents]
        return self.velocity[places] + self.error


@pytest.mark.parametrize("sub_prob", [0.0, 1.0])
def test_with_a_perfect_model_it_changes_nothing(sub_prob):
    batch = make_batch()
    start = batch.sub_noise * torch.arange(1, 5).view(4, 1, 1, 1) if sub_prob else batch.source_latents
    batch.sub_noise = start
    options = {"sigma": always(0.25), "bridge_noise": 0.0, "sub_prob": sub_prob}
    plain, rolled = Biased(batch, start), Biased(batch, start)
    without = LatentBridgeMatchingLoss(**options)(plain, batch, draws(4))
    with_rollout = LatentBridgeMatchingLoss(**options, rollout=1.0)(rolled, batch, draws(4))
    assert torch.allclose(rolled.seen[1][0], plain.seen[0][0], atol=1e-6)
    assert with_rollout.loss.max() < 1e-10
    assert without.loss.max() < 1e-10
    assert (len(plain.seen), len(rolled.seen)) == (1, 2)


def test_with_a_biased_first_step_the_second_is_taught_to_correct_it():
    """v(a, 1) is off by e: x = t + s(a - t) - (1 - s)e, and following the regressed velocity from x ends at the target."""
    batch, error, sigma = make_batch(), 0.3, 0.25
    denoiser = Biased(batch, batch.source_latents, error)
    loss = LatentBridgeMatchingLoss(always(sigma), 0.0, sub_prob=0.0, normalise=False, rollout=1.0)
    terms = loss(denoiser, batch, draws(4))
    start, target = batch.source_latents.double(), batch.target_latents.double()
    state = target + sigma * (start - target) - (1 - sigma) * error
    assert (denoiser.seen[1][0] - state).abs().max() < 1e-6
    regressed = (state - target) / sigma
    assert (state - sigma * regressed - target).abs().max() < 1e-12
    expected = ((start - target) - regressed).square().mean((1, 2, 3))  # the second step predicts the bridge's velocity
    assert torch.allclose(terms.loss.double(), expected, rtol=1e-5)
    assert torch.allclose(expected, torch.full((4,), (error * (1 - sigma) / sigma) ** 2).double())
    assert denoiser.grad_enabled == [False, True]


def test_it_replaces_those_that_are_drawn_and_leaves_the_others_as_they_are():
    batch, size = make_batch(40), 40
    sigma, random = DiscreteSigma([1.0, 0.5]), SampleRandom(3, range(size), size)
    options = {"sigma": sigma, "bridge_noise": 0.1, "prediction": "drift", "sub_prob": 0.5, "normalise": False}
    plain = Oracle(torch.zeros(size, *SHAPE))
    without = LatentBridgeMatchingLoss(**options)(plain, batch, random)
    loss = LatentBridgeMatchingLoss(**options, rollout=0.5)
    # a model that predicts nothing stays at its start: the state is the start itself, of whichever stream
    zero = Oracle(torch.zeros(1, *SHAPE))
    with_rollout = loss(zero, batch, random)
    drawn = (random.stratified("rollout") < 0.5) & (sigma(random, 6) < 1)
    assert 6 <= drawn.sum() <= 14
    changed = with_rollout.loss != without.loss
    assert torch.equal(changed, drawn)
    is_sub = (random.stratified("stream") < 0.5)[:, None, None, None]
    start = torch.where(is_sub, batch.sub_noise, batch.source_latents)
    first, second = zero.seen
    assert torch.equal(first[0], start[drawn])
    assert (first[1] == 1).all()
    assert torch.equal(second[0][drawn], start[drawn])
    assert torch.equal(second[0][~drawn], plain.seen[0][0][~drawn])
    expected = (2 * (start - batch.target_latents)).square().mean((1, 2, 3)) * 2  # importance: 1 / 0.5
    assert torch.allclose(with_rollout.loss[drawn], expected[drawn], rtol=1e-5)


def test_the_condition_goes_with_its_sample():
    batch = make_batch(8)
    random = SampleRandom(0, range(8), 8)
    denoiser = Biased(batch, batch.source_latents)
    LatentBridgeMatchingLoss(DiscreteSigma([1.0, 0.5]), 0.0, sub_prob=0.0, rollout=1.0)(denoiser, batch, random)
    latents, _, prompt_emb = denoiser.seen[0]
    assert 0 < len(latents) < 8
    for each, text in zip(latents, prompt_emb, strict=True):
        place = next(i for i, start in enumerate(batch.source_latents) if torch.equal(start, each))
        assert torch.equal(text, batch.condition.prompt_emb[place])


def test_every_rank_makes_the_same_number_of_forwards():
    """And only where one of them needs it; what a sample gets does not depend on who is computed beside it."""
    loss = LatentBridgeMatchingLoss(bridge_noise=0.0, sub_prob=0.0, rollout=0.7)
    batch, size, needed = make_batch(16), 16, []
    whole = loss(Oracle(torch.zeros(1, *SHAPE)), batch, SampleRandom(5, range(size), size)).loss
    for start in range(0, size, 2):
        calls = []
        for number in (start, start + 1):
            one = Oracle(torch.zeros(1, *SHAPE))
            part = make_batch(1)
            for name in ("source_latents", "sub_noise", "target_latents"):
                setattr(part, name, getattr(batch, name)[number : number + 1])
            together = range(start, start + 2)
            terms = loss(one, part, SampleRandom(5, [number], size, together))
            assert torch.allclose(terms.loss, whole[number], rtol=1e-6)
            calls.append(len(one.seen))
        assert len(set(calls)) == 1
        needed.append(calls[0])
    assert {1, 2} == set(needed)


def test_both_streams_are_rolled_out_when_both_are_run():
    batch = make_batch()
    denoiser = Oracle(torch.zeros(1, *SHAPE))
    loss = LatentBridgeMatchingLoss(always(0.5), sub_prob=0.5, combine="sum", rollout=1.0)
    loss(denoiser, batch, draws(4))
    starts = [latents for latents, sigma in denoiser.seen if (sigma == 1).all()]
    assert torch.equal(starts[0], batch.source_latents)
    assert torch.equal(starts[1], batch.sub_noise)
    assert len(denoiser.seen) == 4


def test_without_it_nothing_else_is_called():
    denoiser = Oracle(torch.zeros(4, *SHAPE))
    LatentBridgeMatchingLoss(UniformSigma())(denoiser, make_batch(), draws(4))
    assert len(denoiser.seen) == 1


def test_a_probability_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"rollout must lie in \[0, 1\], got 1.5"):
        LatentBridgeMatchingLoss(rollout=1.5)
