"""A request's images and instruction -> what a sampler needs, sized exactly as the cache does it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from PIL import Image
from torch import Tensor

from data_prep.cache.batches import pad_condition
from data_prep.cache.encoding import encode_white
from data_prep.model.geometry import Geometry, Size, mask_to_latent, to_pixels
from data_prep.rows.rows import EMPTY_PROMPT
from eval.qwen.control import Strengthened
from eval.qwen.frame import Frame
from eval.qwen.samplers import Keep, Velocity
from eval.qwen.weights.components import Encoders
from eval.request.provenance import pixel_digest
from eval.request.recent import Recent
from losses.batch import Condition, Edit, Scene, join_scenes

EMBEDDING_BYTES = 256 * 2**20
"""Bytes of latents and embeddings that are kept, on the denoiser's device: those of about 20 requests at one megapixel."""


@dataclass(frozen=True)
class Encoded:
    """One request, for pictures of one size."""

    edit: Edit
    """B = 1, conditioned on all images and maps."""
    keep: Keep | None
    empty: Condition | None = None
    """Without an instruction, where that is asked for."""
    strengths: Sequence[float] = ()
    """Strengths of the control maps, if they are not all 1. Then `edit` is without maps, and `controlled` has the conditions with
    each map alone: for `edit.condition`, and for `edit.negative` if there is one."""
    controlled: Sequence[Sequence[Condition]] = ()

    def velocity(self, denoiser: Velocity) -> Velocity:
        """The denoiser, in which maps count as their strengths say."""
        for base, each in zip((self.edit.condition, self.edit.negative), self.controlled, strict=False):
            assert base
            denoiser = Strengthened(denoiser, base, each, self.strengths)
        return denoiser


@dataclass(frozen=True)
class _Picture:
    """An image, what identifies its pixels, and whether all of it is shown where its shape is not that of its size."""

    image: Image.Image
    digest: str
    whole: bool = False


def kept_embeddings() -> Recent[Tensor]:
    """Room for what requests are encoded to, so that the same contents are not encoded again."""
    return Recent(EMBEDDING_BYTES, lambda tensor: tensor.nbytes)


