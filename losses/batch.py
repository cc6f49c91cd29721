"""What a loss and a sampler are given: latents and their condition, for several records of one bucket."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor


def _move(value, device: torch.device | str | None, dtype: torch.dtype | None, moved: dict[int, Tensor]):
    """Tensors to `device`, floating ones also to `dtype`; through lists and nested records; the rest as it is.

    Args:
        moved: by the identity of the original, those that are there already.
    """
    if isinstance(value, Tensor):
        if id(value) not in moved:
            moved[id(value)] = value.to(device, dtype if value.is_floating_point() else None)
        return moved[id(value)]
    if isinstance(value, list):
        return [_move(item, device, dtype, moved) for item in value]
    return value._moved(device, dtype, moved) if isinstance(value, _Record) else value


class _Record:
    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """A copy on `device`, its floating tensors in `dtype`. A tensor that is in several places is moved once."""
        return self._moved(device, dtype, {})

    def _moved(self, device: torch.device | str | None, dtype: torch.dtype | None, moved: dict[int, Tensor]) -> Self:
        return replace(self, **{f.name: _move(getattr(self, f.name), device, dtype, moved) for f in fields(self)})  # type: ignore[type-var]


@dataclass
class Scene(_Record):
    """The places of a picture, for modules beside the transformer (`train.model.extra.ExtraModule`).

    Attributes:
        source_latents: the start image at the target's size, (B, 16, h, w); zeros where there is none.
        sub_noise: latents of pure white at that size, (B, 16, h, w); None where an edit does without.
        mask: 1 where the background must stay, 0 where the edit is, (B, 1, h, w); None without masks, which is as all 0.
    """

    source_latents: Tensor
    sub_noise: Tensor | None = None
    mask: Tensor | None = None

    def take(self, places: Tensor) -> "Scene":
        """The scene of the samples at these places of the batch, (B',)."""
        white, mask = (None if each is None else each[places] for each in (self.sub_noise, self.mask))
        return Scene(self.source_latents[places], white, mask)


def join_scenes(scenes: Sequence[Scene]) -> Scene | None:
    """Scenes of one size as one, B = the sum of theirs; None of none. White is there when all of them have it."""
    if not scenes:
        return None
    whites = [each.sub_noise for each in scenes if each.sub_noise is not None]
    masks = [torch.zeros_like(each.source_latents[:, :1]) if each.mask is None else each.mask for each in scenes]
    return Scene(
        torch.cat([each.source_latents for each in scenes]),
        torch.cat(whites) if len(whites) == len(scenes) else None,
        torch.cat(masks) if any(each.mask is not None for each in scenes) else None,
    )


@dataclass
class Condition(_Record):
    """What the velocity is conditioned on.

    Attributes:
        prompt_emb: hidden states of instruction and images, right-padded, (B, L, D).
        prompt_emb_mask: True for real tokens, (B, L).
        edit_latents: normalised VAE latents of the references, each (B, 16, h_i, w_i); none for text to image.
        scene: what modules beside the transformer see; the transformer does not.
    """

    prompt_emb: Tensor
    prompt_emb_mask: Tensor
    edit_latents: list[Tensor]
    scene: Scene | None = None

    def take(self, places: Tensor) -> "Condition":
        """The condition of the samples at these places of the batch, (B',)."""
        latents = [each[places] for each in self.edit_latents]
        scene = self.scene and self.scene.take(places)
        return Condition(self.prompt_emb[places], self.prompt_emb_mask[places], latents, scene)

    def with_texts(self, places: Tensor, other: "Condition") -> "Condition":
        """The condition in which the samples at these places, (B',), get another's instructions, padded no more than needed."""
        length = max(self.prompt_emb.shape[1], other.prompt_emb.shape[1])
        emb, mask = (
            _padded(mine, length).index_copy(0, places, _padded(theirs, length)[places])
            for mine, theirs in ((self.prompt_emb, other.prompt_emb), (self.prompt_emb_mask, other.prompt_emb_mask))
        )
        used = int(mask.sum(1).max())
        return Condition(emb[:, :used], mask[:, :used], self.edit_latents, self.scene)


def _padded(texts: Tensor, length: int) -> Tensor:
    """(B, L, …) with zeros up to this length."""
    return F.pad(texts, (*(0, 0) * (texts.ndim - 2), 0, length - texts.shape[1]))


@dataclass
class Edit(_Record):
    """What a sampler needs.

    Attributes:
        source_latents: the bridge's start image at the target's size, (B, 16, h, w); None for text to image.
        sub_noise: latents of pure white at the target's size, (B, 16, h, w); None where nothing starts there.
        condition: instruction and references.
        negative: the same without the instruction, for classifier-free guidance, or None.
        ids: ids of the rows, B strings.
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
        preserved: other instructions of the same pictures, for which the base model's answers are kept, without references; or
            None.
    """

    sub_noise: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]
    target_latents: Tensor
    mask: Tensor | None
    preserved: Condition | None = None
