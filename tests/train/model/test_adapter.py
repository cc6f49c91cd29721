"""The adapter file: loaded by diffusers, by DiffSynth and by us, with the same output and every module counted."""

import json
import math

import pytest
import torch
from diffsynth.pipelines.qwen_image import QwenImagePipeline
from diffusers import QwenImageEditPlusPipeline
from peft.tuners.lora import LoraLayer
from safetensors import safe_open

from data_prep.errors import InputError
from data_prep.model.directory import ModelDirectory
from eval.request.knobs import AdapterUse
from eval.request.metadata import read_metadata
from tests.adapters import fuse_adapters, use_adapters
from tests.train.model.test_denoiser import make_condition, run_reference
from train.config import DEFAULT_TARGETS as TARGETS
from train.model.adapter import Adapter, attach_lokr, attach_lora, match_modules
from train.model.adapter_files import adapter_file
from train.model.adapter_reader import fused, linear_modules, read_adapter
from train.model.denoiser import Denoiser, load_denoiser
from train.model.extra.extras import attach_extras

TOLERANCE = 1e-4  # relative to the largest velocity: the others add the low-rank product to the base weight first


def fresh(tiny_model_dir) -> Denoiser:
    return load_denoiser(ModelDirectory.resolve(tiny_model_dir), dtype=torch.float32)


def trained(denoiser: Denoiser, seed: int = 0, **options) -> Adapter:
    """An adapter whose B is not zero, as after training."""
    adapter = attach_lora(denoiser, **({"rank": 4, "alpha": 8, "target_modules": TARGETS} | options))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapter.named_parameters().items():
        if ".lora_B." in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return adapter


def inputs(denoiser: Denoiser):
    condition = make_condition([9], [(4, 6)], denoiser.dit.txt_in.in_features)
    return torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(1)), torch.tensor([0.7]), condition


@pytest.fixture
def exported(tiny_model_dir, tmp_path):
    """An exported adapter's folder, its number of modules, and the velocity with and without it."""
    denoiser = fresh(tiny_model_dir)
    with torch.no_grad():
        base = denoiser(*inputs(denoiser))
        adapter = trained(
            denoiser, rank_pattern={"img_mod.1": 2, "net.2": 8, "img_mlp.net.2": 1}, alpha_pattern={"to_q": 2}
        )
        velocity = denoiser(*inputs(denoiser))
    adapter.export(tmp_path / "adapter", {"objective": "lbm", "base_model": "tiny"})
    assert not torch.allclose(base, velocity, atol=1e-2)
    return tmp_path / "adapter", len(adapter.layers), velocity


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((actual - expected).abs().max() <= TOLERANCE * expected.abs().max())


@torch.no_grad()
def test_loads_back_exactly(tiny_model_dir, exported, tmp_path):
    folder, num_modules, velocity = exported
    denoiser = fresh(tiny_model_dir)
    use_adapters(denoiser, [AdapterUse(folder)])
    assert sum(isinstance(module, LoraLayer) for module in denoiser.dit.modules()) == num_modules
    assert read_metadata(folder)["objective"] == "lbm"
    assert torch.equal(denoiser(*inputs(denoiser)), velocity)  # every alpha / rank is exact in binary


@torch.no_grad()
def test_diffusers_loads_it(tiny_model_dir, exported):
    folder, num_modules, velocity = exported
    pipeline = QwenImageEditPlusPipeline.from_pretrained(tiny_model_dir, dtype=torch.float32)
    pipeline.load_lora_weights(folder, weight_name="adapter_model.safetensors")
    touched = [m for m in pipeline.transformer.modules() if hasattr(m, "lora_A") and len(m.lora_A)]
    assert len(touched) == num_modules
    denoiser = fresh(tiny_model_dir)
    assert close(run_reference(pipeline.transformer, *inputs(denoiser)), velocity)


@torch.no_grad()
def test_diffsynth_loads_it(tiny_model_dir, exported, capsys):
    folder, num_modules, velocity = exported
    denoiser = fresh(tiny_model_dir)
    pipeline = QwenImagePipeline(device="cpu", torch_dtype=torch.float32)
    pipeline.load_lora(denoiser.dit, str(folder / "adapter_model.safetensors"))
    assert f"{num_modules} tensors are fused" in capsys.readouterr().out
    assert close(denoiser(*inputs(denoiser)), velocity)


