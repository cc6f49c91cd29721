"""The model directory: how it is found, and what is said when it is wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

from data_prep.errors import InputError
from data_prep.model.directory import KNOWN, ModelDirectory
from data_prep.model.encoders import build_vae, load_prompt_encoder, load_vae

FILES = {"vae": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}
LOADERS = {"vae": load_vae, "text_encoder": load_prompt_encoder}


@pytest.fixture
def model(tiny_model_dir, tmp_path) -> ModelDirectory:
    """A copy of the tiny model that a test may break."""
    for name in ("transformer", "tokenizer"):
        (tmp_path / name).symlink_to(tiny_model_dir / name)
    for name in ("vae", "text_encoder", "processor"):
        shutil.copytree(tiny_model_dir / name, tmp_path / name)
    return ModelDirectory.resolve(tmp_path)


def change_config(model: ModelDirectory, component: str, **changes) -> None:
    file = model.path / component / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_weights(model: ModelDirectory, component: str, change) -> None:
    """Applies `change` to the component's weights, a dict that is written back."""
    file = model.path / component / FILES[component]
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def test_what_cannot_be_found_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no tiny model at .*python scripts/make_tiny_model.py"):
        ModelDirectory.resolve("models/../nowhere/models/tiny")
    with pytest.raises(InputError, match=r"no model at ./nothing/here"):
        ModelDirectory.resolve("./nothing/here")
    with pytest.raises(InputError, match=r"not a model folder: transformer, vae.* missing"):
        ModelDirectory.resolve(tmp_path)


def test_a_hub_that_cannot_be_reached_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"no folder nobody/nothing, and downloading it from the hub failed"):
        ModelDirectory.resolve("nobody/nothing")


@pytest.mark.parametrize("component", ["vae", "text_encoder"])
def test_weights_and_configuration_must_agree(model, component):
    def rename(weights):
        nonlocal lost
        lost = next(name for name in weights if name.endswith(("norm.gamma", "norm.weight")))
        weights["unheard.of"] = weights.pop(lost)

    lost = ""
    load = LOADERS[component]
    change_weights(model, component, rename)
    with pytest.raises(InputError, match=rf"{component} holds '.*unheard.of', which its config.json does not describe"):
        load(model)
    change_weights(model, component, lambda weights: weights.pop("unheard.of"))
    with pytest.raises(
        InputError, match=rf"{component} lacks 1 tensors, the first is '.*{lost.removeprefix('model.')}'"
    ):
        load(model)


def test_other_sizes_than_the_configurations_are_named(model):
    change_config(model, "vae", base_dim=8)
    with pytest.raises(InputError, match=r"vae: .* has shape .*, config.json asks for"):
        load_vae(model)
    change_config(model, "text_encoder", text_config={"hidden_size": 64, "num_attention_heads": 2})  # the rest: 7 B's
    with pytest.raises(InputError, match=r"text_encoder: .* has shape .*, config.json asks for .*64"):
        load_prompt_encoder(model)


@pytest.mark.parametrize(
    "changes", [{"z_dim": 8}, {"latents_mean": [0.0]}, {"latents_std": []}], ids=lambda changes: next(iter(changes))
)
def test_other_latents_than_qwens_are_refused(model, changes):
    change_config(model, "vae", **changes)
    with pytest.raises(InputError, match=r"z_dim, latents_mean and latents_std describe \[.*\] channels"):
        load_vae(model)


@pytest.mark.parametrize("component", ["vae", "text_encoder"])
def test_damaged_files_are_named(model, component):
    weights, load = model.path / component / FILES[component], LOADERS[component]
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(InputError, match=rf"{FILES[component]} cannot be read .*: download it again"):
        load(model)
    weights.unlink()
    with pytest.raises(InputError, match=r"weights are missing: .*safetensors does not exist"):
        load(model)
    (model.path / component / "config.json").unlink()
    with pytest.raises(InputError, match=r"config.json does not exist: the model directory is incomplete"):
        load(model)


def test_an_incomplete_processor_is_named(model):
    (model.path / "processor" / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"processor is incomplete: "):
        load_prompt_encoder(model)


