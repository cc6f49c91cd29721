"""Stream and sigma of a step's samples: in their proportions, by sample number, whatever the cut."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from losses import DiscreteSigma, LatentBridgeMatchingLoss, LogitNormalSigma, SampleRandom, UniformSigma
from losses.bridge_matching import SIGMA_PROBABILITIES
from tests.losses.test_objectives import SHAPE, Oracle, make_batch


@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(0, 10**6), st.data())
def test_a_step_has_one_sample_in_each_interval_and_a_sample_depends_on_its_number_alone(seed, size, step, data):
    numbers = range(step * size, (step + 1) * size)
    values = SampleRandom(seed, numbers, size).stratified("stream")
    assert sorted((values * size).floor().int().tolist()) == list(range(size))
    some = data.draw(st.lists(st.sampled_from(numbers), min_size=1, max_size=5))
    again = SampleRandom(seed, some, size).stratified("stream")
    assert torch.equal(again, values[[number - numbers.start for number in some]])


def test_each_sample_is_uniform_by_itself_and_two_purposes_are_independent():
    """The same place of 4,000 steps of eight: mean 1/2, variance 1/12, no correlation, within four standard errors."""
    count = 4000
    places = range(3, 8 * count, 8)
    a, b = (SampleRandom(1, places, 8).stratified(purpose) for purpose in ("stream", "sigma"))
    for values in (a, b):
        assert values.mean().item() == pytest.approx(0.5, abs=4 / math.sqrt(12 * count))
        assert values.var().item() == pytest.approx(1 / 12, rel=4 * math.sqrt(0.8 / count))
        assert 0 <= values.min() < values.max() < 1
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 4 / math.sqrt(count)


def test_a_batch_of_sixteen_has_four_white_samples_and_nine_or_so_at_the_start():
    batch = make_batch(16)
    for step in range(50):
        random = SampleRandom(0, range(16 * step, 16 * (step + 1)), 16)
        denoiser = Oracle(torch.zeros(16, *SHAPE))
        terms = LatentBridgeMatchingLoss(sub_prob=0.25)(denoiser, batch, random)
        assert terms.logged["latent/main"].isnan().sum() == 4
        _, sigma = denoiser.seen[0]
        for value, probability in zip((1.0, 0.75, 0.5, 0.25), SIGMA_PROBABILITIES, strict=True):
            assert abs((sigma == value).sum() - 16 * probability) < 2


def test_continuous_sigmas_are_stratified_too():
    random = SampleRandom(0, range(100), 100)
    uniform = UniformSigma()(random, 64).sort().values
    assert (uniform - (torch.arange(100) + 0.5) / 100).abs().max() <= 0.5 / 100 + 1e-6
    logits = torch.logit(LogitNormalSigma(0.5, 2.0)(random, 64).double())
    assert ((logits - 0.5) / 2).mean().abs() < 0.05  # of 100 independent ones the mean has a deviation of 0.1


def test_only_values_that_are_drawn_are_named():
    assert LatentBridgeMatchingLoss().trained_sigmas == [1.0, 0.75, 0.5, 0.25]
    loss = LatentBridgeMatchingLoss(DiscreteSigma([0.5, 1.0, 0.1], [1, 2, 0]))
    assert loss.trained_sigmas == [1.0, 0.5]
    assert LatentBridgeMatchingLoss(UniformSigma()).trained_sigmas is None


@pytest.mark.parametrize("stream", ["main", "sub"])
def test_the_loss_is_logged_by_sigma(stream):
    batch, random = make_batch(32), SampleRandom(0, range(32), 32)
    terms = LatentBridgeMatchingLoss(sub_prob=0.5)(Oracle(torch.zeros(32, *SHAPE), 1.0), batch, random)
    sigma = LatentBridgeMatchingLoss().sigma(random, 6)
    own = terms.logged[f"latent/{stream}"]
    for value in (0.25, 0.5, 0.75, 1.0):
        expected = torch.where(sigma == value, own, math.nan)
        assert torch.equal(terms.logged[f"latent/{stream}/sigma_{value:g}"].nan_to_num(-1), expected.nan_to_num(-1))
