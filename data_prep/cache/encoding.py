"""A row becomes a record: its images are read and sized on worker threads, then encoded in batches of one size."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from data_prep.cache.reader import CacheHeader, bucket_name
from data_prep.cache.shards import to_arrow
from data_prep.errors import BadPrompt
from data_prep.model.geometry import Geometry, Size, background_cells, fit, fit_back_mask, stretch, to_pixels
from data_prep.rows.images import check_mask_shape, open_image, open_mask
from data_prep.rows.rows import EMPTY_PROMPT, Row


class ImageEncoder(Protocol):
    """The VAE."""

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] -> normalised latents (B, 16, H/8, W/8)."""
        ...


class TextEncoder(Protocol):
    """Qwen2.5-VL with the edit template."""

    def encode(self, prompt: str, images: list[Image.Image]) -> Tensor:
        """An instruction and images at their vision size -> hidden states (L, D)."""
        ...


@dataclass
class Encoders:
    """The two frozen models of phase 1."""

    vae: ImageEncoder
    prompt_encoder: TextEncoder


@dataclass
class PreparedRow:
    """A row whose images are read and have their final sizes; pixels are still 8 bits, to be small while they wait."""

    key: str
    row: Row
    target: Image.Image
    source: Image.Image
    """At the target's size. It is `references[bridge_image]` itself when that has the same size."""
    references: list[Image.Image]
    vision: list[Image.Image]
    mask: Tensor | None


def prepare_row(key: str, row: Row, geometry: Geometry) -> PreparedRow:
    """Reads and sizes all images of a row.

    Raises:
        RejectedImage: one of them cannot be used.
    """
    image = open_image(row.image)
    size = geometry.target_size(Size.of(image))
    edit_images = [open_image(path) for path in row.edit_image]
    sizes = geometry.reference_sizes([Size.of(each) for each in edit_images], Size.of(image), row.bridge_image)
    references = [fit(each, its_size) for each, its_size in zip(edit_images, sizes, strict=True)]
    aligned = references[row.bridge_image]
    return PreparedRow(
        key=key,
        row=row,
        target=fit(image, size),
        source=aligned if Size.of(aligned) == size else fit(edit_images[row.bridge_image], size),
        references=references,
        vision=[stretch(each, geometry.vision_size(Size.of(each))) for each in edit_images],
        mask=_prepare_mask(row, image, size) if row.back_mask else None,
    )


def _prepare_mask(row: Row, image: Image.Image, size: Size) -> Tensor:
    assert row.back_mask is not None
    mask = open_mask(row.back_mask)
    check_mask_shape(mask, image, row.back_mask)
    return background_cells(fit_back_mask(mask, size))


@torch.no_grad()
def encode_rows(
    prepared: Sequence[PreparedRow], encoders: Encoders, header: CacheHeader, batch_size: int
) -> list[dict[str, Any] | BadPrompt]:
    """Encodes a few rows: images of one size go through the VAE together, `batch_size` at a time.

    Returns:
        One value of `SHARD_SCHEMA` per row, tensors in the header's dtype, or why its prompts cannot be encoded.
    """
    texts = [_encode_prompts(row, encoders.prompt_encoder, header) for row in prepared]
    good = [row for row, text in zip(prepared, texts, strict=True) if not isinstance(text, BadPrompt)]
    images = [image for row in good for image in (row.target, row.source, *row.references)]
    latents = _encode_images(images, encoders.vae, batch_size)
    return [
        text if isinstance(text, BadPrompt) else _to_values(row, latents, text, header)
        for row, text in zip(prepared, texts, strict=True)
    ]


@torch.no_grad()
def encode_white(size: Size, vae: ImageEncoder) -> Tensor:
    """Latents (16, H/8, W/8) of a pure white image of `size` pixels: the start of the LBM sub stream."""
    return vae.encode(torch.ones(1, 3, *size))[0]


def _encode_images(images: list[Image.Image], vae: ImageEncoder, batch_size: int) -> dict[int, Tensor]:
    """Latents by `id(image)`; an image that appears twice is encoded once."""
    by_size: dict[Size, dict[int, Image.Image]] = {}
    for image in images:
        by_size.setdefault(Size.of(image), {})[id(image)] = image
    latents: dict[int, Tensor] = {}
    for group in by_size.values():
        names = list(group)
        for start in range(0, len(names), batch_size):
            batch = names[start : start + batch_size]
            latents.update(zip(batch, vae.encode(torch.stack([to_pixels(group[name]) for name in batch])), strict=True))
    return latents


def _encode_prompts(
    prepared: PreparedRow, prompt_encoder: TextEncoder, header: CacheHeader
) -> dict[str, Tensor] | BadPrompt:
    """The hidden states of each of the record's prompts, by its column."""
    prompts = {"prompt_emb": prepared.row.prompt}
    if header.caption_dropout:
        prompts["empty_prompt_emb"] = EMPTY_PROMPT
    if header.negative:
        prompts["negative_prompt_emb"] = prepared.row.negative_prompt or EMPTY_PROMPT
    try:
        found = {text: prompt_encoder.encode(text, prepared.vision) for text in dict.fromkeys(prompts.values())}
    except BadPrompt as error:
        return error
    return {name: found[text] for name, text in prompts.items()}


def _to_values(
    prepared: PreparedRow, latents: dict[int, Tensor], embeddings: dict[str, Tensor], header: CacheHeader
) -> dict[str, Any]:
    row, dtype = prepared.row, getattr(torch, header.dtype)
    target = latents[id(prepared.target)]
    edit_latents = [latents[id(image)] for image in prepared.references]
    return {
        "key": prepared.key,
        "id": row.id,
        "bucket": bucket_name(target, edit_latents),
        "target_latents": to_arrow(target.to(dtype)),
        "source_latents": to_arrow(latents[id(prepared.source)].to(dtype)),
        "edit_latents": [to_arrow(each.to(dtype)) for each in edit_latents],
        "mask": None if prepared.mask is None else to_arrow(prepared.mask.to(dtype)),
        **{name: to_arrow(embedding.to(dtype)) for name, embedding in embeddings.items()},
    }
