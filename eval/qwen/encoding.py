"""A request's images and instruction -> what a sampler needs, sized exactly as the cache does it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from PIL import Image
from torch import Tensor

from data_prep.cache.batches import pad_condition
from data_prep.cache.encoding import encode_white
from data_prep.model.encoders import VAE, PromptEncoder
from data_prep.model.geometry import Geometry, Size, fit, mask_to_latent, stretch, to_pixels
from data_prep.rows.rows import EMPTY_PROMPT
from eval.qwen.control import Strengthened
from eval.qwen.samplers import Keep, Velocity
from losses.batch import Condition, Edit


@dataclass(frozen=True)
class Encoded:
    """One request, for pictures of one size."""

    edit: Edit
    """B = 1, conditioned on all images and maps."""
    source: Image.Image
    """The first image at the result's size."""
    keep: Keep | None
    mask: Image.Image | None
    """At the result's size, 255 where the edit may go."""
    empty: Condition | None = None
    """Without an instruction, where that is asked for."""
    strengths: Sequence[float] = ()
    """Of the control maps, where they are not all 1; then `edit` is without maps, and `controlled` has the conditions with each
    map alone: for `edit.condition`, and for `edit.negative` if there is one."""
    controlled: Sequence[Sequence[Condition]] = ()

    def velocity(self, denoiser: Velocity) -> Velocity:
        """The denoiser, in which maps count as their strengths say."""
        for base, each in zip((self.edit.condition, self.edit.negative), self.controlled, strict=False):
            assert base
            denoiser = Strengthened(denoiser, base, each, self.strengths)
        return denoiser


class RequestEncoder:
    """Encodes images once, whatever number of conditions they are in.

    Args:
        vae, prompt_encoder: the two frozen encoders.
        geometry: sizes of images.
        device: where latents and embeddings go.
    """

    def __init__(self, vae: VAE, prompt_encoder: PromptEncoder, geometry: Geometry, device: torch.device):
        self.vae, self.prompt_encoder, self.geometry, self.device = vae, prompt_encoder, geometry, device

    @torch.no_grad()
    def encode(
        self,
        images: Sequence[Image.Image],
        prompt: str,
        negative_prompt: str | None,
        size: Size,
        mask: Image.Image | None = None,
        maps: Sequence[Image.Image] = (),
        strengths: Sequence[float] = (),
        empty: bool = False,
    ) -> Encoded:
        """Encodes one request.

        Args:
            images: the source and further references.
            negative_prompt: None where no negative condition is needed.
            size: of the result.
            mask: at that size.
            maps: control maps, given as further references.
            strengths: of the maps, 1 as they are.
            empty: also encode the condition without an instruction.
        """
        source = fit(images[0], size)
        sizes = reference_sizes(images, size, self.geometry)
        own = [(image, self._image(fit(image, its_size))) for image, its_size in zip(images, sizes, strict=True)]
        extra = [(image, self._image(fit(image, reference_sizes([image], size, self.geometry)[0]))) for image in maps]
        source_latents = own[0][1] if size == sizes[0] else self._image(source)
        weighed = any(strength != 1 for strength in strengths)
        references = own if weighed else own + extra
        prompts = [prompt] if negative_prompt is None else [prompt, negative_prompt]
        conditions = [self._condition(each, references) for each in prompts]
        controlled = [[self._condition(each, [*own, one]) for one in extra] for each in prompts] if weighed else []
        white = encode_white(size, self.vae)[None].to(self.device)
        return Encoded(
            edit=Edit(source_latents, white, conditions[0], conditions[1] if conditions[1:] else None, ["edit"]),
            source=source,
            keep=None if mask is None else Keep(source_latents, mask_to_latent(mask)[None].to(self.device)),
            mask=mask,
            empty=self._condition(EMPTY_PROMPT, references) if empty else None,
            strengths=strengths,
            controlled=controlled,
        )

    def _image(self, image: Image.Image) -> Tensor:
        return self.vae.encode(to_pixels(image)[None]).to(self.device)

    def _condition(self, prompt: str, references: Sequence[tuple[Image.Image, Tensor]]) -> Condition:
        vision = [stretch(image, self.geometry.vision_size(Size.of(image))) for image, _ in references]
        prompt_emb = self.prompt_encoder.encode(prompt, vision)
        return pad_condition([prompt_emb], [latents for _, latents in references]).to(self.device)


def reference_sizes(images: Sequence[Image.Image], size: Size, geometry: Geometry) -> list[Size]:
    """The sizes at which references are given to the VAE: the first, the source, at the result's size as in training."""
    sizes = [geometry.reference_size(Size.of(image)) for image in images]
    return [size, *sizes[1:]] if geometry.source_follows(Size.of(images[0]), size) else sizes


def join_edits(edits: Sequence[Edit]) -> Edit:
    """Edits of one size as one, B = the sum of theirs; instructions are padded, which changes nothing."""
    negatives = [each.negative for each in edits if each.negative]
    return Edit(
        source_latents=torch.cat([each.source_latents for each in edits]),
        sub_noise=torch.cat([each.sub_noise for each in edits]),
        condition=join_conditions([each.condition for each in edits]),
        negative=join_conditions(negatives) if len(negatives) == len(edits) else None,
        ids=list(chain.from_iterable(each.ids for each in edits)),
    )


def join_conditions(conditions: Sequence[Condition]) -> Condition:
    """Conditions with references of the same sizes as one."""
    prompts = [row for each in conditions for row in each.prompt_emb]
    latents = [torch.cat(several) for several in zip(*(each.edit_latents for each in conditions), strict=True)]
    joined = pad_condition(prompts, latents)
    return replace(joined, prompt_emb_mask=joined.prompt_emb_mask.to(joined.prompt_emb.device))
