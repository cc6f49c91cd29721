"""Latents as the transformer's tokens, and back."""

from torch import Tensor

PATCH = 2
"""One token is a 2 x 2 patch of latents."""


def patchify(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h/2 * w/2, 4C): channels first, then the patch's rows and columns."""
    b, c, h, w = latents.shape
    return latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpatchify(tokens: Tensor, h: int, w: int) -> Tensor:
    """The inverse of `patchify`: (B, h/2 * w/2, 4C) -> (B, C, h, w)."""
    b, _, channels = tokens.shape
    grid = tokens.reshape(b, h // 2, w // 2, channels // 4, 2, 2)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(b, channels // 4, h, w)
