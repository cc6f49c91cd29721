"""Samplers against oracles that know the target, against simulation, and against diffusers' scheduler and guidance."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageEditInpaintPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data_prep.errors import InputError
from eval.qwen.samplers import BridgeSampler, FlowSampler, Keep, guide
from eval.qwen.samplers.sigmas import lightning_sigmas, qwen_sigmas, walked_steps
from eval.qwen.samplers.solvers import SOLVERS
from losses.batch import Condition, Edit
from losses.randomness import PictureRandom, SampleRandom

QWEN_SCHEDULER = {  # scheduler/scheduler_config.json of Qwen/Qwen-Image-Edit-2511
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
SHAPE = (16, 4, 6)
CONDITION = Condition(torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool), [])
NEGATIVE = Condition(torch.ones(1, 1, 1), torch.ones(1, 1, dtype=torch.bool), [])


def make_edit(batch: int, negative: Condition | None = None, shape=SHAPE) -> Edit:
    generator = torch.Generator().manual_seed(0)
    source, white = (torch.randn(batch, *shape, generator=generator) for _ in range(2))
    return Edit(source, white, CONDITION, negative, [str(i) for i in range(batch)])


def targets(batch: int, shape=SHAPE) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(9))


def drift_oracle(target: Tensor):
    """(x − target)/s: the drift of a bridge, and the velocity of a straight path, for a known target."""
    return lambda latents, sigma, condition: (latents - target) / sigma[:, None, None, None]


def displacement_oracle(start: Tensor, target: Tensor):
    return lambda latents, sigma, condition: start - target


@pytest.mark.parametrize("num_steps", [1, 2, 4])
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("start", ["source", "white"])
def test_an_oracle_brings_every_bridge_sampler_to_the_target(start, stochastic, num_steps):
    edit, target = make_edit(3), targets(3)
    beginning = edit.source_latents if start == "source" else edit.sub_noise
    for prediction, oracle in (
        ("displacement", displacement_oracle(beginning, target)),
        ("drift", drift_oracle(target)),
    ):
        sampler = BridgeSampler(start, stochastic, bridge_noise=0.3, prediction=prediction)
        reached = sampler(oracle, edit, num_steps, SampleRandom(0, range(3)))
        assert torch.allclose(reached, target, atol=1e-5)


@pytest.mark.parametrize("num_steps", [1, 2, 4])
@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
def test_an_oracle_brings_the_flow_sampler_to_the_target(num_steps, cfg_scale):
    target = targets(3)
    reached = FlowSampler(cfg_scale)(drift_oracle(target), make_edit(3, NEGATIVE), num_steps, SampleRandom(0, range(3)))
    assert torch.allclose(reached, target, atol=1e-5)


@pytest.mark.parametrize("num_steps", [2, 4, 7])
@pytest.mark.parametrize("prediction", ["displacement", "drift"])
def test_stochastic_bridges_keep_the_marginal_variance(prediction, num_steps):
    """bridge_noise²·s(1 − s) around the straight line at every step, 0 at the end; within 5 standard errors."""
    shape, noise = (16, 32, 32), 0.7
    edit, target = make_edit(2, shape=shape), targets(2, shape)
    oracle = drift_oracle(target) if prediction == "drift" else displacement_oracle(edit.source_latents, target)
    seen = []
    BridgeSampler("source", True, noise, prediction)(
        oracle, edit, num_steps, SampleRandom(0, [0, 1]), lambda _, latents: seen.append(latents)
    )
    for step, latents in enumerate(seen, start=1):
        sigma = 1 - step / num_steps
        deviation = latents - (sigma * edit.source_latents + (1 - sigma) * target)
        expected = noise**2 * sigma * (1 - sigma)
        error = 5 * expected * (2 / deviation.numel()) ** 0.5
        assert deviation.var().item() == pytest.approx(expected, abs=error + 1e-9)


def test_steps_are_independent_draws_in_the_displacement_form():
    edit, target, seen = make_edit(1, shape=(16, 32, 32)), targets(1, (16, 32, 32)), []
    BridgeSampler(stochastic=True, bridge_noise=1.0)(
        displacement_oracle(edit.source_latents, target),
        edit,
        3,
        SampleRandom(0, [0]),
        lambda _, latents: seen.append(latents),
    )
    noises = [x - ((1 - k / 3) * edit.source_latents + k / 3 * target) for k, x in enumerate(seen[:2], start=1)]
    correlation = torch.corrcoef(torch.stack([noise.flatten() for noise in noises]))[0, 1]
    assert abs(correlation) < 5 / noises[0].numel() ** 0.5


@pytest.mark.parametrize("sampler", [BridgeSampler(stochastic=True, bridge_noise=0.5), FlowSampler()])
def test_a_row_does_not_depend_on_its_batch(sampler):
    def denoiser(latents, sigma, condition):
        return latents.sin() + sigma[:, None, None, None]

    edit, numbers = make_edit(3), [7, 3, 5]
    together = sampler(denoiser, edit, 4, SampleRandom(1, numbers))
    for i, number in enumerate(numbers):
        alone = Edit(edit.source_latents[i : i + 1], edit.sub_noise[i : i + 1], CONDITION, None, [str(i)])
        assert torch.equal(sampler(denoiser, alone, 4, SampleRandom(1, [number]))[0], together[i])
    assert not torch.equal(sampler(denoiser, edit, 4, SampleRandom(2, numbers)), together)


def test_the_deterministic_bridge_draws_nothing_and_no_sampler_touches_the_global_generator():
    edit, state = make_edit(1), torch.get_rng_state()
    results = [BridgeSampler()(drift_oracle(targets(1)), edit, 2, SampleRandom(seed, [0])) for seed in (0, 1)]
    FlowSampler()(drift_oracle(targets(1)), edit, 2, SampleRandom(0, [0]))
    assert torch.equal(*results)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_denoiser_is_asked_at_every_sigma_but_zero_and_on_step_follows():
    asked, seen = [], []

    def denoiser(latents, sigma, condition):
        asked.append(sigma.tolist())
        return torch.zeros_like(latents)

    BridgeSampler()(denoiser, make_edit(2), 4, SampleRandom(0, [0, 1]), lambda step, _: seen.append(step))
    assert asked == [[s, s] for s in (1.0, 0.75, 0.5, 0.25)]
    assert seen == [1, 2, 3, 4]


@pytest.mark.parametrize("size", [(256, 256), (512, 768), (1024, 1024), (1664, 928)])
@pytest.mark.parametrize("num_steps", [2, 4, 20, 40])
def test_flow_sigmas_are_the_stock_schedulers(size, num_steps):
    num_tokens = size[0] * size[1] // 16**2
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(QWEN_SCHEDULER)
    slope = (0.9 - 0.5) / (8192 - 256)
    scheduler.set_timesteps(
        sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=num_tokens * slope + 0.5 - slope * 256
    )
    assert torch.allclose(torch.tensor(qwen_sigmas(num_steps, num_tokens)), scheduler.sigmas, atol=2e-6)


def test_one_step_goes_straight_where_the_stock_scheduler_gives_nan():
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(QWEN_SCHEDULER)
    with np.errstate(invalid="ignore"):
        scheduler.set_timesteps(sigmas=np.array([1.0]), mu=0.7)
    assert scheduler.sigmas[0].isnan()
    assert qwen_sigmas(1, 4096) == [1.0, 0.0]
    assert FlowSampler(shift="none").sigmas(2, 4096) == [1.0, 0.5, 0.0]


def test_guidance_is_diffusers_formula_on_packed_tokens():
    positive, negative = torch.randn(2, *SHAPE), torch.randn(2, *SHAPE)
    plain = guide(positive, negative, 4.0, rescale=False)
    assert torch.allclose(plain, 4 * positive - 3 * negative, atol=1e-5)
    rescaled = guide(positive, negative, 4.0, rescale=True)
    for b, row, column in [(0, 0, 0), (1, 1, 2)]:  # a token is a 2 x 2 patch of 16 channels
        patch = (b, slice(None), slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2))
        expected = plain[patch] * positive[patch].norm() / plain[patch].norm()
        assert torch.allclose(rescaled[patch], expected, atol=1e-5)


def test_guidance_changes_nothing_when_both_predictions_agree_and_survives_zero():
    positive = torch.randn(1, *SHAPE)
    assert torch.allclose(guide(positive, positive, 4.0, rescale=True), positive, atol=1e-6)
    assert torch.equal(guide(torch.zeros_like(positive), torch.zeros_like(positive), 4.0, True), 0 * positive)


def test_guidance_uses_the_negative_condition_and_asks_for_it():
    def denoiser(latents, sigma, condition):
        return condition.prompt_emb.sum() + 0 * latents

    edit = make_edit(1, NEGATIVE)
    guided = FlowSampler(2.0, cfg_rescale=False)(denoiser, edit, 1, SampleRandom(0, [0]))
    unguided = FlowSampler(1.0)(denoiser, edit, 1, SampleRandom(0, [0]))
    assert torch.allclose(guided, unguided + 1, atol=1e-6)  # 1 + 2·(0 − 1) = −1, subtracted
    with pytest.raises(InputError, match=r"cfg_scale=2\.0 needs a negative prompt"):
        FlowSampler(2.0)(denoiser, make_edit(1), 1, SampleRandom(0, [0]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BridgeSampler("middle"), "got 'middle'"),
        (lambda: BridgeSampler(prediction="noise"), "got 'noise'"),
        (lambda: BridgeSampler(bridge_noise=-1), "got -1"),
        (lambda: FlowSampler(0.5), "got 0.5"),
        (lambda: FlowSampler(shift="log"), "got 'log'"),
        (lambda: FlowSampler(solver="ddim"), "got 'ddim'"),
        (lambda: qwen_sigmas(0, 4096), "got 0"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("num_steps", [4, 8])
def test_lightning_sigmas_are_the_schedulers_with_log_3(num_steps):
    shift = {"base_shift": np.log(3), "max_shift": np.log(3), "shift_terminal": None}
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(QWEN_SCHEDULER | shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=np.log(3))
    assert torch.allclose(torch.tensor(lightning_sigmas(num_steps)), scheduler.sigmas, atol=1e-6)


@pytest.mark.parametrize(
    "sampler",
    [
        *(BridgeSampler(), BridgeSampler("white"), FlowSampler(), FlowSampler(strength=0.5)),
        *(FlowSampler(solver=solver) for solver in SOLVERS),
    ],
)
def test_what_is_kept_is_on_its_own_path_at_every_step(sampler):
    """Its latents at the end, exactly; before, the mean of its path; the rest is free."""
    edit, kept, seen = make_edit(2), targets(2), []
    mask = torch.zeros(2, 1, 4, 6)
    mask[..., 3:] = 1
    mask[..., 3] = 0.25
    reached = sampler(
        lambda latents, sigma, condition: torch.ones_like(latents),
        edit,
        4,
        SampleRandom(0, [0, 1]),
        lambda step, latents: seen.append(latents),
        Keep(kept, mask),
    )
    assert torch.equal(reached[..., :3], kept[..., :3])
    assert not torch.isclose(reached[..., 4:], kept[..., 4:]).all()
    assert len(seen) == sampler.calls(4)
    if isinstance(sampler, FlowSampler):
        start, sigmas = SampleRandom(0, [0, 1]).normal("noise", SHAPE), sampler.sigmas(4, 6)
    else:
        start, sigmas = (edit.sub_noise if sampler.start == "white" else edit.source_latents), [1, 0.75, 0.5, 0.25, 0]
    for sigma, latents in zip(sigmas[1:], seen, strict=True):
        assert torch.allclose(latents[..., :3], (sigma * start + (1 - sigma) * kept)[..., :3], atol=1e-6)


@pytest.mark.parametrize("num_steps", [2, 5])
@pytest.mark.parametrize("prediction", ["displacement", "drift"])
def test_what_a_stochastic_bridge_keeps_has_the_noise_of_its_path(prediction, num_steps):
    """bridge_noise²·s(1 − s) in the kept part as in the edited one, the same draws in both; exactly what is kept at the end."""
    shape, noise = (16, 32, 32), 0.7
    edit, kept = make_edit(2, shape=shape), targets(2, shape)
    oracle = drift_oracle(kept) if prediction == "drift" else displacement_oracle(edit.source_latents, kept)
    mask = torch.zeros(2, 1, 32, 32)
    mask[..., 16:] = 1
    sampler, seen, free = BridgeSampler("source", True, noise, prediction), [], []
    arguments = (oracle, edit, num_steps, SampleRandom(0, [0, 1]))
    reached = sampler(*arguments, lambda _, latents: seen.append(latents), Keep(kept, mask))
    sampler(*arguments, lambda _, latents: free.append(latents))
    assert torch.equal(reached[..., :16], kept[..., :16])
    for step, (latents, unmasked) in enumerate(zip(seen[:-1], free[:-1], strict=True), start=1):
        sigma = 1 - step / num_steps
        deviation = (latents - (sigma * edit.source_latents + (1 - sigma) * kept))[..., :16]
        expected = noise**2 * sigma * (1 - sigma)
        assert deviation.var().item() == pytest.approx(expected, abs=5 * expected * (2 / deviation.numel()) ** 0.5)
        assert torch.allclose(latents, unmasked, atol=1e-5)  # the oracle's own path, were it not masked


def test_less_strength_starts_at_the_partly_noised_source():
    edit, asked = make_edit(1), []

    def denoiser(latents, sigma, condition):
        asked.append((latents, sigma.item()))
        return torch.zeros_like(latents)

    noise = SampleRandom(3, [0]).normal("noise", SHAPE)
    for shift in ("none", "qwen", "lightning"):
        asked.clear()
        FlowSampler(strength=0.4, shift=shift)(denoiser, edit, 5, SampleRandom(3, [0]))
        sigmas = [sigma for _, sigma in asked]
        assert sigmas[0] == pytest.approx(0.4)  # the share of noise, whatever the spacing
        assert len(sigmas) == 2
        assert torch.allclose(asked[0][0], 0.4 * noise + 0.6 * edit.source_latents, atol=1e-6)
        if shift == "none":
            assert sigmas[1] == pytest.approx(0.2)


@settings(max_examples=200)
@given(num_steps=st.integers(1, 200), percent=st.integers(1, 100))
def test_strength_walks_as_many_steps_as_diffusers(num_steps, percent):
    strength = percent / 100
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(QWEN_SCHEDULER)
    scheduler.timesteps = torch.arange(num_steps)
    pipeline = SimpleNamespace(scheduler=scheduler)
    timesteps, walked = QwenImageEditInpaintPipeline.get_timesteps(pipeline, num_steps, strength, "cpu")
    assert walked_steps(num_steps, strength) == walked == len(timesteps)
    with pytest.raises(ValueError, match="less than one step"):
        walked_steps(num_steps, 1e-20)


@pytest.mark.parametrize("start", [0.01, 0.02, 0.3, 0.999, 1.0])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 40])
def test_a_way_that_begins_below_one_is_spaced_as_the_whole_one(num_steps, start):
    """In float64: it begins where it is asked to, its end is Qwen's, and before the stretch it is a part of the whole way."""
    sigmas = qwen_sigmas(num_steps, 4096, start)
    assert sigmas[0] == pytest.approx(start, abs=1e-12)
    assert sigmas[-1] == 0
    assert all(a > b for a, b in pairwise(sigmas))
    if num_steps > 1 and start > 0.02:
        assert sigmas[-2] == pytest.approx(0.02, abs=1e-12)
    scale = np.exp(0.5 + 0.4 * (4096 - 256) / (8192 - 256))
    even = np.linspace(start / (scale - (scale - 1) * start), 0, num_steps + 1)[:-1]
    shifted = scale * even / (1 + (scale - 1) * even)
    stretch = (start - 0.02) / (start - shifted[-1]) if num_steps > 1 and start > 0.02 else 1
    assert sigmas[:-1] == pytest.approx(start - (start - shifted) * stretch, abs=1e-12)


def test_a_picture_draws_by_its_seed_alone():
    together = PictureRandom([5, 9]).normal("noise", SHAPE)
    for seed, row in zip((5, 9), together, strict=True):
        assert torch.equal(SampleRandom(seed, [0]).normal("noise", SHAPE)[0], row)
