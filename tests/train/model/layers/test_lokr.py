"""LoKr against the Kronecker product in float64, PEFT's own layer, ComfyUI's reading of a file, and diffusers' refusal."""

import itertools
import json

import pytest
import torch
from diffusers import QwenImageEditPlusPipeline
from peft import LoKrConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from data_prep.errors import InputError
from data_prep.model.directory import ModelDirectory
from eval.request.knobs import AdapterUse
from tests.adapters import fuse_adapters, use_adapters
from tests.train.model.test_adapter import close, fresh, inputs, trained
from train.config import DEFAULT_TARGETS as TARGETS
from train.model.adapter import Adapter, attach_lokr
from train.model.adapter_reader import fused_weight, linear_modules, read_adapter
from train.model.denoiser import load_denoiser
from train.model.layers.lokr import Kronecker, KroneckerBeside, LokrLinear, kronecker_product, lokr_products

SIZES = {"whole": (64, False, 4), "low": (3, False, 4), "both": (2, True, -1)}
"""Rank, decompose_both, decompose_factor: w2 is a matrix, w2 is a product, and both are."""


def lokr(denoiser, rank=64, both=False, factor=4, seed=0, **options) -> Adapter:
    """An adapter whose w2 is not zero, as after training."""
    sizes = {"decompose_both": both, "decompose_factor": factor, "target_modules": TARGETS, "alpha": 3 * rank}
    adapter = attach_lokr(denoiser, rank, **(sizes | options))
    generator = torch.Generator().manual_seed(seed)
    for name, weight in adapter.named_parameters().items():
        if name.endswith((".lokr_w2", ".lokr_w2_b")):
            weight.data.copy_(0.05 * torch.randn(weight.shape, generator=generator))
    return adapter


def factors_of(tensors: dict[str, torch.Tensor], module: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(f"{module}."): each for key, each in tensors.items() if key.startswith(f"{module}.lokr")}


def comfy_weight(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """What ComfyUI adds to a module's weight (comfy/weight_adapter/lokr.py), written from its formulas, float64."""
    found = {key: each.double() for key, each in factors_of(tensors, f"diffusion_model.{module}").items()}
    alpha, rank = tensors[f"diffusion_model.{module}.alpha"].item(), None
    matrices = []
    for side in ("lokr_w1", "lokr_w2"):
        if side not in found:
            rank = len(found[f"{side}_b"])
        matrices.append(found[side] if side in found else found[f"{side}_a"] @ found[f"{side}_b"])
    return torch.kron(*matrices) * (alpha / rank if rank else 1.0)


@pytest.fixture
def exported(tiny_model_dir, tmp_path):
    """An exported adapter's folder and the velocity with it, for each of `SIZES`."""
    made = {}
    for name, (rank, both, factor) in SIZES.items():
        denoiser = fresh(tiny_model_dir)
        lokr(denoiser, rank, both, factor, rank_pattern={"img_mod.1": 1}).export(tmp_path / name, {"kind": "lokr"})
        with torch.no_grad():
            made[name] = tmp_path / name, denoiser(*inputs(denoiser))
    return made


@pytest.mark.parametrize("left", [(3, 4), (3, 2, 4)])
@pytest.mark.parametrize("right", [(5, 7), (5, 2, 7)])
def test_the_product_is_the_kronecker_product(left, right):
    """Forward and gradients, against numpy's definition: entry (l k, m n) is w1[l, m] w2[k, n]."""

    def matrices(sizes):
        return tuple(torch.randn(pair, dtype=torch.float64) for pair in itertools.pairwise(sizes))

    product = Kronecker(matrices(left), matrices(right))
    w1, w2 = (factor[0] if len(factor) == 1 else factor[0] @ factor[1] for factor in (product.left, product.right))
    expected = torch.einsum("lm,kn->lkmn", w1, w2).reshape(product.shape)
    x = torch.randn(2, 6, product.shape[1], dtype=torch.float64, requires_grad=True)
    y = kronecker_product(x, product.left, product.right)
    torch.testing.assert_close(y, x @ expected.t())
    torch.testing.assert_close(product.weight(), expected)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], expected.sum(0).expand_as(x))


