"""Stable Diffusion behind a request: a picture walked part of the way again, or painted anew inside a mask."""

from typing import Any

from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import StableDiffusionImg2ImgPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint import StableDiffusionInpaintPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img import (
    StableDiffusionXLImg2ImgPipeline,
)
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_inpaint import (
    StableDiffusionXLInpaintPipeline,
)
from PIL import Image

from data_prep.errors import InputError
from data_prep.model.geometry import Geometry, Size, fit_mask
from eval.bases.abilities import BASES
from eval.bases.loading import changed_to, load_sd15, load_sdxl
from eval.bases.pipeline_editor import Call, PipelineEditor
from eval.qwen.frame import Frame
from eval.qwen.modes import edit_mask, kept_part, result_size
from eval.request.placement import Placement
from eval.request.request import DEFAULT_STRENGTHS, EditRequest
from eval.request.sizes import NO_LIMITS, SizeLimits

CLASSES = {
    "sd15": (StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, load_sd15),
    "sdxl": (StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline, load_sdxl),
}
MASK_MODES = ("inpaint", "focus")
MASK_CHANNELS = 9
"""Input channels of a UNet that reads the latents (4), a mask (1) and the masked picture's latents (4)."""


class StableDiffusionEditor(PipelineEditor):
    """`steps` divide the whole way; a strength below 1 walks that share of it, in as many steps fewer.

    Args:
        model, placement, geometry, limits: as `PipelineEditor`.
        base: `sd15`, `sdxl`, or one of them with `-inpaint`.
    """

    def __init__(
        self,
        model: str,
        base: str,
        placement: Placement,
        geometry: Geometry | None = None,
        limits: SizeLimits = NO_LIMITS,
    ):
        super().__init__(model, BASES[base], placement, geometry, limits)
        self._whole, self._masked, self._load = CLASSES[base.removesuffix("-inpaint")]

    def check(self, request: EditRequest) -> None:
        """Reads the adapters' headers, and no weights."""
        super().check(request)
        steps, strength = self._steps(request), _strength(request)
        if int(steps * strength) < 1:
            raise InputError(f"strength={strength} of {steps} steps is less than one step: raise one of them")

    def _steps(self, request: EditRequest) -> int:
        return request.steps or self.base.steps

    def _call(self, request: EditRequest) -> Call:
        frame = Frame.of(request, size := result_size(request, self.sizes(request)))
        source, mask = frame.place(request.images[0]), edit_mask(request, frame.inner)
        mask = mask and frame.extend(mask)
        negative = request.negative_prompt if request.negative_prompt.strip() else None
        guides = bool(request.prompt.strip() or negative)  # else there is nothing to lead to or away from
        scale = request.cfg_scale or (self.base.cfg_scale if guides else 1.0)
        strength = _strength(request)
        arguments = {
            "image": source,
            "prompt": request.prompt,
            "negative_prompt": negative,
            "num_inference_steps": self._steps(request),
            "guidance_scale": scale,
            "strength": strength,
        }
        if mask:
            arguments |= {"mask_image": _in_cells(mask), "height": size.height, "width": size.width}
        sampled = {"cfg_scale": scale, "strength": strength}
        kept = kept_part(request, frame.inner)
        return Call(arguments, frame, sampled, negative if scale > 1 else None, kept)

    def _ready(self, request: EditRequest, pipeline: Any) -> DiffusionPipeline:
        masked = request.mode in MASK_MODES
        cls = self._masked if masked else self._whole
        if pipeline is None:
            pipeline = self._load(self.folder, self.placement, masked)
        elif not isinstance(pipeline, cls):
            pipeline = changed_to(cls, pipeline, self.placement)
        if masked and pipeline.unet.config.in_channels != MASK_CHANNELS:  # that one was trained with hard masks
            pipeline.mask_processor = soft_processor(pipeline.vae_scale_factor)
        return pipeline


def soft_processor(vae_scale_factor: int) -> VaeImageProcessor:
    """Upstream's mask processor, but for its threshold: latents are blended softly at every step."""
    return VaeImageProcessor(
        vae_scale_factor=vae_scale_factor, do_normalize=False, do_binarize=False, do_convert_grayscale=True
    )


def _in_cells(mask: Image.Image) -> Image.Image:
    """The mask with every latent cell's maximum in all of the cell, where upstream would read one pixel of each."""
    return fit_mask(mask, Size.of(mask).latent).resize(mask.size, Image.Resampling.NEAREST)


def _strength(request: EditRequest) -> float:
    return request.strength or DEFAULT_STRENGTHS.get(request.mode, 1.0)
