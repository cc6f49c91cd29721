"""Trains the tiny VAE on photographs and writes scripts/tiny/vae.safetensors (bf16, shipped in the repository).

    python scripts/train_tiny_vae.py [--minutes 20] [--out scripts/tiny/vae.safetensors]

The class is DiffSynth's QwenImageVAE at small width. After training, an affine map folded into the 1x1 convolutions on
both sides of the latents gives every normalised channel mean 0 and standard deviation 1 on the training photographs.
"""

import argparse
import random
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from diffsynth.models.qwen_image_vae import QwenImageCausalConv3d, QwenImageVAE
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms.v2 import functional as TF

from scripts import photographs

TINY_VAE = {"base_dim": 12, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1}
KL_WEIGHT = 2e-5


def conv_of_one_frame(conv: QwenImageCausalConv3d, x: torch.Tensor, cache_x: None = None) -> torch.Tensor:
    """The causal 3-D convolution for a single frame: only its last temporal slice meets data, so a 2-D one is equal."""
    left, _, top, _, _, _ = conv._padding
    frame = F.conv2d(x[:, :, 0], conv.weight[:, :, -1], conv.bias, conv.stride[1:], (top, left))
    return frame.unsqueeze(2)


def batch_of_crops(pictures: list[Image.Image], size: int, count: int, rng: random.Random) -> torch.Tensor:
    """Random crops with flips, shuffled channels and flat colours pasted in. Shape (count, 3, size, size), range [-1, 1]."""
    crops = []
    for _ in range(count):
        crop = photographs.random_crop(rng.choice(pictures), size, rng, smallest=0.2)
        pixels = TF.to_image(crop).float() / 127.5 - 1
        pixels = pixels.flip(-1) if rng.random() < 0.5 else pixels
        pixels = pixels[rng.sample(range(3), 3)]
        if rng.random() < 0.3:
            pixels = (pixels * rng.uniform(0.5, 1.4) + rng.uniform(-0.4, 0.4)).clamp(-1, 1)
        for _ in range(rng.choice([0, 0, 1, 2])):
            top, left = rng.randrange(size), rng.randrange(size)
            colour = torch.tensor([rng.uniform(-1, 1) for _ in range(3)])
            pixels[:, top : top + rng.randint(4, size // 2), left : left + rng.randint(4, size // 2)] = colour[:, None, None]
        crops.append(pixels)
    return torch.stack(crops)


def encode_moments(vae: QwenImageVAE, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance of the normalised latents, each (B, 16, H/8, W/8)."""
    mean, logvar = vae.quant_conv(vae.encoder(pixels.unsqueeze(2))).squeeze(2).chunk(2, dim=1)
    scale = vae.std.squeeze(2)
    return (mean - vae.mean.squeeze(2)) * scale, logvar.clamp(-20, 10) + 2 * scale.log()


@torch.no_grad()
def standardise_latents(vae: QwenImageVAE, pixels: torch.Tensor) -> None:
    """Folds z -> (z - m) / s into `quant_conv` and its inverse into `post_quant_conv`, per normalised channel."""
    latents = vae.encode(pixels)
    m, s = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    mean, std = vae.mean.flatten(), 1 / vae.std.flatten()
    a, b = 1 / s, mean - (mean + std * m) / s  # in raw latents: new = a * raw + b
    conv, post = vae.quant_conv, vae.post_quant_conv
    conv.weight[:16] *= a.view(-1, 1, 1, 1, 1)
    conv.bias[:16] = conv.bias[:16] * a + b
    conv.bias[16:] += 2 * a.log()
    post.bias -= post.weight[:, :, -1, 0, 0] @ (b / a)
    post.weight /= a.view(1, -1, 1, 1, 1)


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
    vae = QwenImageVAE(**TINY_VAE)
    slow_forward, QwenImageCausalConv3d.forward = QwenImageCausalConv3d.forward, conv_of_one_frame
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    start, step = time.time(), 0
    while (spent := (time.time() - start) / (60 * args.minutes)) < 1:
        lr = 2e-3 * min(1, (step + 1) / 200) * max(1 - spent, 0.01)
        optimizer.param_groups[0]["lr"] = lr
        size, count = (64, 16) if spent < 0.5 else (128, 4)
        pixels = batch_of_crops(pictures, size, count, rng)
        mean, logvar = encode_moments(vae, pixels)
        latents = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
        kl = 0.5 * (mean.square() + logvar.exp() - logvar - 1).sum(1).mean()
        error = vae.decode(latents) - pixels
        loss = error.square().mean() + 0.1 * error.abs().mean() + KL_WEIGHT * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 200 == 0:
            print(f"step {step} {spent:.0%} loss {loss.item():.4f} mse {error.square().mean().item():.4f} kl {kl.item():.1f} "
                  f"held out {[round(psnr(vae, photographs.load(p)), 2) for p in photographs.HELD_OUT]} dB", flush=True)  # fmt: skip

    standardise_latents(vae, batch_of_crops(pictures, 128, 64, rng))
    QwenImageCausalConv3d.forward = slow_forward
    vae = vae.to(torch.bfloat16).float()
    print("held out, bf16 weights:", [round(psnr(vae, photographs.load(p)), 2) for p in photographs.HELD_OUT])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in vae.state_dict().items()}
    save_file(weights, args.out)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB, {step} steps in {(time.time() - start) / 60:.1f} min")


if __name__ == "__main__":
    main()
