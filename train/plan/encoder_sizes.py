"""What the two encoders take: shapes and no numbers."""

import functools
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

from data_prep.model.encoders import LATENT_CHANNELS, VAE, build_vae, use_single_frame
from data_prep.model.geometry import Size
from train.plan.memory import META, LiveBytes, flash_attention


class EncoderSizes:
    """The VAE and the text encoder of a model directory: shapes and no numbers.

    Args:
        vae, text_encoder: of their `config.json`.
        dtype: data type of their weights.
    """

    def __init__(self, vae: dict, text_encoder: dict, dtype: torch.dtype):
        with META:
            module = build_vae(vae)
        use_single_frame(module)
        self.vae = VAE(module.to(dtype).requires_grad_(False))
        self.vae_bytes = _parameter_bytes(module)
        with init_empty_weights():
            model: Any = Qwen2_5_VLModel(Qwen2_5_VLConfig.from_dict(text_encoder))
        self.text_encoder_bytes = _parameter_bytes(model.to(dtype))
        parts = model.language_model.layers, model.visual
        self._weights = [sum(parameter.numel() for parameter in part.parameters()) for part in parts]
        """Numbers that each token of the text meets, and each patch of an image."""
        self._patches_per_token = model.config.vision_config.spatial_merge_size**2
        self.encode_bytes, self.decode_bytes = functools.cache(self._encode_bytes), functools.cache(self._decode_bytes)

    @torch.no_grad()
    def _encode_bytes(self, size: Size, batch_size: int) -> int:
        """The peak of encoding images of this size."""
        pixels = torch.empty(batch_size, 3, *size, device=META)
        with flash_attention(), LiveBytes() as live:
            self.vae.encode(pixels)
        return live.peak

    def text_flops(self, text_tokens: int) -> int:
        """Operations of one instruction and its images, by 2 for each token and weight; nearly all tokens are the images'."""
        text, vision = self._weights
        return 2 * text_tokens * (text + self._patches_per_token * vision)

    @functools.cached_property
    def flops_per_pixel(self) -> float:
        """Operations of the VAE's encoder, counted on an image of 512 x 512; its one attention layer grows faster."""
        side = 512
        with torch.no_grad(), flash_attention(), FlopCounterMode(display=False) as counter:
            self.vae.encode(torch.empty(1, 3, side, side, device=META))
        return counter.get_total_flops() / side**2

    def _decode_bytes(self, latents: Size, batch_size: int, gradient: bool = False) -> int:
        """The peak of decoding, and with `gradient` of the way back."""
        start = torch.empty(batch_size, LATENT_CHANNELS, *latents, device=META, requires_grad=gradient)
        with torch.set_grad_enabled(gradient), flash_attention(), LiveBytes() as live:
            pixels = self.vae.decode(start)
            if gradient:
                pixels.sum().backward()
        return live.peak


def _parameter_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
