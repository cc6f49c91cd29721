"""One image edited by one instruction: what the command line, reports and web page call."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from data_prep.encode import encode_white
from data_prep.encoders import MAX_IMAGES, VAE, PromptEncoder, load_prompt_encoder, load_vae
from data_prep.errors import InputError
from data_prep.geometry import MULTIPLE, Geometry, Size, fit, stretch, to_image, to_pixels
from data_prep.images import file_digest
from data_prep.model_dir import ModelDirectory
from eval.metadata import (
    SamplerChoice,
    adapter_file,
    choose_sampler,
    describe_sampler,
    read_metadata,
    trained_geometry,
)
from eval.samplers import OnStep
from losses.batch import Condition, Edit
from losses.randomness import SampleRandom
from train.adapter import load_adapter
from train.denoiser import Denoiser, load_denoiser

NOTICE = "edited by a generative model"


@dataclass(frozen=True)
class EditRequest:
    """What is wanted."""

    prompt: str
    images: Sequence[Image.Image]
    """One to three RGB images; a bridge starts at the first, and the result has its shape."""
    steps: int | None = None
    """Calls of the denoiser; by default 4 for a bridge, 40 for flow matching."""
    seed: int = 0
    negative_prompt: str = " "
    """Read only with classifier-free guidance."""
    cfg_scale: float | None = None
    """Classifier-free guidance of flow matching, 4 by default; a bridge has none."""
    size: Size | None = None
    """Of the result, in multiples of 32; by default as the first image, within the geometry's `max_pixels`."""

    def __post_init__(self):
        if not 1 <= len(self.images) <= MAX_IMAGES:
            raise InputError(f"an edit takes 1 to {MAX_IMAGES} images, got {len(self.images)}")
        if self.steps is not None and self.steps < 1:
            raise InputError(f"steps must be positive, got {self.steps}")
        if self.cfg_scale is not None and self.cfg_scale < 1:
            raise InputError(f"cfg_scale must be at least 1 (1 is without guidance), got {self.cfg_scale}")
        if self.size and (min(self.size) < MULTIPLE or any(side % MULTIPLE for side in self.size)):
            raise InputError(f"size must be in multiples of {MULTIPLE}, got {self.size.width}x{self.size.height}")


@dataclass(frozen=True)
class EditResult:
    """What was made of it."""

    image: Image.Image
    seconds: float
    """From the request to the image, models loaded."""
    settings: dict[str, Any]
    """Everything but the images that is needed to make it again; values that JSON knows."""


class Editor:
    """Edits images with a base model and at most one adapter. Components load when they are first needed.

    Args:
        model: the base model's directory.
        adapter: a checkpoint folder or its safetensors file; None for the base model alone.
        device: where everything runs.
        dtype: of all weights.
        geometry: sizes of images; by default the adapter's own, from its metadata, or else one megapixel.
        strength: multiplies the adapter's contribution.

    Raises:
        InputError: there is no adapter at that path, or it is not one for this model.
    """

    def __init__(
        self,
        model: ModelDirectory,
        adapter: Path | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        geometry: Geometry | None = None,
        strength: float = 1.0,
    ):
        self.model, self.adapter, self.strength = model, adapter and adapter_file(adapter), strength
        self.device, self.dtype = torch.device(device), dtype
        self.metadata = read_metadata(self.adapter) if self.adapter else {}
        """What the adapter says of itself; empty without one."""
        self.geometry = geometry or trained_geometry(self.metadata)

    @cached_property
    def denoiser(self) -> Denoiser:
        """The transformer with the adapter."""
        denoiser = load_denoiser(self.model, self.device, self.dtype)
        if self.adapter:
            load_adapter(denoiser, self.adapter, self.strength)
        return denoiser

    @cached_property
    def vae(self) -> VAE:
        """Images to latents and back."""
        return load_vae(self.model, self.device, self.dtype)

    @cached_property
    def prompt_encoder(self) -> PromptEncoder:
        """Instructions and images to embeddings."""
        return load_prompt_encoder(self.model, self.device, self.dtype)

    @torch.no_grad()
    def edit(self, request: EditRequest, on_step: OnStep | None = None) -> EditResult:
        """Makes the edit. The same request and seed give the same image.

        Raises:
            InputError: the request asks a bridge for classifier-free guidance.
        """
        choice = choose_sampler(self.metadata, request.cfg_scale)
        denoiser, vae, _ = self.denoiser, self.vae, self.prompt_encoder  # loaded before the clock starts
        start = time.perf_counter()
        steps = request.steps or choice.steps
        edit = self.encode(request, guided=choice.guided).to(self.device)
        latents = choice.sampler(denoiser, edit, steps, SampleRandom(request.seed, [0]), on_step)
        image = to_image(vae.decode(latents)[0])
        seconds = time.perf_counter() - start
        return EditResult(image, seconds, self._settings(request, choice, steps, image))

    def encode(self, request: EditRequest, guided: bool) -> Edit:
        """What the sampler needs, one row, sized exactly as the cache does it."""
        geometry, images = self.geometry, request.images
        size = request.size or geometry.target_size(Size.of(images[0]))
        vision = [stretch(image, geometry.vision_size(Size.of(image))) for image in images]
        references = [fit(image, geometry.reference_size(Size.of(image))) for image in images]
        edit_latents = [self._encode_image(image) for image in references]
        aligned = Size.of(references[0]) == size
        return Edit(
            source_latents=edit_latents[0] if aligned else self._encode_image(fit(images[0], size)),
            sub_noise=encode_white(size, self.vae)[None],
            condition=self._condition(request.prompt, vision, edit_latents),
            negative=self._condition(request.negative_prompt, vision, edit_latents) if guided else None,
            ids=["edit"],
        )

    def _encode_image(self, image: Image.Image) -> torch.Tensor:
        return self.vae.encode(to_pixels(image)[None])

    def _condition(self, prompt: str, vision: list[Image.Image], edit_latents: list[torch.Tensor]) -> Condition:
        prompt_emb = self.prompt_encoder.encode(prompt, vision)[None]
        mask = torch.ones(prompt_emb.shape[:2], dtype=torch.bool, device=prompt_emb.device)
        return Condition(prompt_emb, mask, edit_latents)

    @cached_property
    def _provenance(self) -> dict[str, Any]:
        """Base model and adapter, by place and by content."""
        identity = self.model.fingerprint("transformer", "vae", "text_encoder")
        named: dict[str, Any] = {"model": str(self.model.path), "model_fingerprint": identity}
        if self.adapter:
            named |= {"adapter": str(self.adapter), "adapter_digest": file_digest(self.adapter)}
            named |= {"adapter_strength": self.strength}
        return named | {"dtype": str(self.dtype).removeprefix("torch.")}

    def _settings(self, request: EditRequest, choice: SamplerChoice, steps: int, image: Image.Image) -> dict[str, Any]:
        return {
            "notice": NOTICE,
            "prompt": request.prompt,
            **({"negative_prompt": request.negative_prompt} if choice.guided else {}),
            "seed": request.seed,
            "steps": steps,
            "sampler": describe_sampler(choice.sampler),
            "width": image.width,
            "height": image.height,
            "geometry": asdict(self.geometry),
            **self._provenance,
        }