@pytest.mark.parametrize("size", SIZES)
def test_a_layer_is_pefts(size):
    """The same output and gradients, without the whole product."""
    rank, both, factor = SIZES[size]
    config = LoKrConfig(
        r=rank, alpha=5, decompose_both=both, decompose_factor=factor, target_modules=["0"], init_weights=False
    )
    theirs = inject_adapter_in_model(config, nn.Sequential(nn.Linear(48, 96))).double()
    x, outputs = torch.randn(2, 9, 48, dtype=torch.float64), []
    for kind in (type(theirs[0]), LokrLinear):
        theirs[0].__class__ = kind
        theirs.zero_grad()
        y = theirs(x)
        y.square().sum().backward()
        outputs.append([y.detach(), *(p.grad.clone() for p in theirs.parameters() if p.grad is not None)])
    assert len(outputs[0]) == 3 + (size != "whole") + both
    torch.testing.assert_close(outputs[1], outputs[0])


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_the_file_is_what_comfyui_and_peft_compute(tiny_model_dir, exported, size):
    """W + kron(w1, w2) for every module, and nothing else in the file; the same through PEFT, from its configuration."""
    folder, velocity = exported[size]
    tensors = load_file(folder / "adapter_model.safetensors")
    linear = linear_modules(fresh(tiny_model_dir).dit)
    parts = read_adapter(folder, linear)
    assert len(parts) == 12 * 5
    assert len(tensors) == sum(1 + len(factors_of(tensors, f"diffusion_model.{n}")) for n in parts)
    for name, part in parts.items():
        expected = linear[name].weight.double() + comfy_weight(tensors, name)
        torch.testing.assert_close(fused_weight(linear[name].weight, part).double(), expected, rtol=1e-6, atol=1e-6)
    peft = fresh(tiny_model_dir)
    inject_adapter_in_model(LoKrConfig.from_pretrained(folder), peft.dit)
    theirs = {key.removeprefix("diffusion_model."): each for key, each in tensors.items() if not key.endswith(".alpha")}
    assert not set_peft_model_state_dict(peft.dit, theirs).unexpected_keys
    assert close(peft(*inputs(peft)), velocity)


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_loads_back_inside_and_beside_the_weights(tiny_model_dir, exported, tmp_path, size):
    """Alone, and added to a LoRA: fused, beside, and beside 8-bit weights (as the same over the widened weights)."""
    folder, velocity = exported[size]
    for put in (fuse_adapters, use_adapters):
        denoiser = fresh(tiny_model_dir)
        put(denoiser, [AdapterUse(folder)])
        assert close(denoiser(*inputs(denoiser)), velocity)
    trained(fresh(tiny_model_dir)).export(tmp_path / "lora", {})
    uses, results = [AdapterUse(folder, 0.5), AdapterUse(tmp_path / "lora")], []
    for put in (fuse_adapters, use_adapters):
        denoiser = fresh(tiny_model_dir)
        put(denoiser, uses)
        results.append(denoiser(*inputs(denoiser)))
    assert close(results[1], results[0])
    assert not close(results[0], velocity)
    assert sum(isinstance(module, KroneckerBeside) for module in denoiser.dit.modules()) == 12 * 5
    use_adapters(denoiser, [])
    assert torch.equal(denoiser(*inputs(denoiser)), fresh(tiny_model_dir)(*inputs(denoiser)))
    int8 = load_denoiser(ModelDirectory.resolve(tiny_model_dir), dtype=torch.float32, weights="int8")
    plain = int8(*inputs(int8))
    use_adapters(int8, [AdapterUse(folder)])
    step, own = int8(*inputs(int8)) - plain, velocity - fresh(tiny_model_dir)(*inputs(denoiser))
    assert (step - own).norm() < 0.1 * own.norm()  # 8-bit weights move the base by 1 %, and the change by a little


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_starts_from_one(tiny_model_dir, exported, size):
    """Where a factor is a product, of more rank than the file's."""
    folder, velocity = exported[size]
    rank, both, factor = SIZES[size]
    denoiser = fresh(tiny_model_dir)
    more = {"rank_pattern": {"img_mod.1": 1}, "alpha": None, "seed": 3}
    adapter = lokr(denoiser, rank + (size == "low"), both, factor, **more)
    adapter.start_from(folder, read_adapter(folder, linear_modules(denoiser.dit)))
    assert close(denoiser(*inputs(denoiser)), velocity)


