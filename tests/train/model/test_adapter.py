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
from eval.qwen.weights.adapters import use_adapters
from eval.request.metadata import read_metadata
from eval.request.request import AdapterUse
from tests.train.model.test_denoiser import make_condition, run_reference
from train.config import DEFAULT_TARGETS as TARGETS
from train.model.adapter import Adapter, attach_lora, match_modules
from train.model.denoiser import Denoiser, load_denoiser

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
        adapter = trained(denoiser)
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
    assert torch.equal(denoiser(*inputs(denoiser)), velocity)  # alpha / rank = 2 is exact in binary


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
    use_adapters(other, [AdapterUse(tmp_path)])
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
