"""The encoders against diffusers and upstream, with M-RoPE positions computed by hand."""

import pytest
import torch
from diffsynth.models.qwen_image_vae import QwenImageVAE
from diffusers import AutoencoderKLQwenImage, QwenImageEditPlusPipeline, QwenImagePipeline
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from data_prep.errors import BadPrompt
from data_prep.model.directory import ModelDirectory
from data_prep.model.editions import PLUS
from data_prep.model.encoders import (
    DROPPED_IMAGE_TOKENS,
    DROPPED_TOKENS,
    IMAGE_SYSTEM,
    SYSTEM,
    build_vae,
    edit_text,
    load_prompt_encoder,
    load_vae,
    use_single_frame,
    video_weights,
)

# float32 against float32 through about thirty convolutions, whose sums are taken in another order
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model(tiny_model_dir) -> ModelDirectory:
    return ModelDirectory.resolve(tiny_model_dir)


@pytest.fixture(scope="module")
def prompt_encoder(model):
    return load_prompt_encoder(model, dtype=torch.float32)


def pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randint(0, 256, (h, w, 3), generator=generator, dtype=torch.uint8) for h, w in sizes]
    return [Image.fromarray(pixels.numpy()) for pixels in noise]


@torch.no_grad()
def test_vae_equals_diffusers(model):
    vae = load_vae(model, dtype=torch.float32)
    reference = AutoencoderKLQwenImage.from_pretrained(model.path / "vae", dtype=torch.float32)
    mean = torch.tensor(reference.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(reference.config.latents_std).view(1, -1, 1, 1, 1)
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = (reference.encode(pixels.unsqueeze(2)).latent_dist.mode() - mean) / std
    latents = vae.encode(pixels)
    assert latents.shape == (2, 16, 8, 12)
    assert (latents - expected.squeeze(2)).abs().max() < TOLERANCE
    decoded = reference.decode(expected * std + mean).sample.squeeze(2)
    assert (vae.decode(latents).clamp(-1, 1) - decoded).abs().max() < TOLERANCE  # diffusers clamps


@torch.no_grad()
def test_single_frame_convolutions_equal_upstream(model):
    upstream: QwenImageVAE = build_vae(model.config("vae"))
    upstream.load_state_dict({name: tensor.float() for name, tensor in model.tensors("vae")})
    vae = load_vae(model, dtype=torch.float32)
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert (vae.encode(pixels) - upstream.encode(pixels)).abs().max() < TOLERANCE
    ours, theirs = (sum(p.numel() for p in m.parameters()) for m in (vae.module, upstream))
    assert ours < 0.45 * theirs


@torch.no_grad()
def test_video_weights_give_the_same_vae_back(model):
    config = model.config("vae")
    published = build_vae(config)
    stored = {name: tensor.float() for name, tensor in model.tensors("vae")}
    published.load_state_dict(stored)
    converted = build_vae(config)
    converted.load_state_dict(stored)
    use_single_frame(converted)
    restored = video_weights(converted.state_dict(), layout=published.state_dict())
    assert restored.keys() == stored.keys()
    for name, tensor in restored.items():  # the tiny VAE was trained on single frames: nothing is before the last slice
        assert torch.equal(tensor, stored[name]) or "time_conv" in name


@torch.no_grad()
def test_latent_statistics_are_the_configurations(model):
    config = model.config("vae")
    config["latents_mean"] = [0.1 * i for i in range(16)]
    config["latents_std"] = [1 + 0.2 * i for i in range(16)]
    weights = {name: tensor.float() for name, tensor in model.tensors("vae")}
    vae, reference = build_vae(config), AutoencoderKLQwenImage.from_config(config)
    vae.load_state_dict(weights)
    reference.load_state_dict(weights)
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    raw = reference.encode(pixels.unsqueeze(2)).latent_dist.mode().squeeze(2)
    mean, std = (torch.tensor(config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
    assert (vae.encode(pixels) - (raw - mean) / std).abs().max() < TOLERANCE


def test_vae_decode_passes_gradients(model):
    vae = load_vae(model, dtype=torch.float32)
    latents = torch.zeros(1, 16, 4, 4, requires_grad=True)
    vae.decode(latents).square().mean().backward()
    assert latents.grad is not None
    assert latents.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("system", "dropped"),
    [(SYSTEM, DROPPED_TOKENS), (IMAGE_SYSTEM, DROPPED_IMAGE_TOKENS)],
    ids=["edit", "text to image"],
)
def test_template_drops_exactly_its_own_tokens(model, system, dropped):
    tokenizer = Qwen2Tokenizer.from_pretrained(model.path / "tokenizer")
    assert len(tokenizer(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n").input_ids) == dropped


@torch.no_grad()
def test_text_to_image_embedding_equals_diffusers(model, prompt_encoder):
    parts = QwenImageEditPlusPipeline.from_pretrained(model.path, dtype=torch.float32).components
    pipeline = QwenImagePipeline(**{name: part for name, part in parts.items() if name != "processor"})
    for prompt in ("A red cup.", " "):
        expected, _ = pipeline._get_qwen_prompt_embeds([prompt], "cpu", torch.float32)
        actual = prompt_encoder.encode(prompt, [])
        assert actual.shape == expected[0].shape
        assert (actual - expected[0]).abs().max() < TOLERANCE


def test_instructions_with_and_without_images_are_batched_apart(prompt_encoder):
    """Two of one length, of which the first has an image."""
    images = pictures((56, 56))
    long = prompt_encoder.encode("Swap.", images)
    for words in range(200):
        alone = prompt_encoder.encode(" a" * words + ".", [])
        if len(alone) + DROPPED_IMAGE_TOKENS == len(long) + DROPPED_TOKENS:
            break
    together = prompt_encoder.encode_batches([("Swap.", images), (" a" * words + ".", [])], batch_size=4)
    for one, other in zip(together, (long, alone), strict=True):
        assert (one - other).abs().max() < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2, 3])
def test_prompt_emb_equals_diffusers(model, prompt_encoder, monkeypatch, count):
    """diffusers' own embedding, once its call is given the mm_token_type_ids that it drops."""
    pipeline = QwenImageEditPlusPipeline.from_pretrained(model.path, dtype=torch.float32)
    original = Qwen2_5_VLForConditionalGeneration.forward

    def forward(self, input_ids=None, **inputs):
        return original(self, input_ids=input_ids, mm_token_type_ids=(input_ids == 151655).int(), **inputs)

    images = pictures((128, 128), (96, 160), (160, 96))[:count]
    without, _ = pipeline._get_qwen_prompt_embeds("Swap the cups.", images, "cpu", torch.float32)
    monkeypatch.setattr(Qwen2_5_VLForConditionalGeneration, "forward", forward)
    expected, _ = pipeline._get_qwen_prompt_embeds("Swap the cups.", images, "cpu", torch.float32)
    actual = prompt_encoder.encode("Swap the cups.", images)
    assert actual.shape == expected[0].shape
    assert (actual - expected[0]).abs().max() < TOLERANCE
    assert (without - expected).abs().max() > 0.01  # 1-D positions are another embedding


def expected_positions(ids: list[int], grids: list[tuple[int, int]]) -> list[list[int]]:
    """M-RoPE by hand (Qwen2-VL, arXiv 2409.12191, section 2.1): text advances all three axes together; the tokens of an
    image share a time, count rows and columns from there, and the text goes on after the largest of them."""
    positions, following, grids = [], 0, list(grids)
    i = 0
    while i < len(ids):
        if ids[i] != 151655:
            positions.append([following] * 3)
            following, i = following + 1, i + 1
            continue
        rows, columns = grids.pop(0)
        positions += [[following, following + r, following + c] for r in range(rows) for c in range(columns)]
        following, i = following + max(rows, columns), i + rows * columns
    return positions


@torch.no_grad()
def test_positions_are_true_mrope(prompt_encoder):
    images = pictures((128, 128), (96, 160))
    inputs = prompt_encoder.processor(text=[edit_text("Swap.", 2)], images=images, return_tensors="pt")
    grids = [(h // 2, w // 2) for _, h, w in inputs["image_grid_thw"].tolist()]
    expected = torch.tensor(expected_positions(inputs["input_ids"][0].tolist(), grids)).T.unsqueeze(1)
    seen = []
    hook = prompt_encoder.model.language_model.rotary_emb.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs.get("position_ids", args[1] if len(args) > 1 else None)),
        with_kwargs=True,
    )
    prompt_encoder.encode("Swap.", images)
    hook.remove()
    assert torch.equal(seen[0][-3:].cpu(), expected)


def test_a_batch_of_one_length_is_what_each_instruction_gives(prompt_encoder):
    """Of several lengths and sizes of images, with one that cannot be encoded among them."""
    one, wide, two = pictures((128, 128), (96, 160), (128, 128))
    requests = [("Swap.", [one]), ("<|im_end|>", [one]), ("Turn.", [two]), ("Turn it.", [wide, one]), ("Melt.", [one])]
    calls = []
    hook = prompt_encoder.model.register_forward_pre_hook(
        lambda _, __, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    found = prompt_encoder.encode_batches(requests, 2)
    hook.remove()
    assert sorted(calls) == [1, 1, 2]
    assert isinstance(found[1], BadPrompt)
    for embedding, request in zip(found, requests, strict=True):
        if isinstance(embedding, torch.Tensor):
            # float32 against float32, whose sums are taken in another order
            assert (embedding - prompt_encoder.encode(*request)).abs().max() < TOLERANCE
    assert str(prompt_encoder.encode_many(requests, 2)[1]) == str(found[1])


def test_number_of_images_is_checked(prompt_encoder):
    with pytest.raises(ValueError, match="takes up to 3 images, got 4"):
        prompt_encoder.encode("Swap.", pictures(*[(64, 64)] * 4))


def test_text_is_upstreams():
    assert edit_text("Go.", 2).count(PLUS.picture.format(2)) == 1
    assert edit_text("Go.", 1).endswith(
        "Picture 1: <|vision_start|><|image_pad|><|vision_end|>Go.<|im_end|>\n<|im_start|>assistant\n"
    )
