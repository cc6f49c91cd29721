"""Inversion: the solver against an analytic path and other solvers, and pictures brought back on the tiny model."""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from data_prep.cache.batches import pad_condition
from data_prep.errors import InputError
from data_prep.model.directory import ModelDirectory
from data_prep.model.encoders import VAE, load_prompt_encoder, load_vae
from data_prep.model.geometry import Geometry, Size, stretch, to_image, to_pixels
from eval.qwen.inversion import InversionSampler, integrate_second_order, invert
from eval.qwen.samplers import FlowSampler
from eval.qwen.samplers.sigmas import linear_sigmas, qwen_sigmas
from eval.qwen.samplers.solvers import Flow
from losses.batch import Condition, Edit
from losses.randomness import SampleRandom
from scripts import photographs
from train.model.denoiser import Denoiser, load_denoiser

START = torch.linspace(0.5, 2.0, 32, dtype=torch.float64).view(2, 16, 1, 1)


def curved(latents: Tensor, sigma: Tensor) -> Tensor:
    """d x / d s = −2 s x², whose paths are x(s) = x(0) / (1 + x(0) s²)."""
    return -2 * sigma[:, None, None, None] * latents**2


def exact(start: Tensor, sigma: float) -> Tensor:
    return start / (1 + start * sigma**2)


def ascending(num_steps: int, spacing: str) -> list[float]:
    return (linear_sigmas(num_steps) if spacing == "even" else qwen_sigmas(num_steps, 4096))[::-1]


@pytest.mark.parametrize("spacing", ["even", "qwen"])
@pytest.mark.parametrize("way", ["up", "down", "there and back"])
def test_twice_the_steps_make_a_quarter_of_the_error(way, spacing):
    errors = []
    for num_steps in (40, 80, 160):
        sigmas = ascending(num_steps, spacing)
        if way == "up":
            error = invert(curved, START, sigmas) - exact(START, 1)
        elif way == "down":
            error = integrate_second_order(curved, exact(START, 1), sigmas[::-1]) - START
        else:
            error = integrate_second_order(curved, invert(curved, START, sigmas), sigmas[::-1]) - START
        errors.append(error.abs().max().item())
    orders = [torch.tensor(a / b).log2().item() for a, b in pairwise(errors)]
    if way == "there and back":  # both ways err alike, and most of it cancels
        assert orders == pytest.approx([3, 3], abs=0.25)
    else:
        assert orders == pytest.approx([2, 2], abs=0.25)


