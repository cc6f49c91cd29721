"""The model's files, and ours against diffusers on its real weights.

Float32 is compared with float32: both sides do the same operations, so that nothing but the order of sums may differ. For rounded
numbers no bound is known beforehand, but one that needs no choice: ours may be no farther from float32 than diffusers' own are.
"""

import gc
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

from data_prep.files import write_text
from data_prep.model.directory import KNOWN, ModelDirectory
from data_prep.model.encoders import build_vae, load_prompt_encoder, load_vae, text_encoder_name
from data_prep.model.geometry import Geometry, Size, stretch, to_pixels
from losses.batch import Condition
from losses.patches import patchify, unpatchify
from scripts import photographs
from scripts.acceptance.findings import Findings, Options
from train.model.denoiser import build_dit, load_denoiser

TEXT_TOKENS = 250
IMAGE_PAD = 151655
"""The token that stands for a part of an image in Qwen's vocabulary."""
FLOAT32 = 1e-4
"""Of the largest value, for the velocity and the embeddings: float32 has 6e-8, the tiny model's five blocks leave 1e-6."""
FLOAT32_VAE = 1e-3
"""Of the largest value: a GPU's convolutions may transform pictures and kernels (Winograd), which costs them three digits."""
NO_WORSE = 1.25
"""Our rounding error over diffusers' own, both against float32: sums in another order make one or the other larger by chance."""
PROMPT = "Remove the sticker and keep everything else as it is."


def check_files(options: Options, findings: Findings) -> None:
    """Every tensor is there, of the shape that `config.json` says, and finite; files are as the hub or the first run has them."""
    model = ModelDirectory.resolve(options.model)
    findings.figure("fingerprint", model.fingerprint("transformer", "vae", "text_encoder", "tokenizer", "processor"))
    known = next((folder for hub_id, folder in KNOWN.items() if hub_id.split("/")[1] in options.name), None)
    for component in ("transformer", "vae", "text_encoder"):
        stored, expected = model.shapes(component), expected_shapes(model, component)
        wrong = sorted(name for name in stored.keys() | expected.keys() if stored.get(name) != expected.get(name))
        findings.holds(
            f"{component}: tensors are those of config.json", not wrong, wrong[0] if wrong else f"{len(stored)} tensors"
        )
        if known:
            published, own = ModelDirectory(known).config(component), model.config(component)
            other = [
                key for key, value in published.items() if not key.startswith("_") and own.get(key, value) != value
            ]
            findings.holds(f"{component}: config.json is the published one", not other, ", ".join(other))
        bad, count = [], 0
        for name, tensor in model.tensors(component):
            count += tensor.numel()
            if not bool(torch.isfinite(tensor).all()):
                bad.append(name)
        findings.holds(
            f"{component}: every number is finite", not bad, bad[0] if bad else f"{count / 1e9:.4g} B numbers"
        )
    check_sums(
        options, findings, [file for part in ("transformer", "vae", "text_encoder") for file in model.shards(part)]
    )


def expected_shapes(model: ModelDirectory, component: str) -> dict[str, tuple[int, ...]]:
    """Under the names that the files have."""
    config = model.config(component)
    build: dict[str, Callable[[], nn.Module]] = {
        "transformer": lambda: build_dit(config),
        "vae": lambda: build_vae(config),
        "text_encoder": lambda: Qwen2_5_VLModel(Qwen2_5_VLConfig.from_dict(config)),
    }
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in build[component]().state_dict().items()}
    if component != "text_encoder":
        return shapes
    stored = model.shapes(component)
    names = {own: name for name in stored if (own := text_encoder_name(name))}
    head = {"lm_head.weight": stored["lm_head.weight"]} if "lm_head.weight" in stored else {}  # which is not ours
    return {names.get(own, own): shape for own, shape in shapes.items()} | head


