"""The two encoders on a device of their own, and the VAE in tiles; what they return is on the denoiser's device."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from data_prep.errors import BadPrompt
from data_prep.model.encoders import VAE, PromptEncoder

TILE = 64
"""Side of a tile, in latent cells of 8 pixels."""
STRIDE = 48
"""From tile to tile; over the 16 cells (128 pixels) in between, one fades into the other."""
SCALE = 8


class PlacedVAE(VAE):
    """A VAE that returns its numbers on another device.

    Args:
        vae: what it does the work with.
        device: device of what is returned.
        tiled: work in tiles, so that memory does not grow with the picture.
    """

    def __init__(self, vae: VAE, device: torch.device, tiled: bool):
        super().__init__(vae.module)
        self.device, self.tiled = device, tiled

    def encode(self, pixels: Tensor) -> Tensor:
        """As `VAE.encode`."""
        if not self.tiled:
            return super().encode(pixels).to(self.device)
        pixels = pixels.to(self._weight.device, torch.float32)  # in which tiles are blended
        return self.module.tiled_forward(super().encode, pixels, TILE, STRIDE, SCALE, 1).to(self.device)

    def decode(self, latents: Tensor) -> Tensor:
        """As `VAE.decode`."""
        if not self.tiled:
            return super().decode(latents).to(self.device)
        latents = latents.to(self._weight.device, torch.float32)
        return self.module.tiled_forward(super().decode, latents, TILE, STRIDE, 1, SCALE).to(self.device)


class PlacedPromptEncoder(PromptEncoder):
    """A prompt encoder that returns its embeddings on another device."""

    def __init__(self, encoder: PromptEncoder, device: torch.device):
        super().__init__(encoder.model, encoder.processor, encoder.edition)
        self.device = device

    def encode(self, prompt: str, images: Sequence[Image.Image]) -> Tensor:
        """As `PromptEncoder.encode`."""
        return super().encode(prompt, images).to(self.device)

    def encode_batches(
        self, requests: Sequence[tuple[str, Sequence[Image.Image]]], batch_size: int
    ) -> list[Tensor | BadPrompt]:
        """As `PromptEncoder.encode_batches`."""
        found = super().encode_batches(requests, batch_size)
        return [each if isinstance(each, BadPrompt) else each.to(self.device) for each in found]
