"""What a loss and a sampler are given: latents and their condition, for several records of one bucket."""

from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor


def _move(value, device: torch.device | str | None, dtype: torch.dtype | None):
    """Tensors to `device`, floating ones also to `dtype`; through lists and nested records; the rest as it is."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, list):
        return [_move(item, device, dtype) for item in value]
    return value.to(device, dtype) if isinstance(value, _Record) else value


class _Record:
    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """A copy on `device`, its floating tensors in `dtype`."""
        return replace(self, **{f.name: _move(getattr(self, f.name), device, dtype) for f in fields(self)})  # type: ignore[type-var]


@dataclass
class Condition(_Record):
    """What the velocity is conditioned on.

    Attributes:
        prompt_emb: hidden states of instruction and images, right-padded, (B, L, D).
        prompt_emb_mask: True for real tokens, (B, L).
        edit_latents: normalised VAE latents of the references, each (B, 16, h_i, w_i); none for text to image.
    """

    prompt_emb: Tensor
    prompt_emb_mask: Tensor
    edit_latents: list[Tensor]

    def take(self, places: Tensor) -> "Condition":
        """The condition of the samples at these places of the batch, (B',)."""
        latents = [each[places] for each in self.edit_latents]
        return Condition(self.prompt_emb[places], self.prompt_emb_mask[places], latents)


@dataclass
class Edit(_Record):
    """What a sampler needs.

    Attributes:
        source_latents: the bridge's start image at the target's size, (B, 16, h, w); None for text to image.
        sub_noise: latents of pure white at the target's size, (B, 16, h, w); None where nothing starts there.
        condition: instruction and references.
        negative: the same without the instruction, for classifier-free guidance, or None.
        ids: of the rows, B strings.
    """

    source_latents: Tensor | None
    sub_noise: Tensor | None
    condition: Condition
    negative: Condition | None
    ids: list[str]

    @property
    def source(self) -> Tensor:
        """`source_latents`, where there must be some."""
        assert self.source_latents is not None, "text to image has no source"
        return self.source_latents


@dataclass
class Batch(Edit):
    """What a loss needs.

    Attributes:
        sub_noise: as of `Edit`; never None.
        target_latents: (B, 16, h, w).
        mask: 1 where the background must stay, 0 where the edit is, (B, 1, h, w), or None without masks.
    """

    sub_noise: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]
    target_latents: Tensor
    mask: Tensor | None
