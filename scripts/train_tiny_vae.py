"""Trains the tiny VAE on photographs and writes scripts/tiny/vae.safetensors (bf16, shipped in the repository).

    python scripts/train_tiny_vae.py [--minutes 20] [--out scripts/tiny/vae.safetensors]

The class is DiffSynth's QwenImageVAE at small width. After training, an affine map folded into the 1x1 convolutions on
both sides of the latents gives every normalised channel mean 0 and standard deviation 1 on the training photographs.
"""

import argparse
import math
import random
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from diffsynth.models.qwen_image_vae import QwenImageAttentionBlock, QwenImageResidualBlock, QwenImageVAE
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms.v2 import functional as TF

from data_prep.model.encoders import build_vae, use_single_frame, video_weights
from scripts import photographs
from scripts.make_tiny_model import read_config

LATENT_NOISE = 0.1  # standard deviation of the noise that the decoder must bear, in normalised latents


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz (Jordan et al. 2024), on weights of two or more dimensions.

    torch.optim.Muon takes matrices only. With Adam this network is still at 18 dB where Muon is at 24.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.mul_(0.95).add_(p.grad)
                matrix = orthogonalise((p.grad + 0.95 * momentum).flatten(1))
                scale = 0.2 * max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5
                p.sub_(matrix.view_as(p), alpha=group["lr"] * scale)


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrix, roughly, by five quintic Newton-Schulz steps."""
    x = matrix / (matrix.norm() + 1e-7)
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x if wide else x.T


def initialise(vae: QwenImageVAE) -> None:
    """Weights for single frames: only the last temporal slice counts, residual branches start small, attention at zero."""
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
            fan_in = module.weight[0, :, -1].numel() if module.weight.ndim == 5 else module.weight[0].numel()
            weight = torch.zeros_like(module.weight)
            live = weight[:, :, -1] if weight.ndim == 5 else weight
            live.normal_(std=fan_in**-0.5)
            module.weight.data, module.bias.data = weight, torch.zeros_like(module.bias)
    for module in vae.modules():
        if isinstance(module, QwenImageResidualBlock):
            module.conv2.weight.data *= 0.1
        elif isinstance(module, QwenImageAttentionBlock):
            module.proj.weight.data.zero_()


def batch_of_crops(pictures: list[Image.Image], size: int, count: int, rng: random.Random) -> torch.Tensor:
    """Random crops with flips, shuffled channels and flat colours pasted in. Shape (count, 3, size, size), range [-1, 1]."""
    crops = []
    for _ in range(count):
        crop = photographs.random_crop(rng.choice(pictures), size, rng, smallest=0.2)
        pixels = TF.to_image(crop).float() / 127.5 - 1
        pixels = pixels.flip(-1) if rng.random() < 0.5 else pixels
        pixels = pixels[rng.sample(range(3), 3)] if rng.random() < 0.5 else pixels
        if rng.random() < 0.3:
            pixels = (pixels * rng.uniform(0.5, 1.4) + rng.uniform(-0.4, 0.4)).clamp(-1, 1)
        for _ in range(rng.choice([0, 0, 0, 1])):
            top, left = rng.randrange(size), rng.randrange(size)
            colour = torch.tensor([rng.uniform(-1, 1) for _ in range(3)])
            pixels[:, top : top + rng.randint(4, size // 2), left : left + rng.randint(4, size // 2)] = colour[
                :, None, None
            ]
        crops.append(pixels)
    return torch.stack(crops)


@torch.no_grad()
def standardise_latents(vae: QwenImageVAE, pixels: torch.Tensor) -> None:
    """Folds z -> (z - m) / s into `quant_conv` and its inverse into `post_quant_conv`, per normalised channel."""
    latents = vae.encode(pixels)
    m, s = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    mean, std = vae.mean.flatten(), 1 / vae.std.flatten()
    a, b = 1 / s, mean - (mean + std * m) / s  # in raw latents: new = a * raw + b
    conv, post = vae.quant_conv, vae.post_quant_conv
    conv.weight[:16] *= a.view(-1, 1, 1, 1)
    conv.bias[:16] = conv.bias[:16] * a + b
    conv.weight[16:], conv.bias[16:] = 0, 2 * math.log(LATENT_NOISE)  # a constant log-variance for whoever samples
    post.bias -= post.weight[:, :, 0, 0] @ (b / a)
    post.weight /= a.view(1, -1, 1, 1)


@torch.no_grad()
def psnr(vae: QwenImageVAE, picture: Image.Image, size: int = 256) -> float:
    """Round-trip PSNR in dB of the central square at `size` pixels."""
    square = TF.center_crop(picture, [min(picture.size)] * 2).resize((size, size), Image.Resampling.LANCZOS)
    pixels = TF.to_image(square).float()[None] / 127.5 - 1
    error = (vae.decode(vae.encode(pixels)).clamp(-1, 1) - pixels) / 2
    return (-10 * error.square().mean().log10()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--out", type=Path, default=Path("scripts/tiny/vae.safetensors"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    pictures = [photographs.load(path) for path in photographs.TRAIN]
    vae = build_vae(read_config("vae"))
    published = vae.state_dict()
    initialise(vae)
    use_single_frame(vae)
    used = [p for name, p in vae.named_parameters() if "time_conv" not in name]  # video only
    matrices = [p for p in used if p.ndim >= 4 and min(p.shape[:2]) > 1]
    vectors = [p for p in used if not (p.ndim >= 4 and min(p.shape[:2]) > 1)]
    optimizers = [Muon(matrices, lr=0.05), torch.optim.AdamW(vectors, lr=2e-3, betas=(0.9, 0.99), weight_decay=0)]
    peaks = [0.05, 2e-3]
    start, step = time.time(), 0
    while (spent := (time.time() - start) / (60 * args.minutes)) < 1:
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * min(1, (step + 1) / 50) * max(1 - spent, 0.01)
        pixels = batch_of_crops(pictures, *((64, 8) if spent < 0.75 else (128, 2)), rng)
        latents = vae.encode(pixels)
        error = vae.decode(latents + LATENT_NOISE * torch.randn_like(latents)) - pixels
        loss = error.square().mean() + 1e-4 * latents.square().mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if step % 200 == 0:
            held_out = [round(psnr(vae, photographs.load(path)), 2) for path in photographs.HELD_OUT]
            print(f"step {step} {spent:.0%} mse {error.square().mean().item():.4f} held out {held_out} dB", flush=True)

    standardise_latents(vae, batch_of_crops(pictures, 128, 64, rng))
    vae = vae.to(torch.bfloat16).float()
    print("held out, bf16 weights:", [round(psnr(vae, photographs.load(p)), 2) for p in photographs.HELD_OUT])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    weights = video_weights(vae.state_dict(), layout=published)
    save_file({name: tensor.to(torch.bfloat16).contiguous() for name, tensor in weights.items()}, args.out)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB, {step} steps in {(time.time() - start) / 60:.1f} min")


if __name__ == "__main__":
    main()
