"""A row becomes records: its images are read and sized on worker threads, then encoded in batches of one size."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from data_prep.cache.keys import Failure
from data_prep.cache.reader import bucket_name
from data_prep.cache.shards import to_arrow
from data_prep.errors import BadPrompt
from data_prep.model.geometry import Geometry, Size, background_cells, fit, fit_back_mask, stretch, to_pixels
from data_prep.rows.augmentation import Pictures
from data_prep.rows.images import RejectedImage, check_mask_shape, open_image, open_mask
from data_prep.rows.rows import Row


class ImageEncoder(Protocol):
    """The VAE."""

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] -> normalised latents (B, 16, H/8, W/8)."""
        ...


class TextEncoder(Protocol):
    """Qwen2.5-VL with the edit template."""

    def encode_many(
        self, requests: Sequence[tuple[str, list[Image.Image]]], batch_size: int
    ) -> list[Tensor | BadPrompt]:
        """Instructions with images at their vision size -> hidden states (L, D) of each, or why there are none."""
        ...


@dataclass
class Encoders:
    """The two frozen models of phase 1."""

    vae: ImageEncoder
    prompt_encoder: TextEncoder


@dataclass
class Lacking:
    """What is to be encoded of a row."""

    row: Row
    latents: str | None
    """Their key; None: they are there."""
    texts: dict[str, str]
    """Key -> instruction."""


@dataclass
class PreparedImages:
    """What the VAE is to see of a row; pixels are still 8 bits, to be small while they wait."""

    target: Image.Image
    source: Image.Image | None
    """At the target's size; None for text to image. It is `references[bridge_image]` itself when that has the same size."""
    references: list[Image.Image]
    mask: Tensor | None

    @property
    def encoded(self) -> tuple[Image.Image, ...]:
        """All of them; one may be there twice."""
        return *filter(None, (self.target, self.source)), *self.references


@dataclass
class PreparedRow:
    """A row whose images are read and have their final sizes."""

    lacking: Lacking
    images: PreparedImages | None
    """None if only texts are lacking, or the target or the mask cannot be used."""
    vision: list[Image.Image] | None
    """What the text encoder sees; None if no text is lacking, or the sources cannot be used."""
    failures: dict[str, Failure]
    """Keys of what cannot be encoded, and why."""


@dataclass
class Encoded:
    """Records of some rows."""

    latents: list[dict[str, Any]]
    """Values of `LATENTS_SCHEMA`."""
    texts: list[dict[str, Any]]
    """Values of `TEXT_SCHEMA`."""
    failures: dict[str, Failure]
    """Keys of instructions that cannot be encoded, and why."""


def prepare_row(lacking: Lacking, geometry: Geometry) -> PreparedRow:
    """Reads and sizes the images of a row. Embeddings do not need the target, unless it decides how sources are cropped: they
    are made though it cannot be used."""
    row, geometry = lacking.row, geometry.within(lacking.row.max_pixels)
    keys = [lacking.latents] if lacking.latents else []
    try:
        references = [open_image(path) for path in row.edit_image]
        pictures = _open_pair(row, references) if row.augmentation else None
    except RejectedImage as error:
        return PreparedRow(lacking, None, None, dict.fromkeys([*keys, *lacking.texts], Failure.of(error)))
    seen, vision = pictures.references if pictures else references, None
    if lacking.texts:
        vision = [stretch(each, geometry.vision_size(Size.of(each))) for each in seen]
    try:
        images = _size_images(pictures or _open_pair(row, references), row, geometry) if lacking.latents else None
    except RejectedImage as error:
        return PreparedRow(lacking, None, vision, dict.fromkeys(keys, Failure.of(error)))
    return PreparedRow(lacking, images, vision, {})


def _open_pair(row: Row, references: list[Image.Image]) -> Pictures:
    """The references with the target and the mask, augmented if the row is."""
    target, mask = open_image(row.image), None
    if row.back_mask:
        mask = open_mask(row.back_mask)
        check_mask_shape(mask, target, row.back_mask)
    if row.augmentation:
        return row.augmentation(target, references, mask, row.bridge_image)
    return Pictures(target, references, mask)


def _size_images(pictures: Pictures, row: Row, geometry: Geometry) -> PreparedImages:
    target, seen, mask = pictures
    size = geometry.target_size(Size.of(target))
    sizes = geometry.reference_sizes([Size.of(each) for each in seen], Size.of(target), row.bridge_image)
    references = [fit(each, its_size) for each, its_size in zip(seen, sizes, strict=True)]
    source = None
    if references:
        aligned = references[row.bridge_image]
        source = aligned if Size.of(aligned) == size else fit(seen[row.bridge_image], size)
    return PreparedImages(
        target=fit(target, size),
        source=source,
        references=references,
        mask=mask and background_cells(fit_back_mask(mask, size)),
    )


@torch.no_grad()
def encode_rows(prepared: Sequence[PreparedRow], encoders: Encoders, dtype: torch.dtype, batch_size: int) -> Encoded:
    """Encodes what a few rows lack: images of one size go through the VAE together, `batch_size` at a time.

    Args:
        dtype: what tensors are stored as.
        batch_size: also for instructions, if the text encoder takes several at once.
    """
    encoded = Encoded([], [], {})
    requests = {
        key: (text, each.vision)
        for each in prepared
        if each.vision is not None
        for key, text in each.lacking.texts.items()
    }
    embeddings = encoders.prompt_encoder.encode_many(list(requests.values()), batch_size)
    for key, embedding in zip(requests, embeddings, strict=True):
        if isinstance(embedding, BadPrompt):
            encoded.failures[key] = Failure("", str(embedding))
        else:
            encoded.texts.append({"key": key, "prompt_emb": to_arrow(embedding.to(dtype))})
    with_images = [(each.lacking, each.images) for each in prepared if each.images]
    latents = _encode_images([image for _, images in with_images for image in images.encoded], encoders.vae, batch_size)
    latents = {name: latent.to(dtype) for name, latent in latents.items()}
    encoded.latents = [_to_values(lacking, images, latents) for lacking, images in with_images]
    return encoded


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


def _to_values(lacking: Lacking, images: PreparedImages, latents: Mapping[int, Tensor]) -> dict[str, Any]:
    target, bridge = latents[id(images.target)], lacking.row.bridge_image
    edit_latents = [latents[id(image)] for image in images.references]
    own_source = images.source is not None and images.source is not images.references[bridge]
    return {
        "key": lacking.latents,
        "bucket": bucket_name(target, edit_latents),
        "target_latents": to_arrow(target),
        "source_latents": to_arrow(latents[id(images.source)]) if own_source else None,
        "edit_latents": [to_arrow(each) for each in edit_latents],
        "bridge_image": bridge,
        "mask": None if images.mask is None else to_arrow(images.mask.to(target.dtype)),
    }
