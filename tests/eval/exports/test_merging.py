"""A merged transformer: what the adapters make of the model, opened by diffusers' and DiffSynth's own loaders, float32."""

import json
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch
from diffsynth.configs.model_configs import MODEL_CONFIGS
from diffsynth.core.loader import hash_model_file, hash_state_dict_keys
from diffsynth.core.loader.model import load_model
from diffusers import GGUFQuantizationConfig, QwenImageTransformer2DModel
from safetensors.torch import load_file

from data_prep.errors import InputError
from data_prep.model.directory import KNOWN, ModelDirectory
from eval.exports import merging
from eval.exports.merging import prepare_merge
from eval.qwen.weights.components import Components, load_placed_denoiser
from eval.request.knobs import AdapterUse
from eval.request.placement import Placement, make_placement
from tests.train.model.test_adapter import TARGETS, close, fresh, inputs, trained
from tests.train.model.test_denoiser import run_reference
from tests.train.model.test_extra import IN_FULL, STE, attached, drawn
from train.model.adapter import attach_lokr
from train.model.adapter_files import read_header
from train.model.denoiser import Denoiser, build_dit

WEIGHTS = "diffusion_pytorch_model"
F32 = torch.float32


@pytest.fixture(scope="module")
def model(tiny_model_dir) -> ModelDirectory:
    return ModelDirectory.resolve(tiny_model_dir)


@pytest.fixture(scope="module")
def adapters(tiny_model_dir, tmp_path_factory) -> dict[str, Path]:
    """LoRA, LoKr, DoRA, modules trained in full, an added module."""
    folder = tmp_path_factory.mktemp("adapters")
    trained(fresh(tiny_model_dir)).export(folder / "lora", {"objective": "lbm", "geometry": "{}"})
    trained(fresh(tiny_model_dir), dora=True, seed=2).export(folder / "dora", {"objective": "lbm"})
    lokr = attach_lokr(fresh(tiny_model_dir), 2, 3, TARGETS, False, 4)
    for seed, weight in enumerate(lokr.parameters()):
        weight.data.copy_(0.1 * drawn(*weight.shape, seed=seed))
    lokr.export(folder / "lokr", {"objective": "lbm", "kind": "lokr"})
    for name, modules in {"full": {}, "added": STE}.items():
        adapter = attached(fresh(tiny_model_dir), IN_FULL, modules)
        for seed, weight in enumerate(adapter.parameters()):
            weight.data.add_(0.05 * drawn(*weight.shape, seed=seed))
        adapter.export(folder / name, {"objective": "lbm", "step": "1", "config_hash": "0"})
    trained(fresh(tiny_model_dir)).export(folder / "flow", {"objective": "flow"})
    return {name: folder / name for name in ("lora", "dora", "lokr", "full", "added", "flow")}


@torch.no_grad()
def expected(model: ModelDirectory, uses) -> torch.Tensor:
    """The velocity that the editor has with these adapters."""
    with Components(model, make_placement("cpu", "float32")).denoiser(uses) as denoiser:
        return denoiser(*inputs(denoiser))


COMBINATIONS = {
    "none": [],
    "lora": [("lora", 1.0)],
    "several": [("lora", 0.5), ("lokr", -1.5), ("lora", 0.25)],
    "dora": [("dora", 0.7)],
    "full": [("full", 1.0), ("lora", 0.5)],
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_diffusers_computes_what_the_editor_does(model, adapters, tmp_path, name):
    uses = [AdapterUse(adapters[each], weight) for each, weight in COMBINATIONS[name]]
    prepare_merge(model, uses, F32).write_folder(tmp_path / "merged", "500KB")
    transformer = QwenImageTransformer2DModel.from_pretrained(tmp_path / "merged", torch_dtype=F32)
    denoiser = fresh(model.path)
    with torch.no_grad():
        assert close(run_reference(transformer, *inputs(denoiser)), expected(model, uses))
    index = json.loads((tmp_path / "merged" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    sizes = [(tmp_path / "merged" / file).stat().st_size for file in files]
    assert max(sizes) < 500_000 + 10_000  # and the header
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in transformer.state_dict().values())
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_diffsynth_opens_it(model, adapters, tmp_path):
    """With its loader of sharded files. It knows a model by the hash of its names and shapes, which stays the base model's."""
    uses = [AdapterUse(adapters["lora"])]
    prepare_merge(model, uses, F32).write_folder(tmp_path / "merged", "500KB")
    files = [str(path) for path in sorted((tmp_path / "merged").glob("*.safetensors"))]
    assert hash_model_file(files) == hash_model_file([str(path) for path in model.shards("transformer")])
    dit = load_model(lambda: build_dit(model.config("transformer")), files, torch_dtype=F32)
    with torch.no_grad():
        denoiser = Denoiser(dit, True)
        assert close(denoiser(*inputs(denoiser)), expected(model, uses))


def test_the_names_at_the_real_size_are_those_that_diffsynth_knows():
    with torch.device("meta"):
        dit = build_dit(ModelDirectory(KNOWN["Qwen/Qwen-Image-Edit-2511"]).config("transformer"))
    found = hash_state_dict_keys(dit.state_dict())
    assert "qwen_image_dit" in {config["model_name"] for config in MODEL_CONFIGS if config["model_hash"] == found}


def test_one_file_with_the_names_that_comfyui_looks_for(model, adapters, tmp_path):
    """ComfyUI opens one file, and knows Qwen-Image by `txt_norm.weight`, without a prefix."""
    prepare_merge(model, [AdapterUse(adapters["lora"])], torch.bfloat16).write_folder(tmp_path / "merged", "1TB")
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == ["config.json", f"{WEIGHTS}.safetensors"]
    tensors = load_file(tmp_path / "merged" / f"{WEIGHTS}.safetensors")
    assert {each.dtype for each in tensors.values()} == {torch.bfloat16}
    assert {"txt_norm.weight", "img_in.weight", "transformer_blocks.0.attn.to_q.weight"} <= tensors.keys()
    assert {name: tuple(each.shape) for name, each in tensors.items()} == model.shapes("transformer")
    header = read_header(tmp_path / "merged" / f"{WEIGHTS}.safetensors")
    assert (header["objective"], json.loads(header["merged"])[0]["weight"]) == ("lbm", 1.0)
    assert str(tmp_path) not in str(header)


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_gguf_is_opened_here_and_by_diffusers(model, adapters, tmp_path, kind):
    """Both dequantise alike: the same velocity, which is the merged one as far as the type's bits go (its rounding, measured)."""
    uses = [AdapterUse(adapters["lora"], 0.5), AdapterUse(adapters["lokr"])]
    prepare_merge(model, uses, None).write_gguf(tmp_path / "merged.gguf", kind)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "merged.gguf").tensors}
    assert {types["transformer_blocks.0.attn.to_q.weight"], types["img_in.weight"]} == {kind, "F32"}
    denoiser = load_placed_denoiser(model, Placement(dtype=F32, gguf=tmp_path / "merged.gguf"))
    theirs = QwenImageTransformer2DModel.from_single_file(
        str(tmp_path / "merged.gguf"),
        config=str(model.path),
        subfolder="transformer",
        quantization_config=GGUFQuantizationConfig(compute_dtype=F32),
        torch_dtype=F32,
    )
    with torch.no_grad():
        ours = denoiser(*inputs(denoiser))
        assert close(run_reference(theirs, *inputs(denoiser)), ours)
    wanted = expected(model, uses)
    assert (ours - wanted).abs().max() < {"F16": 0.002, "Q8_0": 0.05, "Q4_0": 0.8}[kind] * wanted.abs().max()


