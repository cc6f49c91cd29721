"""Properties of paths, samplers of sigma, and both objectives; oracles are written out in float64 here."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losses import (
    Batch,
    BridgePath,
    Condition,
    DiscreteSigma,
    FlowMatchingLoss,
    FlowPath,
    GaussianWeighting,
    LatentBridgeMatchingLoss,
    LogitNormalSigma,
    PixelTerm,
    QwenShiftedSigma,
    SampleRandom,
    UniformSigma,
    predict_target,
    qwen_shift,
    qwen_shift_mu,
)

SHAPE = (16, 4, 6)


def draws(count: int, seed: int = 0, first: int = 0) -> SampleRandom:
    return SampleRandom(seed, range(first, first + count))


def make_batch(size: int = 4, seed: int = 0, mask: bool = False) -> Batch:
    random = draws(size, seed + 100)
    mask_latents = (random.uniform("mask", (1, *SHAPE[1:])) < 0.5).float() if mask else None
    condition = Condition(random.normal("text", (5, 8)), torch.ones(size, 5, dtype=torch.bool), [])
    return Batch(
        source_latents=random.normal("source", SHAPE),
        sub_noise=torch.full(SHAPE, 3.0).expand(size, *SHAPE),
        condition=condition,
        negative=None,
        ids=[str(i) for i in range(size)],
        target_latents=random.normal("target", SHAPE),
        mask=mask_latents,
    )


class Oracle:
    """Knows the answer: the displacement from where it is told the path starts. Records what it was shown."""

    def __init__(self, velocity: torch.Tensor, error: float | torch.Tensor = 0.0):
        self.velocity, self.error, self.seen = velocity, error, []

    def __call__(self, latents, sigma, condition):
        self.seen.append((latents, sigma))
        return self.velocity + self.error


def always(value: float) -> DiscreteSigma:
    return DiscreteSigma([value])


# --- randomness ---


@given(st.integers(0, 2**31), st.lists(st.integers(0, 10**12), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_a_samples_draw_depends_on_its_number_alone(seed, numbers):
    together = SampleRandom(seed, numbers).normal("noise", (3,))
    for i, number in enumerate(numbers):
        assert torch.equal(SampleRandom(seed, [number]).normal("noise", (3,))[0], together[i])
    assert torch.equal(SampleRandom(seed, numbers).normal("noise", (3,)), together)


def test_purposes_and_seeds_are_independent():
    a, b = draws(20_000).normal("noise"), draws(20_000).normal("other")
    c = draws(20_000, seed=1).normal("noise")
    bound = 4 / math.sqrt(20_000)  # four standard errors
    for x, y in ((a, b), (a, c), (a[1:], a[:-1])):
        assert abs(torch.corrcoef(torch.stack([x, y]))[0, 1]) < bound
    assert abs(a.mean()) < bound
    assert abs(a.var() - 1) < 2 * bound


@pytest.mark.parametrize("loss", [FlowMatchingLoss(), LatentBridgeMatchingLoss(sub_prob=0.5)])
def test_no_loss_touches_the_global_generator(loss):
    batch, state = make_batch(), torch.get_rng_state()
    loss(Oracle(torch.zeros(4, *SHAPE)), batch, draws(4))
    assert torch.equal(state, torch.get_rng_state())


# --- paths ---


@given(st.floats(0, 0.5), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_bridge_begins_at_the_start_and_ends_at_the_target(bridge_noise, seed):
    random = draws(2, seed)
    start, target, noise = (random.normal(name, SHAPE) for name in ("start", "target", "noise"))
    path = BridgePath(bridge_noise)
    assert torch.equal(path.sample(start, target, torch.ones(2), noise).latents, start)
    assert torch.equal(path.sample(start, target, torch.zeros(2), noise).latents, target)


def test_velocity_is_the_paths_derivative():
    """Central differences of the mean path, in float64."""
    random = draws(3)
    start, target, zero = (
        random.normal("a", SHAPE).double(),
        random.normal("b", SHAPE).double(),
        torch.zeros(3, *SHAPE).double(),
    )
    sigma, h = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64), 1e-6
    for sample in (
        lambda s: BridgePath(0.1).sample(start, target, s, zero),
        lambda s: FlowPath().sample(start, target, s),
    ):
        slope = (sample(sigma + h).latents - sample(sigma - h).latents) / (2 * h)
        assert (sample(sigma).velocity - slope).abs().max() < 1e-8


@pytest.mark.parametrize("sigma", [0.25, 0.5, 0.75])
def test_bridge_marginal_variance(sigma):
    """bridge_noise^2 s (1 - s) over 40,000 elements, within four standard errors of a variance."""
    noise = draws(1).normal("noise", (40_000, 1, 1))
    zero = torch.zeros_like(noise)
    variance = BridgePath(0.3).sample(zero, zero, torch.tensor([sigma]), noise).latents.var()
    expected = 0.3**2 * sigma * (1 - sigma)
    assert variance == pytest.approx(expected, rel=4 * math.sqrt(2 / 40_000))


def test_predicted_target_is_exact_without_noise():
    random = draws(3)
    start, target, noise = (random.normal(name, SHAPE).double() for name in "abc")
    sigma = torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64)
    for path in (BridgePath(0.0), BridgePath(0.2, "drift")):
        sample = path.sample(start, target, sigma, noise)
        assert (predict_target(sample.latents, sample.velocity, sigma) - target).abs().max() < 1e-12


def test_drift_points_from_where_it_is_to_the_target():
    """(x - target) / s, and the weight 1 / alpha^2 of ViBT written out."""
    random = draws(2)
    start, target, noise = (random.normal(name, SHAPE).double() for name in "abc")
    sigma, scale = torch.tensor([0.25, 0.8], dtype=torch.float64), 0.7
    sample = BridgePath(scale, "drift").sample(start, target, sigma, noise)
    for i, s in enumerate(sigma.tolist()):
        x = s * start[i] + (1 - s) * target[i] + scale * math.sqrt(s * (1 - s)) * noise[i]
        assert (sample.velocity[i] - (x - target[i]) / s).abs().max() < 1e-12
        distance = ((start[i] - target[i]) ** 2).sum().item()
        alpha_squared = 1 + scale**2 * (1 - s) * math.prod(SHAPE) / (s * distance)
        assert sample.weight[i].item() == pytest.approx(1 / alpha_squared, rel=1e-9)


def test_drift_without_noise_is_the_displacement():
    random = draws(2)
    start, target, noise = (random.normal(name, SHAPE) for name in "abc")
    sigma = torch.tensor([0.5, 1.0])
    drift, displacement = (
        BridgePath(0.0, kind).sample(start, target, sigma, noise) for kind in ("drift", "displacement")
    )
    assert torch.allclose(drift.velocity, displacement.velocity, atol=1e-5)
    assert torch.equal(drift.weight, displacement.weight)


# --- sigmas ---


def test_discrete_probabilities():
    sigma = DiscreteSigma([1.0, 0.5, 0.25], [2, 1, 1])(draws(20_000), 64)
    for value, probability in ((1.0, 0.5), (0.5, 0.25), (0.25, 0.25)):
        share = (sigma == value).float().mean().item()
        assert share == pytest.approx(probability, abs=4 * math.sqrt(probability * (1 - probability) / 20_000))


def test_uniform_and_logit_normal():
    uniform = UniformSigma()(draws(20_000), 64)
    assert uniform.min() > 0
    assert uniform.max() <= 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=4 / math.sqrt(12 * 20_000))
    logits = torch.logit(LogitNormalSigma(0.5, 2.0)(draws(20_000), 64).double())
    assert logits.mean().item() == pytest.approx(0.5, abs=4 * 2 / math.sqrt(20_000))
    assert logits.std().item() == pytest.approx(2.0, rel=0.03)


def test_the_start_may_be_drawn_and_the_target_never(monkeypatch):
    """The ends of what is drawn: 0, and the largest number below 1."""
    monkeypatch.setattr(
        SampleRandom, "stratified", lambda *_: torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), raising=True
    )
    sigma = UniformSigma()(draws(2), 64)
    assert sigma[0] == 1
    assert sigma[1] > 0


@given(st.integers(16, 16_384))
@settings(max_examples=30, deadline=None)
def test_qwen_shift(num_tokens):
    """The published end points, and the formula as it is usually written."""
    assert qwen_shift_mu(256) == pytest.approx(0.5)
    assert qwen_shift_mu(8192) == pytest.approx(0.9)
    sigma = torch.tensor([0.1, 0.5, 0.99], dtype=torch.float64)
    mu = qwen_shift_mu(num_tokens)
    assert torch.allclose(qwen_shift(sigma, num_tokens), math.exp(mu) / (math.exp(mu) + (1 / sigma - 1)))
    ends = torch.tensor([0.0, 1.0])
    assert torch.allclose(qwen_shift(ends, num_tokens), ends, atol=1e-6)
    shifted = QwenShiftedSigma()(draws(8), num_tokens)
    assert torch.equal(shifted, qwen_shift(UniformSigma()(draws(8), num_tokens), num_tokens))


def test_gaussian_weighting_is_diffsynths_table():
    """Its 1000-entry table, computed as upstream does: bell over the timesteps, less the minimum, mean 1."""
    t = [1000 - i for i in range(1000)]
    bell = [math.exp(-2 * ((x - 500) / 1000) ** 2) for x in t]
    shifted = [b - min(bell) for b in bell]
    table = torch.tensor([s * 1000 / sum(shifted) for s in shifted], dtype=torch.float64)
    sigma = torch.tensor(t, dtype=torch.float64) / 1000
    assert (GaussianWeighting()(sigma) - table).abs().max() < 1e-9
    assert GaussianWeighting()(torch.ones(1)).item() == pytest.approx(0, abs=1e-6)


# --- objectives ---


def test_flow_matching_value_by_hand():
    batch, random = make_batch(3), draws(3)
    oracle = Oracle(
        random.normal("noise", SHAPE) - batch.target_latents, torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1, 1)
    )
    terms = FlowMatchingLoss(sigma=always(0.5))(oracle, batch, random)
    assert torch.allclose(terms.loss, torch.tensor([0.0, 1.0, 4.0]), atol=1e-5)
    latents, sigma = oracle.seen[0]
    assert torch.allclose(latents, 0.5 * random.normal("noise", SHAPE) + 0.5 * batch.target_latents)
    assert sigma.dtype == torch.float32


def test_bridge_oracle_has_no_loss_and_main_starts_at_the_source():
    batch = make_batch()
    oracle = Oracle(batch.source_latents - batch.target_latents)
    terms = LatentBridgeMatchingLoss(sigma=always(1.0), sub_prob=0.0)(oracle, batch, draws(4))
    assert terms.loss.max() < 1e-10
    assert torch.equal(oracle.seen[0][0], batch.source_latents)
    assert terms.logged["latent/sub"].isnan().all()


def test_sub_stream_starts_at_white():
    batch = make_batch()
    oracle = Oracle(batch.sub_noise - batch.target_latents)
    terms = LatentBridgeMatchingLoss(sigma=always(1.0), sub_prob=1.0)(oracle, batch, draws(4))
    assert terms.loss.max() < 1e-10
    assert torch.equal(oracle.seen[0][0], batch.sub_noise)


@given(st.floats(0.1, 0.9), st.floats(0.1, 3), st.floats(0.1, 3))
@settings(max_examples=20, deadline=None)
def test_importance_weights_are_unbiased(sub_prob, main_weight, sub_weight):
    """E[choice] = (1 - p) L_main main/(1-p) + p L_sub sub/p, which is what `sum` computes, for each sample."""
    batch, wrong = make_batch(), Oracle(torch.zeros(4, *SHAPE))
    options = {"main_weight": main_weight, "sub_weight": sub_weight, "sigma": always(0.5)}
    total = LatentBridgeMatchingLoss(combine="sum", **options)(wrong, batch, draws(4)).loss
    main = LatentBridgeMatchingLoss(sub_prob=0.0, **options)(wrong, batch, draws(4)).loss
    sub = LatentBridgeMatchingLoss(sub_prob=1.0, **options)(wrong, batch, draws(4)).loss
    assert torch.allclose(main + sub, total, rtol=1e-5)
    drawn = LatentBridgeMatchingLoss(sub_prob=sub_prob, **options)(wrong, batch, draws(4))
    is_sub = draws(4).stratified("stream") < sub_prob
    expected = torch.where(is_sub, sub / sub_prob, main / (1 - sub_prob))
    assert torch.allclose(drawn.loss, expected, rtol=1e-5)
    assert torch.equal(drawn.logged["latent/main"].isnan(), is_sub)


def test_streams_are_chosen_with_their_probability():
    share = (draws(20_000).stratified("stream") < 0.3).float().mean().item()
    assert share == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / 20_000))


def test_normalisation_is_relative_to_the_samples_distance():
    """An answer of zero velocity costs exactly 1 in either stream, however far the start is."""
    batch, zero = make_batch(), Oracle(torch.zeros(4, *SHAPE))
    for sub_prob in (0.0, 1.0):
        terms = LatentBridgeMatchingLoss(sub_prob=sub_prob)(zero, batch, draws(4))
        assert torch.allclose(terms.loss, torch.ones(4), rtol=1e-5)
    plain = LatentBridgeMatchingLoss(sub_prob=1.0, normalise=False)(zero, batch, draws(4))
    assert torch.allclose(plain.loss, (3 - batch.target_latents).square().flatten(1).mean(1), rtol=1e-5)


def test_pairs_that_hardly_differ_do_not_dominate():
    batch = make_batch()
    batch.source_latents = batch.target_latents + 1e-4
    terms = LatentBridgeMatchingLoss(sub_prob=0.0)(Oracle(torch.zeros(4, *SHAPE), 0.1), batch, draws(4))
    assert terms.loss.max() < 0.01 / 0.05 + 1e-3


def test_mask_weights_count_background_less():
    batch = make_batch(mask=True)
    assert batch.mask is not None
    error = batch.mask * 2 + (1 - batch.mask) * 3
    oracle = Oracle(batch.source_latents - batch.target_latents, error)
    ignore = LatentBridgeMatchingLoss(sub_prob=0.0, normalise=False, mask_weight=0.0)(oracle, batch, draws(4))
    assert torch.allclose(ignore.loss, torch.full((4,), 9.0), rtol=1e-4)
    half = LatentBridgeMatchingLoss(sub_prob=0.0, normalise=False, mask_weight=0.5)(oracle, batch, draws(4))
    share = batch.mask.flatten(1).mean(1)
    assert torch.allclose(half.loss, (0.5 * share * 4 + (1 - share) * 9) / (0.5 * share + 1 - share), rtol=1e-4)


def test_an_empty_mask_changes_nothing():
    batch = make_batch()
    oracle = Oracle(torch.zeros(4, *SHAPE))
    without = LatentBridgeMatchingLoss(mask_weight=0.3)(oracle, batch, draws(4)).loss
    batch.mask = torch.zeros(4, 1, *SHAPE[1:])
    assert torch.allclose(LatentBridgeMatchingLoss(mask_weight=0.3)(oracle, batch, draws(4)).loss, without, rtol=1e-6)


def decode(latents: torch.Tensor) -> torch.Tensor:
    """A stand-in decoder: three channels, each cell a block of 8 pixels."""
    return torch.nn.functional.interpolate(latents[:, :3], scale_factor=8)


def squared(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a - b).square().mean((1, 2, 3), keepdim=True)


def test_pixel_terms_compare_the_predicted_target():
    batch = make_batch()
    oracle = Oracle(batch.source_latents - batch.target_latents, 0.5)  # the predicted target is off by -s * 0.5
    pixel = PixelTerm(l1=2.0, lpips=3.0, perceptual=squared, crop=None)
    terms = LatentBridgeMatchingLoss(sigma=always(0.5), bridge_noise=0.0, sub_prob=0.0, pixel=pixel, decode=decode)(
        oracle, batch, draws(4)
    )
    assert torch.allclose(terms.logged["pixel_l1/main"], torch.full((4,), 2 * 0.25), rtol=1e-4)
    assert torch.allclose(terms.logged["pixel_lpips/main"], torch.full((4,), 3 * 0.0625), rtol=1e-4)
    parts = [terms.logged[f"{name}/main"] for name in ("latent", "pixel_l1", "pixel_lpips")]
    assert torch.allclose(terms.loss, torch.stack(parts).sum(0))


def test_pixel_terms_reach_the_denoiser_through_a_crop():
    batch, seen = make_batch(), []

    def watch(latents):
        seen.append(latents)
        return decode(latents)

    velocity = torch.zeros(4, *SHAPE, requires_grad=True)
    pixel = PixelTerm(crop=3)
    loss = LatentBridgeMatchingLoss(sub_prob=0.0, pixel=pixel, decode=watch)
    loss(Oracle(velocity), batch, draws(4)).loss.sum().backward()
    assert velocity.grad is not None
    assert velocity.grad.abs().max() > 0
    assert seen[0].shape == (4, 16, 3, 3)
    places = [(y, x) for y in range(SHAPE[1] - 2) for x in range(SHAPE[2] - 2)]
    for crop, target in zip(seen[1], batch.target_latents, strict=True):
        assert any(torch.equal(crop, target[:, y : y + 3, x : x + 3]) for y, x in places)


def test_an_accumulated_batch_has_the_same_terms():
    """Rows are independent: a batch of four equals two of two."""
    batch = make_batch()
    loss = LatentBridgeMatchingLoss(sub_prob=0.5, sigma=UniformSigma())
    whole = loss(Oracle(torch.zeros(4, *SHAPE)), batch, draws(4)).loss
    for first in (0, 2):
        part = make_batch()
        for name in ("source_latents", "sub_noise", "target_latents"):
            setattr(part, name, getattr(batch, name)[first : first + 2])
        half = loss(Oracle(torch.zeros(2, *SHAPE)), part, draws(2, first=first)).loss
        assert torch.allclose(half, whole[first : first + 2], rtol=1e-6)


WRONG = [
    (lambda: BridgePath(-0.1), "bridge_noise must be 0 or more, got -0.1"),
    (lambda: BridgePath(0.1, "speed"), "got 'speed'"),  # type: ignore[arg-type]
    (lambda: DiscreteSigma([0.0, 1.0]), r"values must lie in \(0, 1\]"),
    (lambda: DiscreteSigma([1.0], [1, 2]), "probabilities must be 1 numbers"),
    (lambda: LogitNormalSigma(0, 0), "std must be positive"),
    (lambda: FlowMatchingLoss(mask_weight=-1), "mask_weight must be 0 or more"),
    (lambda: LatentBridgeMatchingLoss(sub_prob=1.5), r"sub_prob must lie in \[0, 1\], got 1.5"),
    (lambda: LatentBridgeMatchingLoss(combine="both"), "got 'both'"),  # type: ignore[arg-type]
    (lambda: LatentBridgeMatchingLoss(pixel=PixelTerm()), "pixel terms need decode"),
    (lambda: PixelTerm(l1=0.0), "not both 0"),
    (lambda: PixelTerm(lpips=1.0), "needs perceptual"),
    (lambda: PixelTerm(crop=0), "crop must be positive"),
]


@pytest.mark.parametrize(("construct", "message"), WRONG)
def test_wrong_arguments_are_named(construct, message):
    with pytest.raises(ValueError, match=message):
        construct()
