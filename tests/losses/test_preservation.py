"""Preservation: on samples that are drawn for it the base model is the teacher for another instruction."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from losses import Condition, FlowMatchingLoss, GaussianWeighting, LatentBridgeMatchingLoss, PixelTerm, SampleRandom
from losses.preservation import BASE_SIGMA, Preservation
from tests.losses.test_objectives import SHAPE, make_batch

SIZE = 20


class Taught:
    """Answers with a mean of the instruction's embedding, ten times as much with the adapter; records what it is asked."""

    def __init__(self):
        self.seen, self.adapted = [], True

    @contextmanager
    def without_adapter(self):
        self.adapted = False
        yield
        self.adapted = True

    def __call__(self, latents, sigma, condition):
        mask = condition.prompt_emb_mask[:, :, None]
        assert not condition.prompt_emb[~condition.prompt_emb_mask].any(), "padding is zero"
        self.seen.append((latents, sigma, condition, self.adapted, torch.is_grad_enabled()))
        mean = (condition.prompt_emb * mask).sum((1, 2)) / (8 * mask.sum((1, 2)))
        return (10 if self.adapted else 1) * mean.view(-1, 1, 1, 1).expand(-1, *SHAPE)


def batch_with_others(size: int = SIZE, mask: bool = False):
    """Other instructions are of 3 to 7 tokens, one's own of 5; each has its sample's number in it."""
    batch, lengths = make_batch(size, mask=mask), [3 + number % 5 for number in range(size)]
    others = torch.arange(1.0, size + 1).view(-1, 1, 1).expand(-1, 7, 8).clone()
    known = torch.arange(7) < torch.tensor(lengths)[:, None]
    batch.preserved = Condition(others * known[:, :, None], known, [])
    return batch


@pytest.fixture
def random() -> SampleRandom:
    return SampleRandom(3, range(SIZE), SIZE)


def losses(preserve: float) -> list:
    options = {"mask_weight": 0.1, "preserve": preserve}
    bridge = {"bridge_noise": 0.1, "sub_prob": 0.3, "rollout": 0.6}
    return [FlowMatchingLoss(weighting=GaussianWeighting(), **options), LatentBridgeMatchingLoss(**bridge, **options)]


@pytest.mark.parametrize("place", [0, 1], ids=["flow", "bridge"])
def test_those_that_are_drawn_learn_the_base_models_answer_and_the_others_what_they_do_without(place, random):
    batch, plain, taught = batch_with_others(mask=True), Taught(), Taught()
    without, loss = losses(0.0)[place], losses(0.3)[place]
    before, after = without(plain, batch, random), loss(taught, batch, random)
    drawn = random.stratified("preserve") < 0.3
    assert drawn.sum() == 0.3 * SIZE, "stratified over the samples of a step"
    assert torch.equal(after.loss[~drawn], before.loss[~drawn])

    latents, sigma, condition, adapted, with_gradient = taught.seen[-2]
    assert (adapted, with_gradient) == (False, False)
    noise, at = random.normal("noise", SHAPE), BASE_SIGMA(random, 6)[:, None, None, None]
    torch.testing.assert_close(latents, (at * noise + (1 - at) * batch.target_latents)[drawn])
    assert torch.equal(sigma, at.flatten()[drawn])
    means = torch.arange(1.0, SIZE + 1)[drawn]
    torch.testing.assert_close(condition.prompt_emb.amax((1, 2)), means)
    own, own_sigma, whole, *state = taught.seen[-1]
    assert state == [True, True]
    assert torch.equal(own[drawn], latents)
    assert torch.equal(own_sigma[drawn], sigma)
    assert torch.equal(own[~drawn], plain.seen[-1][0][~drawn])
    assert torch.equal(whole.prompt_emb[~drawn][:, :5], batch.condition.prompt_emb[~drawn])

    expected = (9 * means).square()  # neither masked, nor divided by a stream's probability or distance
    weight = GaussianWeighting()(sigma) if place == 0 else 1.0
    torch.testing.assert_close(after.loss[drawn], weight * expected)
    torch.testing.assert_close(after.logged["preserve"][drawn], expected)
    for name, values in after.logged.items():
        assert values[~drawn if name == "preserve" else drawn].isnan().all(), name


@pytest.mark.parametrize("place", [0, 1], ids=["flow", "bridge"])
def test_every_rank_asks_where_one_needs_it(place):
    """And what a sample gets does not depend on who is computed beside it."""
    loss, batch, needed = losses(0.2)[place], batch_with_others(), []
    whole = loss(Taught(), batch, SampleRandom(5, range(SIZE), SIZE)).loss
    for start in range(0, SIZE, 2):
        calls = []
        for number in (start, start + 1):
            one, part = Taught(), make_batch(1)
            for name in ("source_latents", "sub_noise", "target_latents"):
                setattr(part, name, getattr(batch, name)[number : number + 1])
            part.condition, part.preserved = (
                c.take(torch.tensor([number])) for c in (batch.condition, batch.preserved)
            )
            terms = loss(one, part, SampleRandom(5, [number], SIZE, range(start, start + 2)))
            torch.testing.assert_close(terms.loss[0], whole[number], rtol=1e-5, atol=1e-5)
            calls.append([seen[3] for seen in one.seen].count(False))
        assert len(set(calls)) == 1
        needed.append(calls[0])
    assert set(needed) == {0, 1}


def test_texts_are_padded_no_more_than_needed():
    batch = batch_with_others(2)
    changed = batch.condition.with_texts(torch.tensor([0, 1]), batch.preserved)
    assert changed.prompt_emb.shape[1] == 4
    assert changed.prompt_emb_mask.sum(1).tolist() == [3, 4]
    assert batch.condition.with_texts(torch.tensor([1]), batch.preserved).prompt_emb.shape[1] == 5


def test_pixels_of_what_has_no_target_do_not_count(random):
    batch, pixel = batch_with_others(), PixelTerm(l1=1.0, crop=None)
    loss = LatentBridgeMatchingLoss(preserve=0.3, pixel=pixel, decode=lambda latents: latents)
    terms = loss(Taught(), batch, random)
    drawn = random.stratified("preserve") < 0.3
    torch.testing.assert_close(terms.loss[drawn], terms.logged["preserve"][drawn])
    assert terms.logged["pixel_l1/main"][drawn].isnan().all()


def test_what_cannot_be_is_refused(random):
    with pytest.raises(ValueError, match=r"preserve must lie in \[0, 1\), got 1"):
        Preservation(1.0)
    with pytest.raises(ValueError, match="needs combine='choice'"):
        LatentBridgeMatchingLoss(combine="sum", preserve=0.1)
    with pytest.raises(ValueError, match="needs the embeddings of other instructions"):
        FlowMatchingLoss(preserve=0.5)(Taught(), replace(batch_with_others(), preserved=None), random)