def check_sums(options: Options, findings: Findings, files: Sequence[Path]) -> None:
    """SHA-256 of every file of weights. In the hub's cache a file is named by its own; elsewhere the first run's count."""
    with ThreadPoolExecutor(4) as pool:
        digests = dict(zip(files, pool.map(sha256, files), strict=True))
    named = {file: file.resolve().name for file in files if re.fullmatch("[0-9a-f]{64}", file.resolve().name)}
    if named:
        wrong = [file.name for file, name in named.items() if digests[file] != name]
        findings.holds("SHA-256 is the hub's", not wrong, ", ".join(wrong) or f"{len(named)} files")
    sums = {str(file.relative_to(options.model)): digest for file, digest in digests.items()}
    record = options.out / "files.json"
    first = json.loads(record.read_text()) if record.exists() else sums
    changed = sorted(name for name in first.keys() | sums.keys() if first.get(name) != sums.get(name))
    findings.holds(
        "SHA-256 is that of the first run in this folder", not changed, ", ".join(changed) or f"{len(sums)} files"
    )
    if not record.exists():
        write_text(record, json.dumps(sums, indent=1) + "\n")


def sha256(file: Path) -> str:
    """SHA-256 of the file's content."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@torch.no_grad()
def check_velocity(options: Options, findings: Findings) -> None:
    """The whole transformer on one picture with one reference. Both sides have the same tensors in memory; in float32 a block is
    widened when it is called, and forgotten."""
    from diffusers import QwenImageTransformer2DModel

    model, dtype = ModelDirectory.resolve(options.model), getattr(torch, options.dtype)
    denoiser = load_denoiser(model, options.device, dtype)
    with init_empty_weights(include_buffers=False):  # its rotary tables are computed, not stored
        theirs: Any = QwenImageTransformer2DModel.from_config(model.config("transformer"))
    theirs.load_state_dict(denoiser.dit.state_dict(), assign=True)
    theirs.requires_grad_(False).eval()
    theirs.pos_embed.to(options.device)
    latents, sigma, condition = inputs(model, options)

    def ours(dtype: torch.dtype) -> Tensor:
        return denoiser(latents.to(dtype), sigma, cast(condition, dtype)).float()

    def diffusers(dtype: torch.dtype) -> Tensor:
        return diffusers_velocity(theirs, latents.to(dtype), sigma, cast(condition, dtype)).float()

    with in_float32(denoiser.dit, denoiser.dit.transformer_blocks), in_float32(theirs, theirs.transformer_blocks):
        exact, mine = diffusers(torch.float32), ours(torch.float32)
    findings.figure("blocks", len(denoiser.dit.transformer_blocks))
    findings.figure("root mean square of the velocity", float(exact.square().mean().sqrt()))
    compare(findings, "velocity", options.dtype, exact, mine, ours(dtype), diffusers(dtype), FLOAT32)


def compare(
    findings: Findings, what: str, name: str, exact: Tensor, mine: Tensor, rounded: Tensor, theirs: Tensor, bound: float
) -> None:
    """Both float32 results, then both rounded ones against diffusers' in float32."""
    findings.at_most(f"{what}, float32: largest difference to diffusers", largest(mine, exact), bound)
    other = distance(theirs, exact)
    findings.figure(f"{what}, {name}: diffusers' own error, relative RMS", other)
    # where both are exact there is nothing to be better than
    findings.at_most(f"{what}, {name}: our error, relative RMS", distance(rounded, exact), max(NO_WORSE * other, bound))


def largest(mine: Tensor, exact: Tensor) -> float:
    """Largest difference, over the largest value."""
    return float((mine - exact).abs().max() / exact.abs().max()) if mine.shape == exact.shape else float("inf")


def distance(mine: Tensor, exact: Tensor) -> float:
    """Relative root mean square."""
    return float((mine - exact).norm() / exact.norm()) if mine.shape == exact.shape else float("inf")