def test_a_whole_model_directory(model, adapters, tmp_path):
    prepare_merge(model, [AdapterUse(adapters["lora"])], F32).write_folder(tmp_path / "merged", "5GB", whole=True)
    merged = ModelDirectory.resolve(tmp_path / "merged")
    assert close(expected(merged, []), expected(model, [AdapterUse(adapters["lora"])]))
    assert merged.fingerprint("vae", "text_encoder") == model.fingerprint("vae", "text_encoder")
    assert (tmp_path / "merged" / "model_index.json").is_file()


@pytest.mark.parametrize("kind", ["whole", "Q8_0", "BF16"])
def test_the_room_that_is_asked_for_is_what_the_files_need(model, adapters, tmp_path, monkeypatch, kind):
    """But for headers and configurations, of at most 100 kB."""
    asked = []
    monkeypatch.setattr(merging, "check_room", lambda _, num_bytes: asked.append(num_bytes))
    merge, out = prepare_merge(model, [AdapterUse(adapters["lora"])], None), tmp_path / "merged"
    merge.write_folder(out, "5GB", whole=True) if kind == "whole" else merge.write_gguf(out, kind)
    files = [out] if out.is_file() else [file for file in out.rglob("*") if file.is_file()]
    assert 0 <= sum(file.stat().st_size for file in files) - asked[0] < 100_000


def test_no_more_than_a_tensor_is_held(model, adapters, tmp_path, monkeypatch):
    """Of the merged transformer: each tensor is gone when the next one is read."""
    merge, alive, most = prepare_merge(model, [AdapterUse(adapters["lora"])], F32), [], 0
    plain = type(merge).tensor

    def tensor(self, name, dtype):
        nonlocal most
        made = plain(self, name, dtype)
        alive.append(weakref.ref(made))
        most = max(most, sum(each() is not None for each in alive))
        return made

    monkeypatch.setattr(type(merge), "tensor", tensor)
    merge.write_folder(tmp_path / "merged", "1TB")
    assert (len(alive), most) == (len(merge.layout), 2)  # the one that was written last, and the new one


@pytest.mark.parametrize(
    ("uses", "message"),
    [
        (["dora", "lora"], "is a DoRA adapter, which rescales the weights and cannot be added to others"),
        (["added"], "adds the module ste, which is no part of a transformer and cannot be merged"),
        (["lora", "flow"], "were trained for different objectives, lbm and flow"),
    ],
)
def test_what_cannot_be_merged_is_said(model, adapters, uses, message):
    with pytest.raises(InputError, match=message):
        prepare_merge(model, [AdapterUse(adapters[each]) for each in uses], F32)


def test_a_killed_or_failed_merge_leaves_nothing(model, adapters, tmp_path):
    merge = prepare_merge(model, [AdapterUse(adapters["lora"], 1e9)], torch.float16)
    with pytest.raises(InputError, match=r"has numbers that torch\.float16 cannot hold: use --dtype bf16"):
        merge.write_folder(tmp_path / "merged", "5GB")
    with pytest.raises(InputError, match="--shard-size must look like 5GB, got 'many'"):
        merge.write_folder(tmp_path / "merged", "many")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "merged").mkdir()
    with pytest.raises(InputError, match="merged is there already"):
        merge.write_folder(tmp_path / "merged", "5GB")


def test_a_disk_without_room_is_said_at_once(model, adapters, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"merged needs 0\.0 GiB, and .* has 0\.0 GiB left"):
        prepare_merge(model, [AdapterUse(adapters["lora"])], F32).write_folder(tmp_path / "merged", "5GB")