def test_ranks_and_scales_by_module(tiny_model_dir):
    """The longest suffix counts; alpha / rank is the same everywhere unless a pattern sets alpha."""
    ranks, alphas = {"net.2": 8, "img_mlp.net.2": 1}, {"to_q": 2.0, "txt_mlp.net.2": 16}
    adapter = attach_lora(fresh(tiny_model_dir), 4, None, TARGETS, rank_pattern=ranks, alpha_pattern=alphas)
    block = "transformer_blocks.0"
    expected = {"attn.to_q": (4, 0.5), "attn.to_k": (4, 1), "img_mlp.net.2": (1, 1), "txt_mlp.net.2": (8, 2)}
    for name, (rank, scale) in expected.items():
        layer = adapter.layers[f"{block}.{name}"]
        assert (len(layer.lora_A["default"].weight), layer.scaling["default"]) == (rank, scale)
    halved = attach_lora(fresh(tiny_model_dir), 4, 2, TARGETS, rank_pattern=ranks, alpha_pattern={"to_q": 1})
    for name, layer in halved.layers.items():  # what no pattern names is scaled alike, whatever its rank
        assert layer.scaling["default"] == (0.25 if name.endswith(".to_q") else 0.5), name
    for name in "rank_pattern", "alpha_pattern":
        with pytest.raises(InputError, match=rf"adapter.{name} names 'to_qq', but no linear layer"):
            attach_lora(fresh(tiny_model_dir), 4, None, TARGETS, **{name: {"to_qq": 3}})


@torch.no_grad()
@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
def test_what_is_trained_in_full_starts_as_what_the_adapter_made_of_it(tiny_model_dir, tmp_path, kind):
    denoiser = fresh(tiny_model_dir)
    base = denoiser.dit.proj_out.weight.clone()
    if kind == "lokr":
        other = attach_lokr(denoiser, 4, 8, ["proj_out"], False, 4)
        for seed, weight in enumerate(other.parameters()):
            weight.copy_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))
    else:
        other = trained(denoiser, target_modules=["proj_out"], dora=kind == "dora")
    velocity = denoiser(*inputs(denoiser))
    other.export(tmp_path, {})
    file, started = tmp_path / "adapter_model.safetensors", fresh(tiny_model_dir)
    adapter = attach_lora(started, 4, 4, ["to_q"], train_modules=["proj_out"])
    adapter.extras = attach_extras(started, ["proj_out"], {})
    adapter.start_from(file, read_adapter(file, linear_modules(started.dit)))
    assert not torch.allclose(adapter.named_parameters()["proj_out.weight"], base, atol=1e-2)
    assert close(started(*inputs(started)), velocity)


@torch.no_grad()
@pytest.mark.parametrize("dora", [False, True])
def test_starts_from_an_adapter_and_lies_over_one(tiny_model_dir, tmp_path, dora):
    """With more rank and another scale than the file's, and fused into the weights: the same velocity."""
    denoiser = fresh(tiny_model_dir)
    trained(denoiser, dora=dora).export(tmp_path, {})
    velocity, file = denoiser(*inputs(denoiser)), tmp_path / "adapter_model.safetensors"
    started = fresh(tiny_model_dir)
    adapter = attach_lora(started, 6, 9, TARGETS, dora=dora)
    adapter.start_from(file, read_adapter(file, linear_modules(started.dit)))
    assert close(started(*inputs(started)), velocity)
    over = load_denoiser(ModelDirectory.resolve(tiny_model_dir), dtype=torch.float32, frozen_adapters=[file])
    assert close(over(*inputs(over)), velocity)
    assert not close(over(*inputs(over)), fresh(tiny_model_dir)(*inputs(over)))


@torch.no_grad()
def test_frozen_adapters_go_into_the_export(tiny_model_dir, exported, tmp_path):
    folder, num_modules, _ = exported
    over = load_denoiser(
        ModelDirectory.resolve(tiny_model_dir), dtype=torch.float32, frozen_adapters=[adapter_file(folder)]
    )
    adapter = trained(over, seed=5, target_modules=["to_q", "norm_out.linear"])
    velocity = over(*inputs(over))
    adapter.beneath = [read_adapter(folder, linear_modules(over.dit))]
    adapter.export(tmp_path / "both", {})
    loaded = fresh(tiny_model_dir)
    use_adapters(loaded, [AdapterUse(tmp_path / "both")])
    assert sum(isinstance(module, LoraLayer) for module in loaded.dit.modules()) == num_modules + 1
    assert close(loaded(*inputs(loaded)), velocity)
    config = json.loads((tmp_path / "both" / "adapter_config.json").read_text())
    assert config["alpha_pattern"] == config["rank_pattern"] != {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2}, "has rank 4 in transformer_blocks.0.attn.to_q, more than the 2 here: set adapter.rank=4"),
        (
            {"rank": 8, "rank_pattern": {"to_q": 2}},
            "has rank 4 in transformer_blocks.0.attn.to_q, more than the 2 that adapter.rank_pattern gives it: set "
            "adapter.rank_pattern=null, as adapter=lora has it, or at least 4 for this layer there",
        ),
        (
            {"rank": 3, "rank_pattern": {"to_q": 2}},
            "adapter.rank_pattern=null, as adapter=lora has it with adapter.rank=4, or at least 4 for this",
        ),
        ({"target_modules": ["to_k"]}, r"changes [\w.]+, which adapter.target_modules leaves out"),
        ({"dora": True}, "is no DoRA adapter, and adapter.dora is true"),
    ],
)
def test_what_cannot_be_started_from_is_refused(tiny_model_dir, tmp_path, options, message):
    trained(fresh(tiny_model_dir), target_modules=["to_q"]).export(tmp_path, {})
    denoiser = fresh(tiny_model_dir)
    adapter = attach_lora(denoiser, **({"rank": 4, "alpha": 4, "target_modules": ["to_q"]} | options))
    with pytest.raises(InputError, match=message):
        adapter.start_from(tmp_path, read_adapter(tmp_path, linear_modules(denoiser.dit)))


