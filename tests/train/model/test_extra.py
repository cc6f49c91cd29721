"""What is trained beside LoRA: it begins as nothing, its gradients are those of plain training, and sees what LoRA does not."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data_prep.errors import InputError
from data_prep.model.directory import ModelDirectory
from losses.batch import Condition, Scene, join_scenes
from tests.train.model.test_denoiser import make_condition
from train.config import DEFAULT_TARGETS as TARGETS
from train.model.adapter import Adapter, attach_lokr, attach_lora
from train.model.adapter_reader import linear_modules, read_adapter
from train.model.denoiser import Denoiser, load_denoiser
from train.model.extra import ExtraModule
from train.model.extra.extras import attach_extras
from train.model.extra.modules import build_module, check_identity

STE = {"ste": {"_target_": "train.model.extra.SpatialTemporalEncoder", "hidden": 16, "depth": 1}}
IN_FULL = ["norm_out", "proj_out", "img_mod", "norm_q", "txt_norm", "txt_mlp"]
"""Around the blocks and in them, linear layers and norms, also such as a block reads itself, or as nothing reads in the last."""


def loaded(
    folder: Any, train_modules: Sequence[str] = (), dtype: torch.dtype = torch.float32, **options: Any
) -> Denoiser:
    return load_denoiser(ModelDirectory.resolve(folder), dtype=dtype, train_modules=train_modules, **options)


def attached(denoiser: Denoiser, train_modules: Sequence[str] = (), modules: Any = None) -> Adapter:
    adapter = attach_lora(denoiser, 4, 4, TARGETS, train_modules=train_modules)
    adapter.extras = attach_extras(denoiser, train_modules, modules or {})
    adapter.copy_for_products(denoiser.dit.transformer_blocks, denoiser.dit.img_in.weight.dtype)
    adapter.refresh()
    return adapter


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(denoiser: Denoiser) -> tuple[Tensor, Tensor, Condition]:
    """Two samples, one of them with padded text, with a scene."""
    condition = make_condition([9, 5], [(4, 6)], denoiser.dit.txt_in.in_features)
    mask = (drawn(2, 1, 4, 6, seed=3) > 0).float()
    condition.scene = Scene(drawn(2, 16, 4, 6, seed=1), drawn(2, 16, 4, 6, seed=2), mask)
    return drawn(2, 16, 4, 6, seed=4), torch.tensor([1.0, 0.25]), condition


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_begins_as_nothing_and_every_weight_gets_a_gradient(tiny_model_dir, dtype):
    """Bit for bit what LoRA alone gives, in the model's dtype; weights and gradients are float32."""
    plain = loaded(tiny_model_dir, dtype=dtype)
    attached(plain, IN_FULL)  # LoRA on the same modules, and nothing else
    plain.dit.requires_grad_(False)
    denoiser = loaded(tiny_model_dir, IN_FULL, dtype)
    adapter = attached(denoiser, IN_FULL, STE)
    velocity = denoiser(*inputs(denoiser))
    assert torch.equal(velocity, plain(*inputs(plain)))
    velocity.square().mean().backward()
    parameters = adapter.named_parameters()
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    assert [name for name, parameter in parameters.items() if parameter.grad is None] == []
    assert {"norm_out.linear.bias", "txt_norm.weight", "modules.ste.leave.weight"} <= parameters.keys()
    trained = {name for name, parameter in denoiser.named_parameters() if parameter.requires_grad}
    assert len(trained) == len(parameters)
    assert not any(".lora_" in name and "proj_out" in name for name in trained)


def test_gradients_are_those_of_the_plain_weights(tiny_model_dir):
    """Of the same transformer whose own parameters are asked for theirs."""
    names = ["norm_out.linear.weight", "proj_out.bias", "transformer_blocks.1.attn.norm_q.weight", "txt_norm.weight"]
    plain = loaded(tiny_model_dir)
    for name in names:
        plain.dit.get_parameter(name).requires_grad_(True)
    plain(*inputs(plain)).square().mean().backward()
    denoiser = loaded(tiny_model_dir, IN_FULL)
    adapter = attached(denoiser, IN_FULL)
    denoiser(*inputs(denoiser)).square().mean().backward()
    for name in names:
        ours, theirs = adapter.named_parameters()[name].grad, plain.dit.get_parameter(name).grad
        assert ours is not None
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-7), name


