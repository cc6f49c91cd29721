"""Pre-trains the tiny transformer by flow matching on generic edits of photographs; writes scripts/tiny/transformer.safetensors.

    python scripts/make_tiny_model.py --random-transformer && python scripts/train_tiny_dit.py [--minutes 25]

The tiny model has to be a base model: it copies its reference, follows an instruction and fills holes, but it has never
seen the demo's edits, and never a held-out photograph. All weights are trained here; the demo trains a LoRA on top.
"""

import argparse
import math
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps
from rich.progress import track
from safetensors.torch import save_file

from data_prep.model.directory import ModelDirectory
from data_prep.model.encoders import load_prompt_encoder, load_vae
from data_prep.model.geometry import Geometry, Size, stretch, to_pixels
from losses import FlowMatchingLoss, LogitNormalSigma, SampleRandom
from losses.batch import Batch, Condition
from scripts import photographs
from train.model.denoiser import Denoiser, build_dit

SIZE = 128
VISION_PIXELS = 112 * 112


def with_hole(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Paints one flat rectangle or ellipse over the picture."""
    holed = picture.copy()
    width, height = rng.randint(SIZE // 6, SIZE // 2), rng.randint(SIZE // 6, SIZE // 2)
    left, top = rng.randint(0, SIZE - width), rng.randint(0, SIZE - height)
    draw = ImageDraw.Draw(holed)
    shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
    shape([left, top, left + width, top + height], fill=tuple(rng.randrange(256) for _ in range(3)))
    return holed


def tinted(red: float, blue: float) -> Callable[[Image.Image], Image.Image]:
    """Scales the red and the blue channel."""

    def apply(picture: Image.Image) -> Image.Image:
        r, g, b = picture.split()
        return Image.merge("RGB", (r.point(lambda v: min(255, v * red)), g, b.point(lambda v: min(255, v * blue))))

    return apply


EDITS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "Keep the photograph as it is.": lambda picture: picture,
    "Make it brighter.": lambda picture: ImageEnhance.Brightness(picture).enhance(1.5),
    "Make it darker.": lambda picture: ImageEnhance.Brightness(picture).enhance(0.6),
    "Make it black and white.": lambda picture: ImageOps.grayscale(picture).convert("RGB"),
    "Give it more contrast.": lambda picture: ImageEnhance.Contrast(picture).enhance(1.6),
    "Make the colours warmer.": tinted(1.3, 0.7),
    "Make the colours cooler.": tinted(0.7, 1.3),
    "Invert the colours.": ImageOps.invert,
    "Blur it.": lambda picture: picture.filter(ImageFilter.GaussianBlur(3)),
}
FILL = "Fill the hole in the photograph."


def make_pair(picture: Image.Image, rng: random.Random) -> tuple[str, Image.Image, Image.Image]:
    """(instruction, source, target) from one crop with shuffled colour channels."""
    crop = photographs.random_crop(picture, SIZE, rng, smallest=0.25)
    crop = ImageOps.mirror(crop) if rng.random() < 0.5 else crop
    if rng.random() < 0.4:
        crop = Image.merge("RGB", rng.sample(crop.split(), 3))
    if rng.random() < 0.4:
        return FILL, with_hole(crop, rng), crop
    prompt = rng.choice(list(EDITS))
    source = with_hole(crop, rng) if rng.random() < 0.3 else crop  # holes stay unless the instruction says otherwise
    return prompt, source, EDITS[prompt](source)


@torch.no_grad()
def encode_pool(model: ModelDirectory, count: int, rng: random.Random) -> dict[str, list[torch.Tensor]]:
    """Latents (16, 16, 16) of sources and targets, and prompt embeddings (L, D), of `count` random pairs."""
    vae, encoder = load_vae(model, "cpu", torch.float32), load_prompt_encoder(model, "cpu", torch.float32)
    vision = Geometry(SIZE * SIZE, VISION_PIXELS).vision_size(Size(SIZE, SIZE))
    pictures = [photographs.load(path) for path in photographs.TRAIN]
    pool: dict[str, list[torch.Tensor]] = {"source": [], "target": [], "prompt": []}
    for _ in track(range(count), "encoding"):
        prompt, source, target = make_pair(rng.choice(pictures), rng)
        latents = vae.encode(torch.stack([to_pixels(source), to_pixels(target)]))
        pool["source"].append(latents[0])
        pool["target"].append(latents[1])
        pool["prompt"].append(encoder.encode(prompt, [stretch(source, vision)]))
    return pool


def draw_batch(pool: dict[str, list[torch.Tensor]], size: int, rng: random.Random) -> Batch:
    """A random batch from the pool."""
    chosen = rng.choices(range(len(pool["source"])), k=size)
    source = torch.stack([pool["source"][i] for i in chosen])
    prompts = [pool["prompt"][i] for i in chosen]
    mask = torch.arange(max(map(len, prompts))) < torch.tensor([len(p) for p in prompts])[:, None]
    prompt_emb = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    return Batch(
        source_latents=source,
        sub_noise=source,
        condition=Condition(prompt_emb, mask, [source]),
        negative=None,
        ids=[str(i) for i in chosen],
        target_latents=torch.stack([pool["target"][i] for i in chosen]),
        mask=None,
    )


def initialise(denoiser: Denoiser, seed: int) -> None:
    """Fan-in scaled weights; residual branches' gates and the output start at zero (DiT, arXiv 2212.09748)."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in denoiser.dit.named_parameters():
        if parameter.ndim == 2:
            zero = any(part in name for part in ("img_mod", "txt_mod", "norm_out", "proj_out"))
            std = 0.0 if zero else parameter.shape[1] ** -0.5
            parameter.data.normal_(0, 1, generator=generator).mul_(std)
        else:
            parameter.data.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/tiny")
    parser.add_argument("--out", type=Path, default=Path("scripts/tiny/transformer.safetensors"))
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--pool", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rng = random.Random(args.seed)
    model = ModelDirectory.resolve(args.model)
    pool = encode_pool(model, args.pool, rng)
    denoiser = Denoiser(build_dit(model.config("transformer")), zero_cond_t=True)
    initialise(denoiser, args.seed)
    loss = FlowMatchingLoss(sigma=LogitNormalSigma(0.4, 1.2))

    matrices = [p for name, p in denoiser.named_parameters() if p.ndim == 2 and "transformer_blocks" in name]
    chosen = set(map(id, matrices))
    others = [p for p in denoiser.parameters() if id(p) not in chosen]
    optimizers = [
        torch.optim.Muon(matrices, lr=4e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0),
    ]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    start, step, average = time.time(), 0, math.nan
    while (spent := (time.time() - start) / (60 * args.minutes)) < 1:
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * min(1, (step + 1) / 100) * (1 - spent)
        batch = draw_batch(pool, args.batch, rng)
        terms = loss(denoiser, batch, SampleRandom(args.seed, range(step * args.batch, (step + 1) * args.batch)))
        terms.loss.mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        value = terms.loss.mean().item()
        average = value if step == 0 else 0.98 * average + 0.02 * value
        step += 1
        if step % 100 == 0:
            print(f"step {step} {spent:.0%} flow matching loss {average:.4f}", flush=True)

    args.out.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in denoiser.dit.state_dict().items()}
    save_file(weights, args.out)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB, {step} steps in {(time.time() - start) / 60:.1f} min")


if __name__ == "__main__":
    main()
