"""Qwen-Image-Edit behind a request: what the command line, CSV batches, web page and reports call."""

import time
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image
from torch import Tensor

from data_prep.errors import InputError
from data_prep.model.directory import COMPONENTS, ModelDirectory
from data_prep.model.encoders import VAE
from data_prep.model.geometry import Geometry, Size, fit, to_image
from data_prep.rows.rows import EMPTY_PROMPT, MAX_SOURCES
from eval.qwen.control import make_map
from eval.qwen.depth import DepthSource
from eval.qwen.encoding import Encoded, RequestEncoder, join_conditions, join_edits, reference_sizes
from eval.qwen.masks import paste_back
from eval.qwen.modes import Plan, check_request, edit_mask, make_plan, result_size
from eval.qwen.samplers import Keep, OnStep, describe_sampler
from eval.qwen.weights.components import Components, Placement
from eval.request.base import BaseEditor
from eval.request.metadata import describe_adapters, left_out, read_metadata, trained_geometry
from eval.request.provenance import NOTICE, pixel_digest
from eval.request.request import MASKED, MODES, Abilities, EditRequest, EditResult, OnProgress, SamplerName
from eval.request.sizes import NO_LIMITS, SizeLimits
from losses.randomness import PictureRandom
from train.model.denoiser import Denoiser
from train.record.provenance import versions

BASE_NAME = "qwen-image-edit"


@dataclass(frozen=True)
class Job:
    """A request that has passed all checks, and what follows from it and its adapters' headers."""

    request: EditRequest
    plan: Plan
    geometry: Geometry
    size: Size


