"""The tiny model: hub layout, true tokenizer, the same bytes for the same seed, a VAE that reconstructs."""

import filecmp
import json
import shutil

import pytest
import torch
from diffusers import QwenImageEditPlusPipeline
from torchmetrics.functional.image import peak_signal_noise_ratio
from transformers import Qwen2Tokenizer

from data_prep.encoders import load_vae
from data_prep.errors import InputError
from data_prep.geometry import Size, fit, to_pixels
from data_prep.model_dir import ModelDirectory
from scripts import photographs
from tests.commands import ROOT, run_script


def files_of(folder):
    return sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())


def test_same_seed_same_bytes(tiny_model_dir, tmp_path):
    again, other = tmp_path / "again", tmp_path / "other"
    run_script("scripts/make_tiny_model.py", "--out", again)
    run_script("scripts/make_tiny_model.py", "--out", other, "--seed", "1")
    assert files_of(again) == files_of(tiny_model_dir)
    for file in files_of(again):
        assert filecmp.cmp(again / file, tiny_model_dir / file, shallow=False), file
        same = filecmp.cmp(other / file, tiny_model_dir / file, shallow=False)
        assert same == (str(file) != "text_encoder/model.safetensors"), file


def test_the_shipped_weights_are_small():
    for file in (ROOT / "scripts" / "tiny").glob("*.safetensors"):
        assert file.stat().st_size <= 4e6, file


def test_tokenizer_is_the_real_one(tiny_model_dir):
    tokenizer = Qwen2Tokenizer.from_pretrained(tiny_model_dir / "tokenizer")
    assert len(tokenizer) == 151_665
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|image_pad|>"]) == [
        151643,
        151644,
        151655,
    ]
    # ids from the published tokenizer
    assert tokenizer("Hello, world!").input_ids == [9707, 11, 1879, 0]
    text = "Ein Größenvergleich: 漢字, emoji 🙂 and 12345."
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_diffusers_loads_the_directory(tiny_model_dir):
    pipeline = QwenImageEditPlusPipeline.from_pretrained(tiny_model_dir)
    assert pipeline.transformer.config.zero_cond_t
    assert pipeline.scheduler.config.shift_terminal == 0.02


@torch.no_grad()
@pytest.mark.parametrize("path", photographs.HELD_OUT, ids=lambda path: path.stem)
def test_vae_reconstructs_held_out_photographs(tiny_model_dir, path):
    vae = load_vae(ModelDirectory.resolve(tiny_model_dir), dtype=torch.float32)
    pixels = to_pixels(fit(photographs.load(path), Size(256, 256)))[None]
    psnr = peak_signal_noise_ratio(vae.decode(vae.encode(pixels)).clamp(-1, 1), pixels, data_range=2.0)
    assert psnr >= 24


@torch.no_grad()
def test_latents_are_normalised(tiny_model_dir):
    vae = load_vae(ModelDirectory.resolve(tiny_model_dir), dtype=torch.float32)
    pixels = torch.stack([to_pixels(fit(photographs.load(path), Size(128, 128))) for path in photographs.TRAIN])
    latents = vae.encode(pixels)
    assert latents.mean().abs() < 0.3
    assert 0.6 < latents.std() < 1.6


def test_what_is_missing_is_named(tiny_model_dir, tmp_path):
    with pytest.raises(InputError, match=r"no tiny model at .*make_tiny_model.py"):
        ModelDirectory.resolve("models/../nowhere/models/tiny")
    with pytest.raises(InputError, match=r"no model at ./nothing/here"):
        ModelDirectory.resolve("./nothing/here")
    with pytest.raises(InputError, match=r"lacks transformer, vae"):
        ModelDirectory.resolve(tmp_path)


def broken_copy(tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir, tmp_path / "broken")
    return ModelDirectory.resolve(tmp_path / "broken")


def test_weights_that_do_not_fit_are_named(tiny_model_dir, tmp_path):
    model = broken_copy(tiny_model_dir, tmp_path)
    config = model.path / "vae" / "config.json"
    text = config.read_text()
    config.write_text(json.dumps(json.loads(text) | {"base_dim": 8}))
    with pytest.raises(InputError, match=r"has shape .* config.json asks for"):
        load_vae(model)
    (model.path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut short")
    with pytest.raises(InputError, match="cannot be read"):
        list(model.tensors("vae"))
    (model.path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match="weights are missing"):
        load_vae(model)


def test_fingerprint_follows_contents(tiny_model_dir, tmp_path):
    model = broken_copy(tiny_model_dir, tmp_path)
    before = model.fingerprint("vae", "text_encoder")
    assert before == ModelDirectory.resolve(tiny_model_dir).fingerprint("vae", "text_encoder")
    weights = model.path / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert model.fingerprint("vae", "text_encoder") != before
    assert model.fingerprint("text_encoder") == ModelDirectory.resolve(tiny_model_dir).fingerprint("text_encoder")