class RequestEncoder:
    """Encodes images and instructions, each once, whatever number of conditions and requests they are in.

    Args:
        encoders: gives the two frozen encoders; called when there is something to encode.
        geometry: sizes of images.
        device: where latents and embeddings go.
        kept: what the same encoders have made before, by the contents.
    """

    def __init__(
        self,
        encoders: Callable[[], Encoders],
        geometry: Geometry,
        device: torch.device,
        kept: Recent[Tensor] | None = None,
    ):
        self.encoders, self.geometry, self.device = encoders, geometry, device
        self.kept = kept or kept_embeddings()

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
        white: bool = False,
        bridge_image: int = 0,
        changed: Image.Image | None = None,
        whole: bool = False,
    ) -> Encoded:
        """Encodes one request.

        Args:
            images: the source and further references.
            negative_prompt: None where no negative condition is needed.
            size: size of the result.
            mask: at that size.
            maps: control maps, given as further references.
            strengths: strengths of the maps, 1 as they are.
            empty: also encode the condition without an instruction.
            white: also encode a white canvas, from which the sub stream starts.
            bridge_image: the source's place among the images.
            changed: the mask as a dataset would have it, at the result's size, 255 where the edit is: for modules beside the
                transformer, as the mask of a training row.
            whole: the source is continued by its mirror image where its shape is not that of its size, and not cropped.
        """
        pictures, extras = ([_Picture(image, pixel_digest(image)) for image in some] for some in (images, maps))
        source = pictures[bridge_image] = replace(pictures[bridge_image], whole=whole)
        sizes = reference_sizes(images, size, self.geometry, bridge_image)
        own = [(each, self._reference(each, its_size)) for each, its_size in zip(pictures, sizes, strict=True)]
        extra = [
            (each, self._reference(each, reference_sizes([each.image], size, self.geometry)[0])) for each in extras
        ]
        source_latents = self._image(source, size)
        weighed = any(strength != 1 for strength in strengths)
        references = own if weighed else own + extra
        prompts = [prompt] if negative_prompt is None else [prompt, negative_prompt]
        canvas = self._white(size) if white else None
        background = None if changed is None else 1 - mask_to_latent(changed)[None].to(self.device)
        scene = Scene(source_latents, canvas, background)
        conditions = [self._condition(each, references, scene) for each in prompts]
        controlled = (
            [[self._condition(each, [*own, one], scene) for one in extra] for each in prompts] if weighed else []
        )
        return Encoded(
            edit=Edit(source_latents, canvas, conditions[0], conditions[1] if conditions[1:] else None, ["edit"]),
            keep=None if mask is None else Keep(source_latents, mask_to_latent(mask)[None].to(self.device)),
            empty=self._condition(EMPTY_PROMPT, references, scene) if empty else None,
            strengths=strengths,
            controlled=controlled,
        )

    def _image(self, picture: _Picture, size: Size) -> Tensor:
        """Latents (1, 16, h, w) of what is edited."""
        frame = Frame.around(Size.of(picture.image), size) if picture.whole else Frame(size, size)
        return self.kept.get(
            ("image", picture.digest, size, frame.inner), lambda: self._latents(frame.place(picture.image))
        )

    def _reference(self, picture: _Picture, size: Size) -> Tensor:
        """Latents (1, 16, h, w) of what is looked at."""
        if type(self.geometry) is Geometry:
            return self._image(picture, size)
        return self.kept.get(
            ("reference", picture.digest, size),
            lambda: self._latents(self.geometry.reference_picture(picture.image, size)),
        )

    def _latents(self, image: Image.Image) -> Tensor:
        return self.encoders().vae.encode(to_pixels(image)[None]).to(self.device)

    def _white(self, size: Size) -> Tensor:
        """Latents (1, 16, h, w)."""
        return self.kept.get(("white", size), lambda: encode_white(size, self.encoders().vae)[None].to(self.device))

    def _condition(self, prompt: str, references: Sequence[tuple[_Picture, Tensor]], scene: Scene) -> Condition:
        sizes = [self.geometry.vision_size(Size.of(picture.image)) for picture, _ in references]
        seen = [(picture.digest, size) for (picture, _), size in zip(references, sizes, strict=True)]

        def embed() -> Tensor:
            vision = [
                self.geometry.vision_picture(picture.image, size)
                for (picture, _), size in zip(references, sizes, strict=True)
            ]
            return self.encoders().prompt_encoder.encode(prompt, vision).to(self.device)

        prompt_emb = self.kept.get(("prompt", type(self.geometry), prompt, *seen), embed)
        return pad_condition([prompt_emb], [latents for _, latents in references], scene).to(self.device)


def reference_sizes(images: Sequence[Image.Image], size: Size, geometry: Geometry, bridge_image: int = 0) -> list[Size]:
    """The sizes at which references are given to the VAE: the source, `bridge_image`, at the result's size as in training."""
    sizes = [geometry.reference_size(Size.of(image)) for image in images]
    if geometry.source_follows(Size.of(images[bridge_image]), size):
        sizes[bridge_image] = size
    return sizes


def join_edits(edits: Sequence[Edit]) -> Edit:
    """Edits of one size as one, B = the sum of theirs; instructions are padded, which changes nothing."""
    negatives = [each.negative for each in edits if each.negative]
    whites = [each.sub_noise for each in edits if each.sub_noise is not None]
    return Edit(
        source_latents=torch.cat([each.source for each in edits]),
        sub_noise=torch.cat(whites) if len(whites) == len(edits) else None,
        condition=join_conditions([each.condition for each in edits]),
        negative=join_conditions(negatives) if len(negatives) == len(edits) else None,
        ids=list(chain.from_iterable(each.ids for each in edits)),
    )


def join_conditions(conditions: Sequence[Condition]) -> Condition:
    """Conditions with references of the same sizes as one."""
    prompts = [row for each in conditions for row in each.prompt_emb]
    latents = [torch.cat(several) for several in zip(*(each.edit_latents for each in conditions), strict=True)]
    joined = pad_condition(prompts, latents, join_scenes([each.scene for each in conditions if each.scene]))
    return replace(joined, prompt_emb_mask=joined.prompt_emb_mask.to(joined.prompt_emb.device))
