"""Adapters put on, added up and taken off; which parts are loaded, and how often."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep.errors import InputError
from eval.qwen.weights.adapters import linear_modules, remove_adapters
from eval.request.knobs import AdapterUse
from tests.adapters import fuse_adapters, use_adapters
from tests.train.model.test_adapter import close, fresh, inputs, trained
from train.model.denoiser import Denoiser

A, B = ["to_q", "img_mlp.net.2", "img_in"], ["to_q", "to_out.0", "proj_out"]


@pytest.fixture(scope="module")
def adapters(tiny_model_dir, tmp_path_factory) -> dict[str, Path]:
    """Two LoRAs of different ranks and modules, and a DoRA."""
    folder = tmp_path_factory.mktemp("adapters")
    kinds = {
        "a": {"rank": 4, "alpha": 8, "target_modules": A},
        "b": {"rank": 2, "alpha": 3, "target_modules": B, "seed": 1},
        "dora": {"rank": 3, "alpha": 3, "target_modules": A, "dora": True, "seed": 2},
    }
    for name, options in kinds.items():
        trained(fresh(tiny_model_dir), **options).export(folder / name, {"objective": "flow"})
    return {name: folder / name for name in kinds}


@pytest.fixture(scope="module")
def denoiser(tiny_model_dir) -> Denoiser:
    return fresh(tiny_model_dir)


@pytest.fixture(scope="module")
def base(tiny_model_dir) -> torch.Tensor:
    return velocity(fresh(tiny_model_dir))


@torch.no_grad()
def velocity(denoiser: Denoiser) -> torch.Tensor:
    return denoiser(*inputs(denoiser))


@torch.no_grad()
def merged(tiny_model_dir, *uses: tuple[Path, float]) -> torch.Tensor:
    """The velocity with every weight·B·A added to the base weights by hand, in float64."""
    denoiser = fresh(tiny_model_dir)
    for folder, weight in uses:
        tensors = load_file(folder / "adapter_model.safetensors")
        for key, down in tensors.items():
            if ".lora_A." in key:
                up = tensors[key.replace("lora_A", "lora_B")]
                own = denoiser.dit.get_parameter(key.removeprefix("diffusion_model.").replace("lora_A.", ""))
                own.copy_(own.double() + weight * (up.double() @ down.double()))
    return velocity(denoiser)


def test_adapters_add_up_and_come_off(tiny_model_dir, adapters, denoiser, base):
    a, b = adapters["a"], adapters["b"]
    weights = {name: tensor.clone() for name, tensor in denoiser.dit.state_dict().items()}
    use_adapters(denoiser, [AdapterUse(a, 0.5), AdapterUse(b, -1.5)])
    both = velocity(denoiser)
    assert close(both, merged(tiny_model_dir, (a, 0.5), (b, -1.5)))
    assert not close(both, merged(tiny_model_dir, (a, 0.5), (b, -1.4)))
    use_adapters(denoiser, [AdapterUse(b)])  # replaces, does not add
    assert close(velocity(denoiser), merged(tiny_model_dir, (b, 1.0)))
    use_adapters(denoiser, [AdapterUse(a), AdapterUse(a)])  # the same file twice counts twice
    assert close(velocity(denoiser), merged(tiny_model_dir, (a, 2.0)))
    use_adapters(denoiser, [AdapterUse(a, 0.0)])
    assert torch.equal(velocity(denoiser), base)
    after = denoiser.dit.state_dict()
    assert weights.keys() == after.keys()
    assert all(torch.equal(weights[name], after[name]) for name in weights)


def test_dora_alone_with_a_weight(adapters, denoiser, base):
    """DoRA replaces W by m·(W + BA)/‖W + BA‖; half of it is half of that change."""
    tensors = load_file(adapters["dora"] / "adapter_model.safetensors")
    plain = {name: module.weight.clone() for name, module in linear_modules(denoiser.dit).items()}
    fuse_adapters(denoiser, [AdapterUse(adapters["dora"], 0.5)])
    found = velocity(denoiser)
    for name, weight in plain.items():
        key = f"diffusion_model.{name}"
        if f"{key}.lora_A.weight" in tensors:
            moved = weight + tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
            magnitude = tensors[f"{key}.lora_magnitude_vector.weight"][:, None]
            target = magnitude * moved / moved.norm(dim=1, keepdim=True)
            denoiser.dit.get_submodule(name).weight.data = (weight + target) / 2
    expected = velocity(denoiser)
    for name, weight in plain.items():
        denoiser.dit.get_submodule(name).weight.data = weight
    assert close(found, expected)
    assert not close(found, base)
    with pytest.raises(InputError, match=r"is a DoRA adapter, .* use it alone"):
        use_adapters(denoiser, [AdapterUse(adapters["dora"]), AdapterUse(adapters["a"])])
    assert torch.equal(velocity(denoiser), base)


def kohya(tensors: dict[str, torch.Tensor], prefix: str, dots: bool = True) -> dict[str, torch.Tensor]:
    """lora_down/lora_up with alpha = rank / 2, and so B twice as large."""
    written = {}
    for key, tensor in tensors.items():
        module = key.removeprefix("diffusion_model.").rsplit(".lora_", 1)[0]
        name = prefix + (module if dots else module.replace(".", "_"))
        if ".lora_A." in key:
            written[f"{name}.lora_down.weight"] = tensor
            written[f"{name}.alpha"] = torch.tensor(len(tensor) / 2)
        else:
            written[f"{name}.lora_up.weight"] = tensor * 2
    return written


def peft(tensors: dict[str, torch.Tensor], prefix: str, middle: str = "") -> dict[str, torch.Tensor]:
    """lora_A/lora_B with B four times as large: lora_alpha = rank / 4 is said elsewhere."""
    return {
        prefix + key.removeprefix("diffusion_model.").replace(".weight", f"{middle}.weight"): tensor * 4
        if ".lora_B." in key
        else tensor
        for key, tensor in tensors.items()
    }


def test_other_peoples_files(adapters, denoiser, base, tmp_path):
    use_adapters(denoiser, [AdapterUse(adapters["b"])])
    expected = velocity(denoiser)
    tensors = load_file(adapters["b"] / "adapter_model.safetensors")
    config = {"r": 2, "lora_alpha": 0.5}
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})}
    save_file(kohya(tensors, ""), tmp_path / "lightning.safetensors")
    save_file(kohya(tensors, "model.diffusion_model."), tmp_path / "comfy.safetensors")
    save_file(kohya(tensors, "lora_unet_", dots=False), tmp_path / "kohya.safetensors")
    save_file(peft(tensors, "transformer."), tmp_path / "diffusers.safetensors", metadata=header)
    (tmp_path / "peft").mkdir()
    save_file(peft(tensors, "base_model.model.", ".default"), tmp_path / "peft" / "adapter_model.safetensors")
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    for name in ("lightning.safetensors", "comfy.safetensors", "kohya.safetensors", "diffusers.safetensors", "peft"):
        remove_adapters(denoiser)
        use_adapters(denoiser, [AdapterUse(tmp_path / name)])
        assert torch.equal(velocity(denoiser), expected), name  # powers of two are exact
    assert not close(expected, base)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t, key: t | {"transformer.to_q.diff_b": torch.zeros(1)},
            "cannot use its tensor 'transformer.to_q.diff_b'",
        ),
        (
            lambda t, key: t | {key.replace("to_q", "to_qq"): t[key].clone()},
            "lacks: its tensor '.*to_qq.lora_A.weight'",
        ),
        (lambda t, key: t | {key.replace("diffusion_model.", ""): t[key].clone()}, "twice: its tensor"),
        (lambda t, key: {k: v for k, v in t.items() if k != key}, r"incomplete: the module .* has no lora_A"),
        (lambda t, key: t | {key: t[key][:, :-1].contiguous()}, "is for another model: the LoRA of .*to_q"),
        (lambda t, key: {}, "holds no tensor"),
    ],
)
def test_what_cannot_be_used_is_named(adapters, denoiser, base, tmp_path, change, message):
    tensors = load_file(adapters["b"] / "adapter_model.safetensors")
    key = next(key for key in tensors if key.endswith("to_q.lora_A.weight"))
    save_file(change(tensors, key), tmp_path / "other.safetensors")
    remove_adapters(denoiser)
    with pytest.raises(InputError, match=message):
        use_adapters(denoiser, [AdapterUse(tmp_path / "other.safetensors")])
    assert torch.equal(velocity(denoiser), base)