class Editor(BaseEditor):
    """Edits images with Qwen-Image-Edit and the adapters that a request names. Parts load when they are first needed.

    Args:
        model: the base model's directory, or a hub id, which is downloaded when its files are first needed.
        placement: where its parts live, and in which numbers.
        geometry: sizes of images; by default the first adapter's own, from its metadata, or else one megapixel.
        depth_model: folder or hub id of a Depth-Anything model, for depth maps; by default as `DepthSource` says.
        limits: sizes that take the place of the geometry's, whatever the adapter.
    """

    abilities = Abilities(BASE_NAME, MODES, MAX_SOURCES, get_args(SamplerName))

    def __init__(
        self,
        model: ModelDirectory | str,
        placement: Placement | None = None,
        geometry: Geometry | None = None,
        depth_model: str | None = None,
        limits: SizeLimits = NO_LIMITS,
    ):
        self.named, self.placement = model, placement or Placement()
        self.geometry, self.limits = geometry, limits
        self.depth = DepthSource(depth_model, self.placement.device, waits=self.placement.offload != "none")

    @cached_property
    def model(self) -> ModelDirectory:
        """The base model's directory."""
        return ModelDirectory.resolve(self.named) if isinstance(self.named, str) else self.named

    @cached_property
    def components(self) -> Components:
        """The model's parts."""
        return Components(self.model, self.placement)

    @property
    def folder(self) -> Path:
        """Where the model's files are."""
        return self.model.path

    @cached_property
    def fingerprint(self) -> str:
        """Of everything that is read of the model."""
        return self.model.fingerprint(*COMPONENTS)

    def identity(self, request: EditRequest) -> dict[str, str]:
        """The depth model's too, where the request needs it."""
        depth = {"depth_model": self.depth.files().fingerprint} if _sees_depth(request) else {}
        return super().identity(request) | depth

    def check(self, request: EditRequest) -> None:
        """Reads the adapters' headers, and no weights."""
        self.prepare(request)

    def notes(self, request: EditRequest) -> Sequence[str]:
        """Of its plan, and of its adapters."""
        return [*self.prepare(request).plan.notes, *left_out(request.adapters)]

    def prepare(self, request: EditRequest) -> Job:
        """How the request will be sampled, and the size of its pictures.

        Raises:
            InputError: it cannot be served.
        """
        self.abilities.check(request)
        if _sees_depth(request):
            self.depth.files()
        headers = [read_metadata(use.path) for use in request.adapters if use.weight != 0]
        if len({header.get("objective", "flow") for header in headers}) > 1:
            raise InputError("the adapters were trained for different objectives, lbm and flow: use them one at a time")
        first = headers[0] if headers else {}
        geometry = self.limits.applied_to(self.geometry or trained_geometry(first))
        size = result_size(request, geometry)
        check_request(request, size)
        return Job(request, make_plan(request, first), geometry, size)

    def edit(self, request: EditRequest, on_progress: OnProgress | None = None) -> list[EditResult]:
        """One picture after the other: what a seed gives does not depend on the others."""
        return self._make([self.prepare(request)], [[(0, seed)] for seed in request.seeds], on_progress)

    def batch_key(self, request: EditRequest) -> Hashable:
        """The same sampler, adapters and sizes. Controls and several pictures go by themselves."""
        job = self.prepare(request)
        if request.controls or request.count > 1:
            return None
        references = tuple(reference_sizes(request.images, job.size, job.geometry))
        return job.plan, tuple(request.adapters), job.size, references, _is_masked(request)

    def edit_together(
        self, requests: Sequence[EditRequest], on_progress: OnProgress | None = None
    ) -> list[list[EditResult]]:
        """All requests in every call of the denoiser."""
        jobs = [self.prepare(request) for request in requests]
        group = [(number, job.request.seed) for number, job in enumerate(jobs)]
        return [[result] for result in self._make(jobs, [group], on_progress)]

    @torch.no_grad()
    def _make(
        self, jobs: Sequence[Job], groups: Sequence[Sequence[tuple[int, int]]], on_progress: OnProgress | None
    ) -> list[EditResult]:
        """Pictures, each the number of its job and a seed; those of one group are sampled together."""
        place, first = self.placement.device, jobs[0]
        clock, adapters = _Clock(place), describe_adapters(first.request.adapters)
        maps = [self._maps(job) for job in jobs]
        with self.components.encoders() as (vae, prompt_encoder), clock:
            encoded = [
                _encode(RequestEncoder(vae, prompt_encoder, job.geometry, place), job, some)
                for job, some in zip(jobs, maps, strict=True)
            ]
        report = _report(on_progress, len(groups) * first.plan.sampler.calls(first.plan.steps))
        with self.components.denoiser(first.request.adapters) as denoiser, clock:
            latents = [self._sample(denoiser, first.plan, encoded, group, report) for group in groups]
        with self.components.vae() as vae, clock:
            images = [image for some in latents for image in _decode(vae, some)]
        pictures = [picture for group in groups for picture in group]
        results = []
        for (number, seed), image in zip(pictures, images, strict=True):
            job, mask = jobs[number], encoded[number].mask
            shown = paste_back(image, encoded[number].source, mask) if mask else image
            settings = self._settings(job, adapters, seed, shown)
            results.append(EditResult(shown, seed, clock.seconds / len(pictures), settings, maps[number]))
        return results

    def _sample(
        self,
        denoiser: Denoiser,
        plan: Plan,
        encoded: Sequence[Encoded],
        group: Sequence[tuple[int, int]],
        report: OnStep,
    ) -> Tensor:
        """Latents of the pictures of one group."""
        several = [encoded[number] for number, _ in group]
        edit = join_edits([each.edit for each in several]) if len(several) > 1 else several[0].edit
        keeps = [each.keep for each in several if each.keep]
        keep = Keep(torch.cat([k.latents for k in keeps]), torch.cat([k.mask for k in keeps])) if keeps else None
        empties = [each.empty for each in several if each.empty]
        own = {"empty": join_conditions(empties)} if empties else {}
        random = PictureRandom([seed for _, seed in group])
        return plan.sampler(several[0].velocity(denoiser), edit, plan.steps, random, report, keep, **own)

    def _maps(self, job: Job) -> list[Image.Image]:
        """Of the first image, one per control, at the size that the VAE is given: reduced afterwards, thin lines would fade."""
        controls, image = job.request.controls, job.request.images[0]
        image = fit(image, reference_sizes([image], job.size, job.geometry)[0])
        with self.depth.model() if _sees_depth(job.request) else nullcontext() as depth:
            return [make_map(control, image, depth) for control in controls]

    def _depth_settings(self) -> dict[str, str]:
        files = self.depth.files()
        return {"path": files.path, "fingerprint": files.fingerprint}

    def _settings(self, job: Job, adapters: list[dict[str, Any]], seed: int, image: Image.Image) -> dict[str, Any]:
        """Everything but the images that makes this picture again, and what made it."""
        request, plan = job.request, job.plan
        own = {
            "negative_prompt": request.negative_prompt if plan.sampler.guided else None,
            "feather": request.rim if request.mode in MASKED else None,
            "focus": asdict(request.focus) if request.focus else None,
            "controls": [asdict(control) for control in request.controls] or None,
            "mask_digest": pixel_digest(request.mask) if request.mask else None,
            "depth_model": self._depth_settings() if _sees_depth(request) else None,
        }
        return {
            "notice": NOTICE,
            "base": BASE_NAME,
            "model": str(self.model.path),
            "model_fingerprint": self.fingerprint,
            "adapters": adapters,
            "mode": request.mode,
            "prompt": request.prompt,
            **{name: value for name, value in own.items() if value is not None},
            "seed": seed,
            "steps": plan.steps,
            "sampler": {"kind": plan.name, **describe_sampler(plan.sampler)},
            "width": image.width,
            "height": image.height,
            "geometry": asdict(job.geometry),
            "image_digests": [pixel_digest(each) for each in request.images],
            **self.placement.numbers,
            "versions": versions("torch", "diffsynth", "transformers"),
        }


def _sees_depth(request: EditRequest) -> bool:
    return any(control.kind == "depth" for control in request.controls)


def _encode(encoder: RequestEncoder, job: Job, maps: Sequence[Image.Image]) -> Encoded:
    request = job.request
    return encoder.encode(
        request.images,
        request.prompt or EMPTY_PROMPT,
        (request.negative_prompt or EMPTY_PROMPT) if job.plan.sampler.guided else None,
        job.size,
        edit_mask(request, job.size),
        maps,
        [control.strength for control in request.controls],
        empty=request.mode == "invert",
    )


def _decode(vae: VAE, latents: Tensor) -> list[Image.Image]:
    """One picture at a time: what a picture becomes does not depend on its batch, and memory stays small."""
    return [to_image(vae.decode(each[None])[0]) for each in latents]


def _is_masked(request: EditRequest) -> bool:
    return request.mode == "focus" or request.mode in MASKED


def _report(on_progress: OnProgress | None, total: int) -> OnStep:
    """Counts the steps of all sampler calls."""
    done = 0

    def on_step(_: int, __: Tensor) -> None:
        nonlocal done
        done += 1
        if on_progress:
            on_progress(done, total)

    return on_step


class _Clock:
    """The seconds spent in all its `with` blocks, the accelerator's work included."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self._start = device, 0.0, 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds += time.perf_counter() - self._start