def in_two_shards(model: ModelDirectory, component: str) -> None:
    """Cuts the component's file in two, with an index beside them, as the hub has large ones."""
    file = model.path / component / FILES[component]
    weights = sorted(load_file(file).items())
    halves = dict(weights[::2]), dict(weights[1::2])
    index = {}
    for i, half in enumerate(halves, 1):
        name = f"{file.stem}-{i:05}-of-00002.safetensors"
        save_file(half, file.with_name(name), metadata={"format": "pt"})
        index |= dict.fromkeys(half, name)
    file.with_name(f"{file.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    file.unlink()


def test_shards_and_newer_names_are_the_same_model(tiny_model_dir, model):
    def newer_names(weights):
        for name in list(weights):
            stem = name if name.startswith("visual.") else f"language_model.{name.removeprefix('model.')}"
            weights[f"model.{stem}"] = weights.pop(name)
        weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"].clone()

    change_weights(model, "text_encoder", newer_names)
    in_two_shards(model, "text_encoder")
    in_two_shards(model, "vae")
    whole = ModelDirectory.resolve(tiny_model_dir)
    assert load_vae(model).module.state_dict().keys() == load_vae(whole).module.state_dict().keys()
    for ours, theirs in (
        (load_vae(model).module, load_vae(whole).module),
        (load_prompt_encoder(model).model, load_prompt_encoder(whole).model),
    ):
        expected = theirs.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())
    next((model.path / "vae").glob("*-00002-of-00002.safetensors")).unlink()
    with pytest.raises(InputError, match=r"weights are missing: .*00002-of-00002.safetensors does not exist"):
        load_vae(model)


def test_a_loaded_model_stands_alone(model):
    """What happens to the files afterwards, and the global generator, are not its business."""
    state = torch.get_rng_state()
    modules = load_vae(model).module, load_prompt_encoder(model).model  # bf16, as stored
    assert torch.equal(torch.get_rng_state(), state)
    before = [tensor.clone() for module in modules for tensor in module.state_dict().values()]
    for component, name in FILES.items():
        file: Path = model.path / component / name
        with file.open("r+b") as opened:  # the same file, not a new one
            opened.seek(file.stat().st_size // 2)
            opened.write(bytes(file.stat().st_size // 2))
    after = [tensor for module in modules for tensor in module.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any(parameter.requires_grad or parameter.is_meta for m in modules for parameter in m.parameters())


def test_fingerprint_follows_contents(tiny_model_dir, model):
    before = model.fingerprint("vae", "text_encoder")
    assert before == ModelDirectory.resolve(tiny_model_dir).fingerprint("vae", "text_encoder")
    weights = model.path / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert model.fingerprint("vae", "text_encoder") != before
    assert model.fingerprint("text_encoder") == ModelDirectory.resolve(tiny_model_dir).fingerprint("text_encoder")


@pytest.mark.parametrize("hub_id", sorted(KNOWN))
def test_the_sizes_of_known_models_ship(hub_id, monkeypatch):
    """They are the published ones: 20.43 and 8.29 billion parameters, the language head of 0.54 among the latter, and
    diffusers' own class makes the same transformer of them."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = ModelDirectory.resolve(hub_id, weights=False)
    assert model.shipped
    assert model.config("transformer").get("zero_cond_t", False) == hub_id.endswith("2511")
    with torch.device("meta"):
        theirs = QwenImageTransformer2DModel(**{k: v for k, v in model.config("transformer").items() if k[0] != "_"})
        text_encoder = Qwen2_5_VLModel(Qwen2_5_VLConfig.from_dict(model.config("text_encoder")))
        vae, diffusers_vae = build_vae(model.config("vae")), AutoencoderKLQwenImage()
    assert round(sum(p.numel() for p in theirs.parameters()) / 1e9, 2) == 20.43
    assert round(sum(p.numel() for p in text_encoder.parameters()) / 1e9 + 0.545, 2) == 8.29
    assert sum(p.numel() for p in vae.parameters()) == sum(p.numel() for p in diffusers_vae.parameters())


def test_a_known_model_of_this_machine_is_preferred(tmp_path, monkeypatch):
    """What the hub's cache holds says the sizes; all of it is needed for more than that."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--Qwen--Qwen-Image-Edit-2511"
    snapshot = repository / "snapshots" / "0123"
    shutil.copytree(KNOWN["Qwen/Qwen-Image-Edit-2511"], snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    found = ModelDirectory.resolve("Qwen/Qwen-Image-Edit-2511", weights=False)
    assert (found.path, found.shipped) == (snapshot, False)
    (snapshot / "vae" / "config.json").unlink()
    assert ModelDirectory.resolve("Qwen/Qwen-Image-Edit-2511", weights=False).shipped
    with pytest.raises(InputError, match="downloading it from the hub failed"):
        ModelDirectory.resolve("Qwen/Qwen-Image-Edit-2509")