@torch.no_grad()
@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
def test_what_is_trained_in_full_starts_from_any_adapter(tiny_model_dir, tmp_path, kind):
    """With the weight that the adapter made of the base model's, and so with its velocity."""
    source = loaded(tiny_model_dir)
    options = {"dora": True} if kind == "dora" else {}
    adapter = (attach_lokr if kind == "lokr" else attach_lora)(source, 4, 4, ["proj_out"], **options)
    for number, weight in enumerate(adapter.parameters()):
        weight += 0.05 * drawn(*weight.shape, seed=number)
    adapter.export(tmp_path, {})
    started = loaded(tiny_model_dir, ["proj_out"])
    linear = linear_modules(started.dit)
    before = started(*inputs(started))
    attached(started, ["proj_out"]).start_from(tmp_path, read_adapter(tmp_path, linear))
    velocity = source(*inputs(source))
    assert torch.allclose(started(*inputs(started)), velocity, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, velocity, atol=1e-2)


def test_what_is_trained_is_neither_rounded_nor_waits(tiny_model_dir):
    """In int8 with blocks in CPU memory: its weights are the model's own, and what waits is less."""
    whole = loaded(tiny_model_dir)
    denoiser = loaded(tiny_model_dir, ["img_mod"], weights="int8", offload_blocks=3)
    adapter, name = attached(denoiser, ["img_mod"]), "transformer_blocks.0.img_mod.1.weight"
    assert torch.equal(adapter.named_parameters()[name], whole.dit.get_parameter(name))
    waiting = {id(tensor) for each in denoiser.offload.waiting.values() for tensor in each.layout.tensors}  # pyright: ignore
    assert id(adapter.named_parameters()[name]) not in waiting
    rounded = loaded(tiny_model_dir, weights="int8", offload_blocks=3)
    sizes = [each.offload.waiting[0].layout.num_bytes for each in (denoiser, rounded)]  # pyright: ignore
    assert sizes[0] < sizes[1]
    denoiser(*inputs(denoiser)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())


def test_a_scene_goes_where_its_condition_goes():
    scene = Scene(drawn(3, 16, 4, 6), None, drawn(3, 1, 4, 6))
    condition = Condition(drawn(3, 5, 8), torch.ones(3, 5, dtype=torch.bool), [scene.source_latents], scene)
    moved = condition.to("cpu", torch.float64)
    assert moved.scene is not None
    assert moved.scene.source_latents.dtype == torch.float64
    assert moved.scene.source_latents is moved.edit_latents[0]  # moved once
    taken = condition.take(torch.tensor([2, 0])).scene
    assert taken is not None
    assert taken.mask is not None
    assert scene.mask is not None
    assert torch.equal(taken.mask, scene.mask[[2, 0]])
    joined = join_scenes([Scene(scene.source_latents), scene])
    assert joined is not None
    assert joined.mask is not None
    assert torch.equal(joined.mask, torch.cat([torch.zeros(3, 1, 4, 6), scene.mask]))


def test_a_sample_does_not_depend_on_its_batch_and_no_mask_is_nothing_to_keep():
    module = build_module("ste", STE["ste"], 32)
    nn.init.normal_(module.leave.weight, generator=torch.Generator().manual_seed(0))  # pyright: ignore
    tokens, sigma = drawn(2, 6, 32), torch.tensor([1.0, 0.5])
    scene = Scene(drawn(2, 16, 4, 6, seed=1), None, torch.zeros(2, 1, 4, 6))
    both = module(tokens, sigma, scene)
    alone = module(tokens[1:], sigma[1:], Scene(scene.source_latents[1:]))
    assert torch.allclose(both[1:], alone, atol=1e-4)
    assert not torch.allclose(both, tokens, atol=1e-2)
    again = build_module("ste", STE["ste"], 32)
    assert torch.equal(again.enter.weight, module.enter.weight)  # pyright: ignore
    assert not torch.equal(build_module("ste", STE["ste"], 32, seed=1).enter.weight, module.enter.weight)  # pyright: ignore