def test_a_straight_path_is_walked_without_error_in_one_step():
    velocity = torch.randn(2, 16, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    reached = invert(lambda x, sigma: velocity, torch.zeros_like(velocity), [0, 0.7])
    assert torch.allclose(reached, 0.7 * velocity, rtol=0, atol=1e-15)


def test_a_step_is_one_call_and_the_first_two_and_none_at_the_ends():
    asked, seen = [], []

    def flow(latents, sigma):
        asked.append(sigma.tolist())
        return curved(latents, sigma)

    invert(flow, START, [0, 0.25, 1.0], lambda step, latents: seen.append((step, latents.shape)))
    assert asked == [[0.125, 0.125], [0.125, 0.125], [0.625, 0.625]]
    assert seen == [(1, START.shape), (2, START.shape)]


@pytest.mark.parametrize("sigmas", [[0.1, 0.5], [0.0, 0.5, 0.5], [1.0, 0.0]])
def test_an_inversion_ascends_from_the_picture(sigmas):
    with pytest.raises(ValueError, match="ascend from 0"):
        invert(curved, START, sigmas)


class Picture(NamedTuple):
    """A photograph of 128 x 128 with what the sampler is given."""

    pixels: Tensor
    latents: Tensor
    condition: Callable[[str], Condition]

    def edit(self, prompt: str = "", negative: Condition | None = None) -> Edit:
        return Edit(self.latents, self.latents, self.condition(prompt), negative, ["picture"])


class Tiny(NamedTuple):
    """The tiny model, in float32, and two photographs that no part of it has seen."""

    denoiser: Denoiser
    vae: VAE
    pictures: list[Picture]

    def psnr(self, latents: Tensor, picture: Picture) -> float:
        """Of the decoded 8-bit picture against the photograph, dB."""
        return psnr(self.show(latents), picture.pixels)

    def show(self, latents: Tensor) -> Tensor:
        return to_pixels(to_image(self.vae.decode(latents)[0]))[None]


def psnr(one: Tensor, other: Tensor) -> float:
    return (10 * torch.log10(4 / (one - other).square().mean())).item()


@pytest.fixture(scope="module")
def tiny(tiny_model_dir) -> Tiny:
    directory, dtype = ModelDirectory(tiny_model_dir), torch.float32
    vae, prompt_encoder = load_vae(directory, dtype=dtype), load_prompt_encoder(directory, dtype=dtype)
    geometry = Geometry(max_pixels=128 * 128, vision_pixels=112 * 112)

    def prepare(path) -> Picture:
        image = ImageOps.fit(photographs.load(path), (128, 128), Image.Resampling.LANCZOS)
        pixels, vision = to_pixels(image)[None], [stretch(image, geometry.vision_size(Size.of(image)))]
        latents = vae.encode(pixels)
        return Picture(
            pixels, latents, lambda prompt: pad_condition([prompt_encoder.encode(prompt, vision)], [latents])
        )

    with torch.no_grad():
        return Tiny(load_denoiser(directory, dtype=dtype), vae, [prepare(path) for path in photographs.HELD_OUT])


def sample(tiny: Tiny, sampler, edit: Edit, seed: int = 0, num_steps: int = 20, **own) -> Tensor:
    return sampler(tiny.denoiser, edit, num_steps, SampleRandom(seed, [0]), **own)


@pytest.mark.parametrize("with_references", [True, False])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_picture_comes_back_as_the_vae_alone_gives_it_back(tiny, strength, with_references):
    """Within 1 dB was asked for; it is within 0.1, and with references taken away, which hold the picture, as well."""
    for picture in tiny.pictures:
        edit = picture.edit()
        if not with_references:
            edit.condition.edit_latents.clear()
        back = sample(tiny, InversionSampler(FlowSampler(), strength), edit, empty=edit.condition)
        alone = tiny.psnr(picture.latents, picture)
        assert alone > 25
        assert abs(tiny.psnr(back, picture) - alone) < 0.1
        assert psnr(tiny.show(back), tiny.show(picture.latents)) > 50
        if with_references:  # which do not do it by themselves
            drawn = sample(tiny, FlowSampler(strength=strength), edit)
            assert tiny.psnr(drawn, picture) < alone - 5


def test_what_is_reached_in_between_looks_like_noise(tiny):
    """Neighbours in a picture's latents are alike, in noise they are not."""
    for picture in tiny.pictures:
        seen: dict[int, Tensor] = {}
        sampler = InversionSampler(FlowSampler())
        sample(tiny, sampler, picture.edit(), on_step=seen.__setitem__, empty=picture.condition(""))
        assert list(seen) == list(range(1, sampler.calls(20) + 1)) == list(range(1, 41))
        assert abs(likeness_of_neighbours(seen[20])) < 0.1 < 0.3 < likeness_of_neighbours(picture.latents)


def likeness_of_neighbours(latents: Tensor) -> float:
    """Correlation of each cell with the one beside it."""
    return torch.corrcoef(torch.stack([latents[..., 1:].flatten(), latents[..., :-1].flatten()]))[0, 1].item()


def test_at_an_equal_number_of_calls_it_undoes_itself_best(tiny):
    """Of the root mean square errors of latents after 40 calls up and 40 down; it has 2 more for its first steps."""
    picture = tiny.pictures[0]
    condition, up = picture.condition(""), qwen_sigmas(20, 64)[::-1]
    halves = sorted({*up, *((a + b) / 2 for a, b in pairwise(up))})

    def flow(latents, sigma):
        return tiny.denoiser(latents, sigma, condition)

    errors = {}
    for solver, sigmas in ((euler, halves), (midpoint, up), (heun, up), (integrate_second_order, halves)):
        with torch.no_grad():
            back = solver(flow, solver(flow, picture.latents, sigmas), sigmas[::-1])
        errors[solver.__name__] = (back - picture.latents).square().mean().sqrt().item()
    own = errors.pop("integrate_second_order")
    assert own < 0.5 * min(errors.values())
    assert own < 0.02 * errors["euler"]


def euler(flow: Flow, latents: Tensor, sigmas: list[float]) -> Tensor:
    for sigma, next_sigma in pairwise(sigmas):
        latents = latents + (next_sigma - sigma) * flow(latents, torch.full((1,), sigma))
    return latents


def midpoint(flow: Flow, latents: Tensor, sigmas: list[float]) -> Tensor:
    """The explicit one, which for a step is also RF-Solver's (arXiv 2411.04746)."""
    for sigma, next_sigma in pairwise(sigmas):
        half = (next_sigma - sigma) / 2
        middle = latents + half * flow(latents, torch.full((1,), sigma))
        latents = latents + 2 * half * flow(middle, torch.full((1,), sigma + half))
    return latents


def heun(flow: Flow, latents: Tensor, sigmas: list[float]) -> Tensor:
    for sigma, next_sigma in pairwise(sigmas):
        length, slope = next_sigma - sigma, flow(latents, torch.full((1,), sigma))
        end = flow(latents + length * slope, torch.full((1,), next_sigma))
        latents = latents + length / 2 * (slope + end)
    return latents


def test_an_instruction_is_followed_the_further_the_more_steps_are_walked_again(tiny):
    for picture in tiny.pictures:
        edit, empty = picture.edit("Make it darker."), picture.condition("")
        light = [tiny.show(picture.latents).mean().item()]
        for strength in (0.2, 0.5, 1.0):
            edited = sample(tiny, InversionSampler(FlowSampler(), strength), edit, num_steps=10, empty=empty)
            light.append(tiny.show(edited).mean().item())
        assert light == sorted(light, reverse=True)
        assert light[-1] < light[0] - 0.2


def test_a_seed_changes_nothing_and_guidance_does(tiny):
    picture = tiny.pictures[0]
    empty, negative = picture.condition(""), picture.condition(" ")
    edit = picture.edit("Make it darker.", negative)
    plain, guided = InversionSampler(FlowSampler(), 0.4), InversionSampler(FlowSampler(2.0), 0.4)
    assert (plain.guided, guided.guided) == (False, True)
    one, other = (sample(tiny, plain, edit, seed, 5, empty=empty) for seed in (0, 1))
    assert torch.equal(one, other)
    stronger = sample(tiny, guided, edit, num_steps=5, empty=empty)
    assert tiny.show(stronger).mean() < tiny.show(one).mean() - 0.02
    with pytest.raises(InputError, match=r"cfg_scale=2\.0 needs a negative prompt"):
        sample(tiny, guided, picture.edit("Make it darker."), num_steps=5, empty=empty)


def test_pictures_of_one_batch_do_not_depend_on_each_other(tiny):
    sampler = InversionSampler(FlowSampler(shift="none"), 0.5)
    edits = [picture.edit("Make it brighter.") for picture in tiny.pictures]
    empties = [picture.condition("") for picture in tiny.pictures]
    both = [each.edit_latents[0] for each in empties]

    def joined(conditions: list[Condition]) -> Condition:
        return pad_condition([each.prompt_emb[0] for each in conditions], [torch.cat(both)])

    latents = torch.cat(both)
    together = Edit(latents, latents, joined([edit.condition for edit in edits]), None, ["0", "1"])
    reached = sampler(tiny.denoiser, together, 4, SampleRandom(0, [0, 1]), empty=joined(empties))
    for i, (edit, empty) in enumerate(zip(edits, empties, strict=True)):
        alone = sample(tiny, sampler, edit, num_steps=4, empty=empty)[0]
        assert torch.allclose(reached[i], alone, rtol=0, atol=1e-4)


def test_wrong_settings_are_refused(tiny):
    for strength in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"strength must be in \(0, 1\], got {strength}"):
            InversionSampler(FlowSampler(), strength)
    with pytest.raises(ValueError, match="needs the condition with an empty instruction"):
        sample(tiny, InversionSampler(FlowSampler()), tiny.pictures[0].edit())
    assert InversionSampler(FlowSampler(), 0.19).calls(10) == 4
