"""The denoiser against diffusers' transformer on the same weights, and against itself, one sample at a time."""

import pytest
import torch
from diffusers import QwenImageTransformer2DModel

from data_prep.errors import InputError
from data_prep.model.directory import ModelDirectory
from losses.batch import Condition
from losses.patches import patchify, unpatchify
from train.model.denoiser import Denoiser, load_denoiser
from train.model.execution import Execution

# Both sides compute the same operations in float32; attention masks and the order of sums may differ in the last bits.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def reference(tiny_model_dir) -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel.from_pretrained(tiny_model_dir / "transformer", dtype=torch.float32)


@pytest.fixture(scope="module")
def denoiser(tiny_model_dir) -> Denoiser:
    return load_denoiser(ModelDirectory.resolve(tiny_model_dir), dtype=torch.float32)


def make_condition(lengths: list[int], references: list[tuple[int, int]], width: int, seed: int = 0) -> Condition:
    generator = torch.Generator().manual_seed(seed)
    prompt_emb = torch.randn(len(lengths), max(lengths), width, generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    edit = [torch.randn(len(lengths), 16, *size, generator=generator) for size in references]
    return Condition(prompt_emb * mask[..., None] + 7.0 * ~mask[..., None], mask, edit)  # padding is not zero


def run_reference(model, latents, sigma, condition) -> torch.Tensor:
    grids = [latents, *condition.edit_latents]
    shapes = [[(1, g.shape[-2] // 2, g.shape[-1] // 2) for g in grids]] * len(latents)
    mask = None if condition.prompt_emb_mask.all() else condition.prompt_emb_mask
    output = model(
        hidden_states=torch.cat([patchify(g) for g in grids], dim=1),
        encoder_hidden_states=condition.prompt_emb,
        encoder_hidden_states_mask=mask,
        timestep=sigma,
        img_shapes=shapes,
        return_dict=False,
    )[0]
    tokens = output[:, : latents.shape[-2] * latents.shape[-1] // 4]
    return unpatchify(tokens, *latents.shape[-2:])


@pytest.mark.parametrize("zero_cond_t", [True, False])
@pytest.mark.parametrize("references", [[(8, 12)], [(8, 12), (4, 6), (10, 2)]])
@pytest.mark.parametrize("lengths", [[9], [5, 9, 17]])
@torch.no_grad()
def test_equals_diffusers(reference, denoiser, monkeypatch, zero_cond_t, references, lengths):
    monkeypatch.setattr(reference, "zero_cond_t", zero_cond_t)
    for block in reference.transformer_blocks:
        monkeypatch.setattr(block, "zero_cond_t", zero_cond_t)
    monkeypatch.setattr(denoiser, "zero_cond_t", zero_cond_t)
    condition = make_condition(lengths, references, reference.config.joint_attention_dim)
    latents = torch.randn(len(lengths), 16, 8, 12, generator=torch.Generator().manual_seed(1))
    sigma = torch.linspace(0.3, 1.0, len(lengths))
    expected = run_reference(reference, latents, sigma, condition)
    actual = denoiser(latents, sigma, condition)
    assert expected.std() > 0.01
    assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("zero_cond_t", [True, False])
@torch.no_grad()
def test_padding_changes_nothing(denoiser, monkeypatch, zero_cond_t):
    monkeypatch.setattr(denoiser, "zero_cond_t", zero_cond_t)
    lengths = [5, 9, 17]
    width = denoiser.dit.txt_in.in_features
    condition = make_condition(lengths, [(8, 8), (4, 6)], width)
    latents = torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    sigma = torch.tensor([0.2, 0.7, 1.0])
    together = denoiser(latents, sigma, condition)
    for i, length in enumerate(lengths):
        alone = Condition(
            condition.prompt_emb[i : i + 1, :length],
            condition.prompt_emb_mask[i : i + 1, :length],
            [e[i : i + 1] for e in condition.edit_latents],
        )
        velocity = denoiser(latents[i : i + 1], sigma[i : i + 1], alone)
        assert (together[i] - velocity[0]).abs().max() <= TOLERANCE * velocity.abs().max()


@torch.no_grad()
def test_only_references_see_sigma_zero(denoiser):
    """At sigma = 0 the two settings are one; elsewhere they differ, and only through the references."""
    width = denoiser.dit.txt_in.in_features
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    on, off = Denoiser(denoiser.dit, True), Denoiser(denoiser.dit, False)
    with_reference, without = make_condition([9], [(8, 8)], width), make_condition([9], [], width)
    zero, half = torch.zeros(1), torch.full((1,), 0.5)
    assert torch.allclose(on(latents, zero, with_reference), off(latents, zero, with_reference), atol=1e-5)
    assert not torch.allclose(on(latents, half, with_reference), off(latents, half, with_reference), atol=1e-3)
    assert torch.allclose(on(latents, half, without), off(latents, half, without), atol=1e-5)


@torch.no_grad()
def test_every_timestep_is_distinct_in_bf16(tiny_model_dir):
    """Upstream rounds 1000 * sigma to bf16, which leaves 376 distinct values of 1000."""
    denoiser = load_denoiser(ModelDirectory.resolve(tiny_model_dir), dtype=torch.bfloat16)
    seen = []
    hook = denoiser.dit.time_text_embed.time_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    sigma = torch.arange(1, 1001) / 1000
    condition = make_condition([1], [], denoiser.dit.txt_in.in_features)
    expanded = Condition(condition.prompt_emb.expand(1000, -1, -1), condition.prompt_emb_mask.expand(1000, -1), [])
    denoiser(torch.zeros(1000, 16, 2, 2), sigma, expanded)
    hook.remove()
    assert seen[0].dtype == torch.float32
    assert len(seen[0][:1000].unique()) == 1000


@pytest.mark.parametrize("setting", ["selective", "full", 1])
def test_gradient_checkpointing_changes_no_gradient(tiny_model_dir, setting):
    gradients = []
    for each in ("off", setting):
        directory = ModelDirectory.resolve(tiny_model_dir)
        denoiser = load_denoiser(directory, dtype=torch.float32, execution=Execution.of(each))
        denoiser.requires_grad_(True)
        condition = make_condition([5, 9], [(4, 4)], denoiser.dit.txt_in.in_features)
        latents = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(1))
        denoiser(latents, torch.tensor([0.5, 1.0]), condition).square().mean().backward()
        gradients.append({name: p.grad for name, p in denoiser.named_parameters()})
    last = len(denoiser.dit.transformer_blocks) - 1
    for name, gradient in gradients[0].items():
        if gradient is None:  # only the last block's text path
            assert f"blocks.{last}." in name
            assert any(part in name for part in ("add_q_proj", "norm_added_q", "to_add_out", "txt_mlp"))
        else:
            assert torch.equal(gradient, gradients[1][name]), name


def test_contradicting_zero_cond_t_is_refused(tiny_model_dir):
    with pytest.raises(InputError, match=r"zero_cond_t=false contradicts .*transformer/config.json"):
        load_denoiser(ModelDirectory.resolve(tiny_model_dir), zero_cond_t=False)


@torch.no_grad()
def test_patchify_round_trip():
    latents = torch.randn(2, 16, 6, 10)
    assert torch.equal(unpatchify(patchify(latents), 6, 10), latents)
