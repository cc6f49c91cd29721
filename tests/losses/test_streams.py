"""What the objectives promise about streams, masks, dtypes and crops, beyond their values."""

import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losses import (
    BridgePath,
    FlowMatchingLoss,
    GaussianWeighting,
    LatentBridgeMatchingLoss,
    PixelTerm,
    UniformSigma,
)
from tests.losses.test_objectives import SHAPE, Oracle, always, decode, draws, make_batch

ZERO = Oracle(torch.zeros(4, *SHAPE))


class Affine(torch.nn.Module):
    """The smallest denoiser whose answer depends on what it is shown."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.3))
        self.calls = 0

    def forward(self, latents, sigma, condition):
        self.calls += 1
        return self.scale * latents + sigma.view(-1, 1, 1, 1)


def test_choice_averages_to_the_sum():
    """Mean loss and its gradient over 4,000 draws of the stream, within four standard errors of a choice of two values."""
    batch, denoiser, repeats = make_batch(1), Affine(), 4000
    for name in ("source_latents", "sub_noise", "target_latents"):
        setattr(batch, name, getattr(batch, name).expand(repeats, -1, -1, -1))

    def mean_and_gradient(sub_prob: float, combine: Literal["choice", "sum"]) -> torch.Tensor:
        loss = LatentBridgeMatchingLoss(always(0.5), 0.0, sub_prob=sub_prob, combine=combine, main_weight=2.0)
        mean = loss(denoiser, batch, draws(repeats)).loss.mean()
        return torch.stack([mean.detach(), *torch.autograd.grad(mean, denoiser.scale)])

    p = 0.2
    main, sub = mean_and_gradient(0.0, "sum"), mean_and_gradient(1.0, "sum")
    total = mean_and_gradient(p, "sum")
    standard_error = (sub / p - main / (1 - p)).abs() * math.sqrt(p * (1 - p) / repeats)
    assert torch.allclose(total, main + sub, rtol=1e-4, atol=1e-6)
    assert ((mean_and_gradient(p, "choice") - total).abs() < 4 * standard_error).all()


@pytest.mark.parametrize("sub_prob", [0.0, 1.0])
def test_a_stream_without_probability_does_not_exist(sub_prob):
    batch, results = make_batch(), []
    for combine in ("choice", "sum"):
        denoiser = Affine()
        results.append(LatentBridgeMatchingLoss(sub_prob=sub_prob, combine=combine)(denoiser, batch, draws(4)))
        assert denoiser.calls == 1
    assert torch.equal(results[0].loss, results[1].loss)
    assert torch.equal(results[0].loss, results[0].logged["latent/sub" if sub_prob else "latent/main"])


def test_both_ways_to_combine_log_the_same_terms():
    """The same names; where "choice" has a value, it is the value of "sum": importance weights are not logged."""
    batch, pixel = make_batch(), PixelTerm(crop=2)
    choice, total = (
        LatentBridgeMatchingLoss(sub_prob=0.3, combine=combine, pixel=pixel, decode=decode)(ZERO, batch, draws(4))
        for combine in ("choice", "sum")
    )
    assert choice.logged.keys() == total.logged.keys()
    for name, value in choice.logged.items():
        assert torch.equal(value.nan_to_num(), torch.where(value.isnan(), 0.0, total.logged[name]))
        assert not value.requires_grad
    whole = [value for name, value in total.logged.items() if "sigma" not in name]
    assert not torch.stack(whole).isnan().any()


@given(st.floats(1e-6, 1.0), st.floats(0.0, 1.0))
@settings(max_examples=40, deadline=None)
def test_drift_error_stays_of_order_one(sigma, bridge_noise):
    """Predicting nothing costs E|drift|^2 / (alpha^2 distance) = 1, however small sigma is; the oracle costs 0."""
    batch = make_batch()
    loss = LatentBridgeMatchingLoss(always(sigma), bridge_noise, "drift", sub_prob=0.0)
    assert (loss(ZERO, batch, draws(4)).loss - 1).abs().max() < 0.5
    sample = BridgePath(bridge_noise, "drift").sample(
        batch.source_latents, batch.target_latents, torch.full((4,), sigma), draws(4).normal("noise", SHAPE)
    )
    assert loss(Oracle(sample.velocity), batch, draws(4)).loss.max() == 0


def test_displacement_keeps_the_bridges_noise_in_the_predicted_target():
    """The pixel error of an oracle is bridge_noise sqrt(s (1 - s)) E|N(0, 1)|."""
    batch = make_batch()
    loss = LatentBridgeMatchingLoss(always(0.5), 0.2, sub_prob=0.0, pixel=PixelTerm(crop=None), decode=decode)
    terms = loss(Oracle(batch.source_latents - batch.target_latents), batch, draws(4))
    assert terms.logged["pixel_l1/main"].mean().item() == pytest.approx(0.1 * math.sqrt(2 / math.pi), rel=0.2)


@pytest.mark.parametrize("objective", [FlowMatchingLoss, LatentBridgeMatchingLoss])
def test_a_mask_changes_its_own_sample_only(objective):
    batch, wrong = make_batch(), Oracle(torch.ones(4, *SHAPE))
    without = objective(mask_weight=5.0)(wrong, batch, draws(4)).loss
    batch.mask = torch.zeros(4, 1, *SHAPE[1:])
    batch.mask[2, :, :, :3] = 1
    masked = objective(mask_weight=5.0)(wrong, batch, draws(4)).loss
    assert (masked != without).nonzero().flatten().tolist() == [2]
    assert torch.allclose(objective(mask_weight=1.0)(wrong, batch, draws(4)).loss, without, rtol=1e-6)


def test_background_gradients_weigh_what_the_mask_says():
    """Where the error is the same everywhere, a background element's gradient is mask_weight times an edited one's."""
    batch = make_batch(mask=True)
    velocity = (batch.source_latents - batch.target_latents + 1).requires_grad_()
    loss = LatentBridgeMatchingLoss(sub_prob=0.0, normalise=False, mask_weight=4.0)
    (gradient,) = torch.autograd.grad(loss(Oracle(velocity), batch, draws(4)).loss.sum(), velocity)
    assert batch.mask is not None
    for each, mask in zip(gradient, batch.mask.expand_as(gradient).bool(), strict=True):
        assert torch.allclose(each[mask], 4 * each[~mask].mean(), rtol=1e-4)


def test_flow_matching_weighs_the_loss_and_logs_the_error():
    sigma, weighting = UniformSigma(), GaussianWeighting()
    terms = FlowMatchingLoss(sigma, weighting)(ZERO, make_batch(), draws(4))
    plain = FlowMatchingLoss(sigma)(ZERO, make_batch(), draws(4))
    assert torch.equal(terms.logged["flow"], plain.loss)
    assert torch.allclose(terms.loss, plain.loss * weighting(sigma(draws(4), 6)))


@pytest.mark.parametrize("loss", [FlowMatchingLoss(), LatentBridgeMatchingLoss()])
def test_half_precision_batches_are_computed_in_float32(loss):
    """A batch in bfloat16 costs what the same numbers cost in float32, and the denoiser sees the same latents."""
    batch, runs = make_batch(mask=True).to(dtype=torch.bfloat16), []
    for each in (batch, batch.to(dtype=torch.float32)):
        denoiser = Oracle(torch.zeros(4, *SHAPE, dtype=torch.bfloat16))
        terms = loss(denoiser, each, draws(4))
        runs.append([terms.loss, *(value.nan_to_num() for value in terms.logged.values()), *denoiser.seen[0]])
    for half, full in zip(*runs, strict=True):
        assert half.dtype == torch.float32
        assert torch.equal(half, full)


def test_the_pixel_gradient_is_that_of_the_decoded_crop():
    """d L1 / d velocity = -s sign(predicted - target) / number of pixels, on decoded channels, inside the crop only."""
    batch, gradients, weight = make_batch(), [], 7.0
    velocity = torch.zeros(4, *SHAPE, requires_grad=True)
    for pixel in (None, PixelTerm(l1=weight, crop=3)):
        loss = LatentBridgeMatchingLoss(always(0.5), 0.0, sub_prob=0.0, pixel=pixel, decode=decode)
        gradients += torch.autograd.grad(loss(Oracle(velocity), batch, draws(4)).loss.sum(), velocity)
    change = gradients[1] - gradients[0]
    wrong_side = (batch.source_latents - batch.target_latents).sign()  # zero velocity: predicted - target = s * this
    inside = change != 0
    assert inside.flatten(1).sum(1).tolist() == [3 * 3 * 3] * 4
    assert not inside[:, 3:].any()
    assert torch.allclose(change[inside], (-0.5 * weight * wrong_side / 27)[inside], rtol=1e-4)


@pytest.mark.parametrize("shape", [(-1,), (-1, 1, 1, 1)])
def test_perceptual_distances_of_either_shape(shape):
    pixel = PixelTerm(l1=0.0, lpips=1.0, perceptual=lambda a, b: (a - b).square().mean((1, 2, 3)).view(shape))
    predicted, target = make_batch().source_latents, make_batch().target_latents
    terms = pixel(predicted, target, decode, draws(4))
    assert torch.allclose(terms["pixel_lpips"], (decode(predicted) - decode(target)).square().mean((1, 2, 3)))


def test_a_perceptual_distance_averaged_over_the_batch_is_refused():
    pixel = PixelTerm(lpips=1.0, perceptual=lambda a, b: (a - b).square().mean())
    with pytest.raises(RuntimeError, match="shape"):
        pixel(make_batch().source_latents, make_batch().target_latents, decode, draws(4))


def test_every_place_of_a_crop_is_drawn_equally_often():
    """Each cell holds its own index, so that a crop of one cell tells where it lies."""
    count, (height, width) = 6000, SHAPE[1:]
    cells = torch.arange(height * width).float().view(1, 1, height, width).expand(count, 3, -1, -1)
    seen = []
    PixelTerm(crop=1)(cells, cells, lambda latents: seen.append(latents) or latents, draws(count))
    shares = seen[0][:, 0, 0, 0].long().bincount(minlength=height * width) / count
    expected = 1 / (height * width)
    assert (shares - expected).abs().max() < 4.5 * math.sqrt(expected / count)
    assert torch.equal(seen[0], seen[1])  # prediction and target are cut at the same place


@pytest.mark.parametrize("name", ["bridge_noise", "sub_prob", "main_weight", "sub_weight", "mask_weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(name, value):
    with pytest.raises(ValueError, match=str(value)):
        LatentBridgeMatchingLoss(**{name: value})


def test_a_loss_that_trains_nothing_is_refused():
    with pytest.raises(ValueError, match=r"nothing to train with sub_prob=1.0, main_weight=1.0, sub_weight=0.0"):
        LatentBridgeMatchingLoss(sub_prob=1.0, sub_weight=0.0)


@pytest.mark.parametrize("mask_weight", [0.0, 0.1, 1.0, 3.0])
@pytest.mark.parametrize("prediction", ["displacement", "drift"])
def test_predicting_nothing_costs_one_whatever_background_weighs(mask_weight, prediction):
    """An edit on a sixteenth of the picture, and a source that differs in it alone, as in removing an object."""
    batch = make_batch()
    batch.mask = torch.ones(4, 1, *SHAPE[1:])
    batch.mask[:, :, :2, :3] = 0
    inside = torch.zeros(4, 1, *SHAPE[1:])
    inside[:, :, :2, :3] = 1
    batch.source_latents = batch.target_latents + inside * batch.source_latents
    loss = LatentBridgeMatchingLoss(always(1.0), 0.0, prediction, sub_prob=0.0, mask_weight=mask_weight)
    assert torch.allclose(loss(ZERO, batch, draws(4)).loss, torch.ones(4), rtol=1e-5)


def test_the_weight_of_a_drift_follows_the_mask():
    """alpha^2 = 1 + noise^2 (1 - s) / (s d), d the distance with the error's weights: written out for one sample."""
    batch = make_batch(1, mask=True)
    loss = LatentBridgeMatchingLoss(always(0.25), 0.5, "drift", sub_prob=0.0, mask_weight=0.2, normalise=False)
    velocity = torch.zeros(1, *SHAPE)
    got = loss(Oracle(velocity), batch, draws(1)).loss.item()
    assert batch.mask is not None
    weight = 1 - 0.8 * batch.mask.double().expand(1, *SHAPE)
    noise = draws(1).normal("noise", SHAPE).double()
    displacement = batch.source_latents.double() - batch.target_latents.double()
    drift = displacement + 0.5 * 3**0.5 * noise
    error, distance = ((weight * each**2).sum() / weight.sum() for each in (drift, displacement))
    assert got == pytest.approx((error / (1 + 0.5**2 * 3 / distance)).item(), rel=1e-5)
