"""What adapters have beside LoRA: put into a denoiser however it is kept, in parts, one after the other, and taken out again."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep.errors import InputError
from data_prep.model.directory import ModelDirectory
from eval.qwen.weights.components import Components
from eval.request.knobs import AdapterUse
from eval.request.metadata import describe_adapters, read_metadata
from eval.request.placement import Placement, make_placement
from tests.train.model.test_adapter import close
from tests.train.model.test_extra import IN_FULL, STE, attached, drawn, inputs, loaded
from train.model.adapter import Adapter
from train.model.denoiser import Denoiser
from train.model.extra.extras import read_extras

KINDS = {"both": (IN_FULL, STE, {}), "int8": (["img_mod", "proj_out"], STE, {"weights": "int8"}), "lora": ([], {}, {})}
"""Adapter -> modules in full, added ones, and how the transformer was loaded that it was trained in."""


def moved(adapter: Adapter, seed: int) -> Adapter:
    """As after training."""
    for number, parameter in enumerate(adapter.parameters()):
        parameter.data.add_(0.05 * drawn(*parameter.shape, seed=seed + number))
    adapter.refresh()
    return adapter


@torch.no_grad()
def velocity(denoiser: Denoiser) -> torch.Tensor:
    return denoiser(*inputs(denoiser))


@pytest.fixture(scope="module")
def adapters(tiny_model_dir, tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder with an adapter of each kind, and the velocity that the denoiser has in which it was trained."""
    folder, expected = tmp_path_factory.mktemp("adapters"), {}
    for seed, (name, (in_full, modules, options)) in enumerate(KINDS.items()):
        denoiser = loaded(tiny_model_dir, in_full, **options)
        adapter = moved(attached(denoiser, in_full, modules), 100 * seed)
        expected[name] = velocity(denoiser)
        adapter.export(folder / name, {"objective": "lbm", "step": str(seed), "config_hash": "0"})
    expected["none"] = velocity(loaded(tiny_model_dir))
    return folder, expected


def components(tiny_model_dir, **options) -> Components:
    return Components(ModelDirectory.resolve(tiny_model_dir), make_placement("cpu", "float32", **options))


def made(parts: Components, folder: Path, *uses: tuple[str, float]) -> torch.Tensor:
    with parts.denoiser([AdapterUse(folder / name, weight) for name, weight in uses]) as denoiser:
        return velocity(denoiser)


def test_adapters_take_each_others_place_and_leave_nothing(tiny_model_dir, adapters):
    """Two that change the same weights in full or by LoRA, alone and added up, and the base model again, bit for bit."""
    folder, expected = adapters
    parts = components(tiny_model_dir)
    for name in ("both", "lora", "both", "int8", "none"):
        got = made(parts, folder, *([] if name == "none" else [(name, 1.0)]))
        if name != "int8":  # trained in another format
            assert close(got, expected[name]), name
    assert torch.equal(got, expected["none"])
    added = made(parts, folder, ("both", 1.0), ("lora", 1.0))
    assert not close(added, expected["both"])
    assert close(made(parts, folder, ("both", 1.0), ("lora", 0.0)), expected["both"])
    assert torch.equal(made(parts, folder), expected["none"])
    half, most = made(parts, folder, ("both", 0.5)), made(parts, folder, ("both", 0.999))
    assert (most - expected["both"]).norm() < (half - expected["both"]).norm() < 2 * (expected["none"]).norm()


@pytest.mark.parametrize(
    "options", [{"weights": "int8"}, {"weights": "int8", "offload": "layer"}, {"offload": "layer"}]
)
def test_however_the_transformer_is_kept(tiny_model_dir, adapters, options, monkeypatch):
    """In int8 the blocks' weights that were trained in full are rounded as the others are, which changes little; blocks that
    wait are changed where they wait."""
    monkeypatch.setattr(Placement, "_check_offload", lambda _: None)  # a CPU has no other memory to wait in, but can
    folder, expected = adapters
    parts = components(tiny_model_dir, **options)
    name = "int8" if "weights" in options else "both"
    before, got = made(parts, folder), made(parts, folder, (name, 1.0))
    assert (got - expected[name]).norm() < 0.02 * expected[name].norm()
    if "weights" not in options:
        assert close(got, expected[name])
    assert torch.equal(made(parts, folder), before)


def test_files_that_do_not_belong_together_are_refused(tiny_model_dir, adapters, tmp_path):
    folder, _ = adapters
    header = read_metadata(folder / "both")
    assert '"file": "extra_modules.safetensors"' in header["extra_modules"]
    assert read_metadata(folder / "both" / "extra_modules.safetensors")["adapter"] == "adapter_model.safetensors"
    described = [describe_adapters([AdapterUse(folder / name)])[0] for name in ("both", "lora")]
    assert ["extra_digest" in each for each in described] == [True, False]
    assert not any(".lora_" not in name for name in load_file(folder / "both" / "adapter_model.safetensors"))

    shutil.copytree(folder / "both", tmp_path / "both")
    extra = tmp_path / "both" / "extra_modules.safetensors"
    shutil.copy(folder / "int8" / extra.name, extra)
    with pytest.raises(InputError, match="was not saved together with"):
        read_extras(tmp_path / "both")
    tensors, own = load_file(folder / "both" / extra.name), read_metadata(folder / "both" / extra.name)
    save_file(tensors | {"proj_out.weight": torch.zeros(3, 3)}, extra, own)
    parts = components(tiny_model_dir)
    with pytest.raises(InputError, match=r"is for another model: it has proj_out.weight of shape \(3, 3\)"):
        made(parts, tmp_path, ("both", 1.0))
    save_file({name: each for name, each in tensors.items() if not name.endswith("leave.bias")}, extra, own)
    with pytest.raises(InputError, match="has different weights from its class"):
        made(parts, tmp_path, ("both", 1.0))
    extra.unlink()
    with pytest.raises(
        InputError, match=r"was trained with modules beside LoRA, but their file extra_modules\.safetensors"
    ):
        made(parts, tmp_path, ("both", 1.0))