def test_what_cannot_be_started_from_is_refused(tiny_model_dir, exported, tmp_path):
    trained(fresh(tiny_model_dir)).export(tmp_path / "lora", {})
    denoiser = fresh(tiny_model_dir)
    adapter, linear = lokr(denoiser, 2, False, 4), linear_modules(denoiser.dit)
    for folder, message in {
        tmp_path / "lora": "is a LoRA adapter, and adapter.kind is lokr: make them the same",
        exported["low"][0]: "has rank 3 in .*, more than the 2 here: set adapter.rank=3",
        exported["both"][0]: r"has a different lokr_w1 in .*: set adapter.rank, decompose_both and decompose_factor as",
    }.items():
        with pytest.raises(InputError, match=message):
            adapter.start_from(folder, read_adapter(folder, linear))
    denoiser = fresh(tiny_model_dir)
    with pytest.raises(InputError, match=r"is a LoKr adapter, and adapter.kind is lora"):
        trained(denoiser).start_from(tmp_path, read_adapter(exported["low"][0], linear))


def test_alpha_counts_as_in_the_tool_that_wrote_the_file(tiny_model_dir, exported, tmp_path):
    """ComfyUI and LyCORIS: over the rank of the factor that is a product. PEFT: in the configuration, and always."""
    denoiser, name = fresh(tiny_model_dir), "transformer_blocks.0.attn.to_q"
    linear, file = linear_modules(denoiser.dit), tmp_path / "adapter_model.safetensors"
    for size, scale in {"low": 2.0 / 3, "whole": 1.0}.items():
        tensors = load_file(exported[size][0] / file.name)
        own = {
            key.replace("diffusion_model.", "lycoris_"): each
            for key, each in tensors.items()
            if f".{name}." in f".{key}"
        }
        own = {key.replace(name, name.replace(".", "_")): each for key, each in own.items() if name in key}
        key = next(key for key in own if key.endswith(".alpha"))
        expected = comfy_weight(tensors, name).float()
        for changed, factor in ({key: torch.tensor(2.0)}, scale), ({}, 1.0):
            save_file({k: v for k, v in own.items() if k != key} | changed, file)
            torch.testing.assert_close(read_adapter(file, linear)[name].products[0].weight(), factor * expected)
        config = {"peft_type": "LOKR", "alpha": 6, "r": 4, "alpha_pattern": {name: 12}, "rank_pattern": {}}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        torch.testing.assert_close(read_adapter(file, linear)[name].products[0].weight(), 3 * expected)
        (tmp_path / "adapter_config.json").unlink()


def test_a_broken_file_is_named(tiny_model_dir, tmp_path):
    linear, file, name = linear_modules(fresh(tiny_model_dir).dit), tmp_path / "a.safetensors", "txt_in"
    ones = torch.ones
    for tensors, message in (
        ({"lokr_w1": ones(2, 2)}, "the module txt_in has no lokr_w2, or not both"),
        ({"lokr_w1": ones(2, 2), "lokr_w2_a": ones(2, 2)}, "the module txt_in has no lokr_w2, or not both"),
        ({"lokr_w1": ones(2, 2), "lokr_w2": ones(3, 3)}, "the LoKr of txt_in makes a weight of 6 to 6 numbers"),
        ({"lokr_w1": ones(2, 2), "lokr_w2": ones(2, 2), "lora_A.weight": ones(2, 2)}, "has both LoRA and LoKr in"),
        ({"lokr_w1": ones(2, 2), "lokr_w2": ones(2, 2), "lokr_t2": ones(2, 2)}, "cannot use its tensor"),
    ):
        save_file({f"diffusion_model.{name}.{key}": each for key, each in tensors.items()}, file)
        with pytest.raises(InputError, match=message):
            read_adapter(file, linear)


def test_diffusers_refuses_it(tiny_model_dir, exported):
    """As the model card says. Once this fails, the card and docs/training.md can say better."""
    pipeline = QwenImageEditPlusPipeline.from_pretrained(tiny_model_dir, dtype=torch.float32)
    with pytest.raises(ValueError, match="`state_dict` should be empty at this point"):
        pipeline.load_lora_weights(exported["low"][0], weight_name="adapter_model.safetensors")


@pytest.mark.parametrize("size", SIZES)
def test_products_are_counted_as_they_are_made(size):
    from torch.utils.flop_counter import FlopCounterMode

    rank, both, factor = SIZES[size]
    config = LoKrConfig(r=rank, decompose_both=both, decompose_factor=factor, target_modules=["0"])
    layer = inject_adapter_in_model(config, nn.Sequential(nn.Linear(48, 96)))[0]
    layer.__class__ = LokrLinear
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(1000, 48))
    counted = counter.get_total_flops() / 2000 - 48 * 96
    assert lokr_products(96, 48, rank, both, factor) == pytest.approx(counted, rel=0.01)  # w1 = a b is made once
