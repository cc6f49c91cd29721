"""The tiny model: hub layout, true tokenizer, the same bytes for the same seed, a VAE that reconstructs."""

import filecmp

import pytest
import torch
from diffusers import QwenImageEditPlusPipeline
from torchmetrics.functional.image import peak_signal_noise_ratio
from transformers import Qwen2Tokenizer

from data_prep.errors import InputError
from data_prep.model.directory import ModelDirectory
from data_prep.model.encoders import load_vae
from data_prep.model.geometry import Size, fit, to_pixels
from scripts import make_tiny_model, photographs
from tests.commands import ROOT, run_script

pytestmark = pytest.mark.slow


def files_of(folder):
    return sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())


def test_same_seed_same_bytes(tiny_model_dir, tmp_path):
    run_script("scripts/make_tiny_model.py", "--out", tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(tiny_model_dir)
    for file in files_of(tiny_model_dir):
        assert filecmp.cmp(tmp_path / "again" / file, tiny_model_dir / file, shallow=False), file


def test_the_seed_is_all_that_random_weights_depend_on(tiny_model_dir, tmp_path):
    expected = (tiny_model_dir / "text_encoder" / "model.safetensors").read_bytes()
    state = torch.get_rng_state()
    for seed in (0, 1):
        torch.manual_seed(123)
        make_tiny_model.write_text_encoder(tmp_path / f"{seed}", seed)
        make_tiny_model.write_random_transformer(tmp_path / f"random-{seed}", seed)
        assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(123).get_state())
        assert ((tmp_path / f"{seed}" / "model.safetensors").read_bytes() == expected) == (seed == 0)
    torch.set_rng_state(state)
    weights = [tmp_path / f"random-{seed}" / "diffusion_pytorch_model.safetensors" for seed in (0, 1)]
    assert not filecmp.cmp(*weights, shallow=False)


def test_a_missing_shipped_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(make_tiny_model, "SHIPPED", tmp_path)
    with pytest.raises(InputError, match=r"vae_config.json is missing: restore it from the repository"):
        make_tiny_model.write_trained("vae", tmp_path / "vae")


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