def inputs(model: ModelDirectory, options: Options) -> tuple[Tensor, Tensor, Condition]:
    """Inputs of one sample: normal numbers, drawn on the CPU."""
    draw, cells = torch.Generator().manual_seed(0), options.side // 8
    width = model.config("transformer")["joint_attention_dim"]
    latents, reference = (torch.randn(1, 16, cells, cells, generator=draw).to(options.device) for _ in range(2))
    text = torch.randn(1, TEXT_TOKENS, width, generator=draw).to(options.device)
    mask = torch.ones(1, TEXT_TOKENS, dtype=torch.bool, device=options.device)
    return latents, torch.tensor([0.6], device=options.device), Condition(text, mask, [reference])


def cast(condition: Condition, dtype: torch.dtype) -> Condition:
    """The same in other numbers."""
    references = [latents.to(dtype) for latents in condition.edit_latents]
    return Condition(condition.prompt_emb.to(dtype), condition.prompt_emb_mask, references)


def diffusers_velocity(model: Any, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
    """As diffusers' own pipeline calls it."""
    grids = [latents, *condition.edit_latents]
    output = model(
        hidden_states=torch.cat([patchify(grid) for grid in grids], dim=1),
        encoder_hidden_states=condition.prompt_emb,
        encoder_hidden_states_mask=None,
        timestep=sigma,
        img_shapes=[[(1, grid.shape[-2] // 2, grid.shape[-1] // 2) for grid in grids]],
        return_dict=False,
    )[0]
    height, width = latents.shape[-2:]
    return unpatchify(output[:, : height * width // 4], height, width)


@contextmanager
def in_float32(module: nn.Module, blocks: nn.ModuleList) -> Iterator[None]:
    """Inside, the module computes in float32. Only the block that is at work is widened; the tensors are the same afterwards."""
    in_blocks = {parameter for block in blocks for parameter in block.parameters()}
    around = widen(parameter for parameter in module.parameters() if parameter not in in_blocks)
    kept: list[dict[nn.Parameter, Tensor]] = []

    def begin(block: nn.Module, *_: Any) -> None:
        kept.append(widen(block.parameters()))

    def end(*_: Any) -> None:
        restore(kept.pop())

    handles = [block.register_forward_pre_hook(begin) for block in blocks]
    handles += [block.register_forward_hook(end) for block in blocks]
    try:
        yield
    finally:
        restore(around)
        for handle in handles:
            handle.remove()


def widen(parameters: Any) -> dict[nn.Parameter, Tensor]:
    """Makes them float32; returns what they were."""
    before = {parameter: parameter.data for parameter in parameters}
    for parameter in before:
        parameter.data = parameter.data.float()
    return before


def restore(before: dict[nn.Parameter, Tensor]) -> None:
    """Undoes it."""
    for parameter, data in before.items():
        parameter.data = data


@torch.no_grad()
def check_prompts(options: Options, findings: Findings) -> None:
    """The embeddings of an instruction with two photographs, whose image tokens must have M-RoPE positions."""
    model, dtype = ModelDirectory.resolve(options.model), getattr(torch, options.dtype)
    geometry, loaded = Geometry(options.side**2, options.vision_pixels), map(photographs.load, photographs.HELD_OUT)
    images = [stretch(photograph, geometry.vision_size(Size.of(photograph))) for photograph in loaded]
    found: dict[tuple[str, torch.dtype], Tensor] = {}
    for number in (torch.float32, dtype):
        found["ours", number] = encode_ours(model, options.device, number, images)
        release()
        found["flat", number], found["theirs", number] = encode_theirs(model, options.device, number, images)
        release()
    exact = found["theirs", torch.float32]
    findings.figure("tokens of the instruction and two images", len(exact))
    flat = distance(found["flat", torch.float32], exact)
    findings.holds("M-RoPE makes a difference, relative RMS", flat > 0.01, flat, "≥ 0.01")
    rounded = found["ours", dtype], found["theirs", dtype]
    compare(findings, "embeddings", options.dtype, exact, found["ours", torch.float32], *rounded, FLOAT32)


def encode_ours(model: ModelDirectory, device: str, dtype: torch.dtype, images: list[Image.Image]) -> Tensor:
    """(L, D), float32, on the CPU."""
    return load_prompt_encoder(model, device, dtype).encode(PROMPT, images).float().cpu()


def encode_theirs(
    model: ModelDirectory, device: str, dtype: torch.dtype, images: list[Image.Image]
) -> tuple[Tensor, Tensor]:
    """diffusers' own embedding as it ships, and once its call is given the `mm_token_type_ids` that it drops."""
    from diffusers import QwenImageEditPlusPipeline
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer, Qwen2VLProcessor

    encoder: Any = (
        Qwen2_5_VLForConditionalGeneration.from_pretrained(model.path / "text_encoder", dtype=dtype).to(device).eval()
    )
    tokenizer = Qwen2Tokenizer.from_pretrained(model.path / "tokenizer")
    processor = Qwen2VLProcessor.from_pretrained(model.path / "processor", local_files_only=True)
    parts = {"scheduler": None, "vae": None, "transformer": None}
    pipeline = QwenImageEditPlusPipeline(text_encoder=encoder, tokenizer=tokenizer, processor=processor, **parts)
    flat, _ = pipeline._get_qwen_prompt_embeds(PROMPT, images, device, dtype)
    original = encoder.forward
    encoder.forward = lambda input_ids=None, **rest: original(
        input_ids=input_ids, mm_token_type_ids=(input_ids == IMAGE_PAD).int(), **rest
    )
    whole, _ = pipeline._get_qwen_prompt_embeds(PROMPT, images, device, dtype)
    return flat[0].float().cpu(), whole[0].float().cpu()


@torch.no_grad()
def check_vae(options: Options, findings: Findings) -> None:
    """A photograph to latents, and normal latents to pixels."""
    model, dtype, device = ModelDirectory.resolve(options.model), getattr(torch, options.dtype), options.device
    photograph = photographs.load(photographs.HELD_OUT[0]).resize(
        (options.side, options.side), Image.Resampling.LANCZOS
    )
    pixels = to_pixels(photograph)[None].to(device)
    found = {number: (*encode_and_decode(model, device, number, pixels),) for number in (torch.float32, dtype)}
    exact, rounded = found[torch.float32], found[dtype]
    for place, what in enumerate(("latents", "pixels")):
        mine, theirs = exact[0][place], exact[1][place]
        compare(findings, what, options.dtype, theirs, mine, rounded[0][place], rounded[1][place], FLOAT32_VAE)
    vae = load_vae(model, device, torch.float32)
    error = (vae.decode(exact[0][0]).clamp(-1, 1) - pixels).square().mean() / 4
    findings.figure("the photograph through the VAE and back, PSNR in dB", float(-10 * error.log10()))


def encode_and_decode(
    model: ModelDirectory, device: str, dtype: torch.dtype, pixels: Tensor
) -> tuple[tuple[Tensor, Tensor], ...]:
    """Latents and pixels of ours, and of diffusers'. What is decoded is the same for both, and in every dtype."""
    from diffusers import AutoencoderKLQwenImage

    ours = load_vae(model, device, dtype)
    theirs: Any = AutoencoderKLQwenImage.from_pretrained(model.path / "vae", dtype=dtype).to(device).eval()
    config = theirs.config
    mean, std = (
        torch.tensor(each, device=device).view(1, -1, 1, 1) for each in (config.latents_mean, config.latents_std)
    )
    raw = theirs.encode(pixels.to(dtype).unsqueeze(2)).latent_dist.mode().squeeze(2).float()
    draw = torch.randn(raw.shape, generator=torch.Generator().manual_seed(0)).to(device)
    decoded = theirs.decode((draw * std + mean).to(dtype).unsqueeze(2)).sample.squeeze(2).float()
    return (ours.encode(pixels), ours.decode(draw).clamp(-1, 1)), ((raw - mean) / std, decoded)  # diffusers clamps


def release() -> None:
    """Gives memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
