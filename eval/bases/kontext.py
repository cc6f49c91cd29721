"""FLUX.1 Kontext behind a request: an instruction and one image."""

from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from data_prep.errors import InputError
from data_prep.model.geometry import Geometry, Size
from eval.bases.abilities import BASES
from eval.bases.loading import load_kontext
from eval.bases.pipeline_editor import Call, PipelineEditor
from eval.qwen.frame import Frame
from eval.qwen.modes import result_size
from eval.request.placement import Placement
from eval.request.request import EditRequest
from eval.request.sizes import NO_LIMITS, SizeLimits


class KontextEditor(PipelineEditor):
    """Its `cfg_scale` is the guidance that was distilled into the model: one call a step. With a negative prompt it is real
    classifier-free guidance, two calls a step, and the distilled one stays at its default.

    The source is shown to the model at the size that the geometry gives it, not stretched to upstream's preferred
    resolutions, so that a picture of the source's shape lies on the source pixel by pixel.
    """

    def __init__(
        self, model: str, placement: Placement, geometry: Geometry | None = None, limits: SizeLimits = NO_LIMITS
    ):
        super().__init__(model, BASES["flux-kontext"], placement, geometry, limits)

    def check(self, request: EditRequest) -> None:
        """Reads the adapters' headers, and no weights."""
        if request.negative_prompt.strip() and request.cfg_scale in (None, 1.0):
            raise InputError(
                "flux-kontext reads a negative prompt only with a cfg_scale above 1, at twice the time: set one, or leave "
                "the negative prompt out"
            )
        super().check(request)

    def _call(self, request: EditRequest) -> Call:
        size = result_size(request, self.sizes(request))
        source = request.images[0]
        negative = request.negative_prompt if request.negative_prompt.strip() else None
        scale = request.cfg_scale or self.base.cfg_scale
        arguments = {
            "image": Frame.of(request, self.sizes(request).reference_size(Size.of(source))).place(source),
            "prompt": request.prompt,
            "num_inference_steps": request.steps or self.base.steps,
            "height": size.height,
            "width": size.width,
            "max_area": size.height * size.width,
            "_auto_resize": False,
            "guidance_scale": self.base.cfg_scale if negative else scale,
        }
        if negative:
            arguments |= {"negative_prompt": negative, "true_cfg_scale": scale}
        return Call(arguments, Frame.of(request, size), {"cfg_scale": scale}, negative)

    def _ready(self, request: EditRequest, pipeline: Any) -> DiffusionPipeline:
        return pipeline or load_kontext(self.folder, self.placement)
