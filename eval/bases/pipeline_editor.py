"""What the editors of these base models share: loading when needed, one call a picture, progress, settings."""

import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from data_prep.errors import InputError
from data_prep.model.directory import ModelDirectory
from data_prep.model.geometry import Geometry
from eval.bases.abilities import Base
from eval.bases.loading import check_placement, pipeline_folder
from eval.bases.lora import check_adapter, use_adapters
from eval.qwen.frame import Frame
from eval.qwen.masks import Kept
from eval.qwen.modes import check_request, keeps_size, result_size
from eval.request.base import BaseEditor
from eval.request.knobs import AdapterUse
from eval.request.metadata import AdapterState, adapter_state, describe_adapters
from eval.request.placement import Placement
from eval.request.provenance import NOTICE, pixel_digest
from eval.request.request import EditRequest, EditResult, OnProgress
from eval.request.sizes import SizeLimits
from train.record.provenance import versions

AfterStep = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]
"""`callback_on_step_end(pipeline, step, timestep, tensors)`."""


@dataclass(frozen=True)
class Call:
    """One call of a pipeline, but for the seed."""

    arguments: dict[str, Any]
    """By the names of the pipeline's `__call__`."""
    frame: Frame
    """The part of what it computes that becomes the picture."""
    sampled: dict[str, Any]
    """How it is sampled, in our words, for the result's settings."""
    negative_prompt: str | None = None
    """What guidance leads away from, if anything."""
    kept: Kept | None = None
    """What the edited part is put into."""


class PipelineEditor(BaseEditor):
    """Edits images with a pipeline of diffusers, which is loaded for the first edit.

    Args:
        model: a folder in diffusers' layout, or a hub id, which is downloaded for the first edit.
        base: which of the bases it is.
        placement: where it lives, and in which numbers.
        geometry: sizes of images; by default those that the base was trained at.
        limits: sizes that take the geometry's place.

    Raises:
        InputError: the placement asks for what these bases do not have.
    """

    def __init__(self, model: str, base: Base, placement: Placement, geometry: Geometry | None, limits: SizeLimits):
        check_placement(placement, base.name)
        self.model, self.base, self.placement = model, base, placement
        self.abilities, self.geometry, self.limits = (
            base.abilities,
            limits.applied_to(geometry or base.geometry),
            limits,
        )
        self._pipeline: Any = None
        self._adapters: AdapterState | None = ()

    def check(self, request: EditRequest) -> None:
        """Reads the adapters' headers, and no weights."""
        super().check(request)
        if request.sizing:
            raise InputError(f"{self.base.name} has its own sizes: leave out geometry={request.sizing}")
        check_request(request, Frame.of(request, result_size(request, self.sizes(request))).inner)
        for use in request.adapters:
            check_adapter(use.path, self.base.name)

    def geometry_for(self, adapters: Sequence[AdapterUse]) -> Geometry:
        """The base's, whatever the adapters."""
        return self.geometry

    def sizes(self, request: EditRequest) -> Geometry:
        """Sizes of the request's images."""
        return self.limits.applied_to(request.geometry) if request.geometry else self.geometry

    def compared_steps(self, request: EditRequest) -> tuple[int, ...]:
        """The base's own count."""
        return (self.base.steps,)

    def edit(self, request: EditRequest, on_progress: OnProgress | None = None) -> list[EditResult]:
        """One call of the pipeline after the other: what a seed gives does not depend on the others."""
        self.check(request)
        call = self._call(request)
        self._pipeline = self._ready(request, self._pipeline)
        self._use_adapters(request)
        settings = self._settings(request, call)
        return [
            self._picture(call, settings | {"seed": seed}, seed, _after_step(on_progress, number, request.count))
            for number, seed in enumerate(request.seeds)
        ]

    @abstractmethod
    def _call(self, request: EditRequest) -> Call:
        """What the pipeline is asked for a request that was checked."""

    @abstractmethod
    def _ready(self, request: EditRequest, pipeline: Any) -> DiffusionPipeline:
        """The pipeline that suits the request, made of the one that there is, or loaded if that is None."""

    @cached_property
    def folder(self) -> Path:
        """Where the model's files are."""
        return pipeline_folder(self.model)

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of all its components' folders."""
        parts = (path.name for path in self.folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        return ModelDirectory(self.folder).fingerprint(*sorted(parts))

    def _use_adapters(self, request: EditRequest) -> None:
        """Only what changes is read."""
        state = adapter_state(request.adapters)
        if self._adapters == state:
            return
        self._adapters = None  # unknown, if what follows fails
        use_adapters(self._pipeline, request.adapters, self.base.name)
        self._adapters = state

    def _picture(self, call: Call, settings: dict[str, Any], seed: int, after_step: AfterStep) -> EditResult:
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same picture on every device
        try:
            output = self._pipeline(**call.arguments, generator=generator, callback_on_step_end=after_step)
        except BaseException:
            self._pipeline.maybe_free_model_hooks()  # as after a whole edit: nothing stays on the device
            raise
        image = call.frame.crop(output.images[0])
        if call.kept:
            image = call.kept.with_edit(image)
        flagged = getattr(output, "nsfw_content_detected", None)
        if flagged is not None:
            settings["flagged"] = bool(flagged[0])
        settings |= {"width": image.width, "height": image.height}
        return EditResult(image, seed, time.perf_counter() - start, settings)

    def _settings(self, request: EditRequest, call: Call) -> dict[str, Any]:
        """Everything but the images and the seed that makes the pictures again, and what made them."""
        size = call.frame.size
        own = {
            "computed_size": None if call.frame.is_full else [size.width, size.height],
            "negative_prompt": call.negative_prompt,
            "feather": request.rim if request.mask else None,
            "focus": asdict(request.focus) if request.focus else None,
            "mask_digest": pixel_digest(request.mask) if request.mask else None,
            "original_size": keeps_size(request) or None,
        }
        return {
            "notice": NOTICE,
            "base": self.base.name,
            "model": self.model,
            "model_fingerprint": self.fingerprint,
            "adapters": describe_adapters(request.adapters),
            "mode": request.mode,
            "prompt": request.prompt,
            **{name: value for name, value in own.items() if value is not None},
            "steps": call.arguments["num_inference_steps"],
            "sampler": {"name": type(self._pipeline.scheduler).__name__, **call.sampled},
            "geometry": asdict(self.sizes(request)),
            "image_digests": [pixel_digest(each) for each in request.images],
            **self.placement.numbers,
            "versions": versions("torch", "diffusers", "transformers"),
        }


def _after_step(on_progress: OnProgress | None, number: int, count: int) -> AfterStep:
    """Counts the steps of all calls; picture `number` of `count` is being made."""

    def after_step(pipeline: Any, step: int, _: Any, __: dict[str, Any]) -> dict[str, Any]:
        if on_progress:
            steps = pipeline.num_timesteps
            on_progress(number * steps + step + 1, count * steps)
        return {}

    return after_step
