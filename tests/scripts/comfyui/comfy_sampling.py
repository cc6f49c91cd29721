"""The arithmetic of ComfyUI's sampling, written anew from its source for the nodes' tests (no ComfyUI runs here).

`SamplerCustomAdvanced.execute` (comfy_extras/nodes_custom_sampler.py, commit 4be318aa), `CFGGuider.inner_sample` and
`KSAMPLER.sample` (comfy/samplers.py, 311c0140), `CONST` and `ModelSamplingFlux` (comfy/model_sampling.py, 2fd20839), `Wan21`
(comfy/latent_formats.py, 75399d78: the format of Qwen-Image), `sample_euler` (comfy/k_diffusion/sampling.py).
"""

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace

import torch
from torch import Tensor


class Wan21:
    """Latents minus the mean, over the standard deviation, channel by channel."""

    latent_channels, latent_dimensions = 16, 3

    def __init__(self, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.mean = torch.randn(1, 16, 1, 1, 1, generator=generator)
        self.std = 1 + 2 * torch.rand(1, 16, 1, 1, 1, generator=generator)

    def process_in(self, latents: Tensor) -> Tensor:
        return (latents - self.mean) / self.std

    def process_out(self, latents: Tensor) -> Tensor:
        return latents * self.std + self.mean


class Const:
    """Flow: x = sigma * noise + (1 - sigma) * latents, and the model's output is the velocity."""

    def __init__(self, noise_scale: float | None = None):
        if noise_scale is not None:  # ModelSamplingFlux has none
            self.noise_scale = noise_scale

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latents: Tensor) -> Tensor:
        return sigma * (getattr(self, "noise_scale", 1.0) * noise) + (1 - sigma) * latents

    def denoised(self, sigma: Tensor, output: Tensor, x: Tensor) -> Tensor:
        return x - output * sigma


class Model:
    """A MODEL: what `ModelPatcher.get_model_object` gives of it."""

    def __init__(self, velocity: Callable[[Tensor, float], Tensor], noise_scale: float | None = None):
        self.velocity, self.seen = velocity, []
        self.objects = {"latent_format": Wan21(), "model_sampling": Const(noise_scale)}
        self.objects["process_latent_in"] = self.objects["latent_format"].process_in

    def get_model_object(self, name: str):
        return self.objects[name]


def sample_custom_advanced(
    noise, model: Model, sigmas: Tensor, latent: dict, noise_mask: Tensor | None = None
) -> Tensor:
    """`SamplerCustomAdvanced` with `BasicGuider` and the sampler `euler`: latents as the VAE has them."""
    wan, sampling = model.objects["latent_format"], model.objects["model_sampling"]
    assert isinstance(noise.seed, int)  # it is given to the guider
    drawn = noise.generate_noise(latent).to(torch.float32)
    image = latent["samples"]
    assert drawn.shape == image.shape
    if torch.count_nonzero(image) > 0:
        image = wan.process_in(image)
    x = sampling.noise_scaling(sigmas[0], drawn, image)
    for sigma, after in pairwise(sigmas):
        seen = x
        if noise_mask is not None:
            seen = x * noise_mask + sampling.noise_scaling(sigma, drawn, image) * (1 - noise_mask)
        model.seen.append(SimpleNamespace(x=seen.clone(), sigma=float(sigma)))
        denoised = sampling.denoised(sigma, model.velocity(seen, float(sigma)), seen)
        if noise_mask is not None:
            denoised = denoised * noise_mask + image * (1 - noise_mask)
        x = x + (x - denoised) / sigma * (after - sigma)
    return wan.process_out(x / (1 - sigmas[-1]))