class Loud(ExtraModule):
    """Changes the tokens from the start."""

    def forward(self, tokens: Tensor, sigma: Tensor, scene: Scene) -> Tensor:
        return tokens + 1


class Counting(ExtraModule):
    """Keeps what no file would hold."""

    def __init__(self, token_width: int):
        super().__init__(token_width)
        self.register_buffer("calls", torch.zeros(1))


HERE = "tests.train.model.test_extra"
WRONG_NODES = {
    f"{HERE}.Loud": "does not start as the identity",
    f"{HERE}.Counting": "has the buffer 'calls', which would not be saved",
    f"{HERE}.Missing": "cannot be imported",
    "os.system": "must be a subclass of train.model.extra.ExtraModule",
    "torch.nn.Linear": "must be a subclass of train.model.extra.ExtraModule",
}


@pytest.mark.parametrize("target", WRONG_NODES)
def test_a_module_that_cannot_be_added_is_said(target):
    with pytest.raises(InputError, match=WRONG_NODES[target]):
        check_identity("adapter.modules.mine", build_module("adapter.modules.mine", {"_target_": target}, 8))


def test_wrong_names_are_answered_with_the_right_one(tiny_model_dir):
    denoiser = loaded(tiny_model_dir)
    for name in "keys", "training":
        with pytest.raises(InputError, match=rf"adapter.modules: the name {name} is taken .*: choose another"):
            attach_extras(denoiser, [], {name: STE["ste"]})
    with pytest.raises(
        InputError, match="names 'norm_uot', which is not a module with weights: did you mean 'norm_out'"
    ):
        attached(denoiser, ["norm_uot"])
    with pytest.raises(InputError, match=r"covers all of adapter\.target_modules"):
        attach_lora(denoiser, 4, 4, ["proj_out"], train_modules=["proj_out"])


@pytest.mark.slow
def test_the_encoder_learns_an_edit_that_depends_on_the_mask_and_lora_does_not(tiny_model_dir):
    """One quarter of the picture gets another colour; nothing but the mask says which. Who does not know it can do no better than
    to answer a quarter of the change everywhere, which leaves 3/4 of it unexplained."""
    size, batch, steps, colour = 8, 4, 50, drawn(16, 1, 1, seed=1000)

    def sample(step: int) -> tuple[Tensor, Tensor, Tensor]:
        source, mask = drawn(batch, 16, 1, 1, seed=step).expand(-1, -1, size, size), torch.ones(batch, 1, size, size)
        corners = torch.randint(0, 2, (batch, 2), generator=torch.Generator().manual_seed(step)) * (size // 2)
        for each, (y, x) in zip(mask, corners.tolist(), strict=True):
            each[:, y : y + size // 2, x : x + size // 2] = 0
        return source, mask, source + colour * (1 - mask)

    def trained(modules: Any) -> float:
        denoiser = loaded(tiny_model_dir)
        adapter = attach_lora(denoiser, 8, 8, ["to_v", "to_out.0", "img_mlp.net.2", "proj_out"])
        adapter.extras = attach_extras(denoiser, [], modules)
        optimizer = torch.optim.Adam(adapter.parameters(), 1e-2)
        text = make_condition([6] * batch, [], denoiser.dit.txt_in.in_features)
        left = []
        for step in range(steps):
            source, mask, target = sample(step)
            condition = Condition(text.prompt_emb, text.prompt_emb_mask, [source], Scene(source, None, mask))
            velocity = denoiser(source, torch.ones(batch), condition)
            error = (velocity - (source - target)).square().mean()
            optimizer.zero_grad()
            error.backward()
            nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
            optimizer.step()
            left.append((error / (source - target).square().mean()).item())
        return sum(left[-5:]) / 5

    with_mask, alone = trained({"ste": STE["ste"] | {"hidden": 32}}), trained({})
    assert alone > 0.7
    assert with_mask < 0.5