def test_a_run_of_one_rank_does_not_continue_with_a_pattern(tiny_model_dir):
    earlier, slim = (
        attach_lora(fresh(tiny_model_dir), 4, None, ["to_q", "img_mod.1"], rank_pattern=pattern)
        for pattern in (None, {"img_mod.1": 2})
    )
    with pytest.raises(InputError, match=r"set adapter.rank_pattern=null, as adapter=lora has it, or the"):
        slim.load_state_dict(earlier.state_dict())
    with pytest.raises(InputError, match=r"set adapter.rank, rank_pattern, target_modules"):
        attach_lora(fresh(tiny_model_dir), 3, None, ["to_q", "img_mod.1"]).load_state_dict(earlier.state_dict())


def test_a_dora_adapter_lies_under_no_other(tiny_model_dir, tmp_path):
    trained(fresh(tiny_model_dir), target_modules=["to_q"], dora=True).export(tmp_path, {})
    with pytest.raises(InputError, match=r"is a DoRA adapter, which rescales the weights .* use it alone"):
        fused([tmp_path, tmp_path], linear_modules(fresh(tiny_model_dir).dit), "cpu")


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 4), (True, 8 / math.sqrt(4))])
def test_scale_is_baked_into_b(tiny_model_dir, tmp_path, rslora, scale):
    adapter = trained(fresh(tiny_model_dir), rslora=rslora)
    adapter.export(tmp_path, {})
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == 4
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        for name, parameter in adapter.named_parameters().items():
            expected = parameter * scale if ".lora_B." in name else parameter
            assert torch.equal(file.get_tensor(f"diffusion_model.{name}"), expected)


@torch.no_grad()
def test_dora_loads_back(tiny_model_dir, tmp_path):
    denoiser = fresh(tiny_model_dir)
    trained(denoiser, dora=True).export(tmp_path, {})
    other = fresh(tiny_model_dir)
    fuse_adapters(other, [AdapterUse(tmp_path)])
    assert close(other(*inputs(other)), denoiser(*inputs(denoiser)))


@torch.no_grad()
def test_strength_zero_is_the_base_model(tiny_model_dir, exported):
    plain, adapted = fresh(tiny_model_dir), fresh(tiny_model_dir)
    use_adapters(adapted, [AdapterUse(exported[0], 0.0)])
    assert close(adapted(*inputs(adapted)), plain(*inputs(plain)))


def test_default_targets_leave_out_the_unread_text_path(tiny_model_dir):
    dit = fresh(tiny_model_dir).dit
    names = match_modules(dit, TARGETS)
    assert len(names) == 12 * len(dit.transformer_blocks) + 3 - 3
    denoiser = fresh(tiny_model_dir)
    adapter = trained(denoiser)
    denoiser(*inputs(denoiser)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.parameters())
    assert [p for p in denoiser.parameters() if p.requires_grad] != []
    assert sum(p.requires_grad for p in denoiser.parameters()) == len(adapter.parameters())


def test_start_depends_on_seed_and_name_only(tiny_model_dir):
    few, many = (attach_lora(fresh(tiny_model_dir), 4, 4, targets, seed=3) for targets in (["to_q"], TARGETS))
    state = torch.get_rng_state()
    other = attach_lora(fresh(tiny_model_dir), 4, 4, ["to_q"], seed=4)
    for name, tensor in few.state_dict().items():
        assert torch.equal(tensor, many.state_dict()[name])
        assert ".lora_A." not in name or not torch.equal(tensor, other.state_dict()[name])
    assert torch.equal(state, torch.get_rng_state())


def test_unknown_target_names_the_nearest(tiny_model_dir):
    with pytest.raises(InputError, match=r"'to_qq'.*did you mean 'to_q'"):
        match_modules(fresh(tiny_model_dir).dit, ["to_qq"])


def test_wrong_files_are_refused(tiny_model_dir, exported, tmp_path):
    denoiser = fresh(tiny_model_dir)
    with pytest.raises(InputError, match="no adapter at"):
        use_adapters(denoiser, [AdapterUse(tmp_path / "nothing")])
    (tmp_path / "broken.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(InputError, match="not a readable safetensors"):
        use_adapters(denoiser, [AdapterUse(tmp_path / "broken.safetensors")])
    with pytest.raises(InputError, match="is not a LoRA adapter: it cannot use its tensor"):
        use_adapters(denoiser, [AdapterUse(tiny_model_dir / "vae" / "diffusion_pytorch_model.safetensors")])
