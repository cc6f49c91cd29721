"""Qwen-Image-Edit behind a request: what the command line, CSV batches, web page and reports call."""

import functools
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image
from torch import Tensor

from data_prep.errors import InputError
from data_prep.model.directory import COMPONENTS, INDEX, ModelDirectory
from data_prep.model.editions import Edition
from data_prep.model.encoders import VAE
from data_prep.model.geometry import Geometry, Size, UpstreamGeometry, to_image
from data_prep.model.hub_files import fetch
from data_prep.rows.rows import EMPTY_PROMPT
from eval.qwen.control import make_map
from eval.qwen.depth import DepthSource
from eval.qwen.encoding import (
    Encoded,
    RequestEncoder,
    join_conditions,
    join_edits,
    kept_embeddings,
    reference_sizes,
)
from eval.qwen.frame import Frame, shown_whole
from eval.qwen.modes import Plan, changed_part, check_request, edit_mask, keeps_size, kept_part, make_plan, result_size
from eval.qwen.samplers import BridgeSampler, Keep, OnStep, describe_sampler
from eval.qwen.weights.components import Components, Encoders
from eval.request.base import BaseEditor
from eval.request.knobs import MODES, AdapterUse, SamplerName
from eval.request.metadata import DEFAULT_GEOMETRY, describe_adapters, left_out, read_metadata, trained_geometry
from eval.request.placement import Placement
from eval.request.provenance import NOTICE, pixel_digest
from eval.request.request import KEEPING, MASKED, WITH_STRENGTH, Abilities, EditRequest, EditResult, OnProgress
from eval.request.sizes import NO_LIMITS, SizeLimits
from losses.randomness import PictureRandom
from train.model.adapter_files import extra_file
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
    """That is computed."""
    sees_scene: bool = False
    """Whether an adapter brings modules beside LoRA, which may look at white too."""

    @property
    def frame(self) -> Frame:
        """The part of what is computed that becomes the picture."""
        return Frame(self.size, self.size) if self.upstream else Frame.of(self.request, self.size)

    def shown(self, image: Image.Image, size: Size) -> Image.Image:
        """The first image as the VAE is given it as a reference, at this size."""
        return (
            self.geometry.reference_picture(image, size) if self.upstream else Frame.of(self.request, size).place(image)
        )

    @property
    def upstream(self) -> bool:
        """Whether sizes are upstream's: the first image is neither cropped nor continued, but stretched a little."""
        return isinstance(self.geometry, UpstreamGeometry)

    @property
    def stretched(self) -> bool:
        """Whether the result shows all of the first image in this way, and has no shape of its own."""
        return self.upstream and shown_whole(self.request)


@dataclass(frozen=True)
class Task:
    """Requests with the same plan and adapters, and which pictures of them are sampled together."""

    jobs: Sequence[Job]
    groups: Sequence[Sequence[tuple[int, int]]]
    """For each image, the number of its job and its seed."""

    @classmethod
    def alone(cls, job: Job) -> "Task":
        """One picture after the other: what a seed gives does not depend on the others."""
        return cls([job], [[(0, seed)] for seed in job.request.seeds])

    @classmethod
    def together(cls, jobs: Sequence[Job]) -> "Task":
        """One picture of each."""
        return cls(jobs, [[(number, job.request.seed) for number, job in enumerate(jobs)]])

    @property
    def plan(self) -> Plan:
        return self.jobs[0].plan

    @property
    def adapters(self) -> tuple[AdapterUse, ...]:
        return tuple(self.jobs[0].request.adapters)

    @property
    def num_calls(self) -> int:
        """Number of calls of `on_step`."""
        return len(self.groups) * self.plan.sampler.calls(self.plan.steps)


class Editor(BaseEditor):
    """Edits images with Qwen-Image-Edit and the adapters that a request names. Parts load when they are first needed.

    Args:
        model: the base model's directory, or a hub id, which is downloaded when its files are first needed.
        placement: where its parts live, and in which numbers.
        geometry: sizes of images; by default the first adapter's own, from its metadata, or else upstream's.
        depth_model: folder or hub id of a Depth-Anything model, for depth maps; by default as `DepthSource` says.
        limits: sizes that take the place of the geometry's, whatever the adapter.

    Attributes:
        spent: seconds of the last call by part (`encode`, `sample`, `decode`), with models loaded.
    """

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
        self.spent: dict[str, float] = {}
        self._embeddings = kept_embeddings()
        self.depth = DepthSource(depth_model, self.placement.device, waits=self.placement.offload != "none")

    @cached_property
    def model(self) -> ModelDirectory:
        """The base model's directory."""
        return ModelDirectory.resolve(self.named) if isinstance(self.named, str) else self.named

    @cached_property
    def edition(self) -> Edition:
        """Which Qwen-Image-Edit it is; of a hub id nothing but `model_index.json` is read for it."""
        if isinstance(self.named, ModelDirectory):
            return self.named.edition
        return ModelDirectory(fetch(self.named, [INDEX], needed=[INDEX])).edition

    @cached_property
    def abilities(self) -> Abilities:  # type: ignore[override]  # what a model can is known when it is named
        """Of every edition the same, but for the images that it takes."""
        return Abilities(BASE_NAME, MODES, self.edition.max_images, get_args(SamplerName))

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
        """Fingerprint of everything that is read from the model."""
        return self.model.fingerprint(*COMPONENTS)

    def identity(self, request: EditRequest) -> dict[str, str]:
        """The depth model's too, where the request needs it."""
        depth = {"depth_model": self.depth.files().fingerprint} if _sees_depth(request) else {}
        return super().identity(request) | depth

    def revised(self, request: EditRequest) -> dict[str, str]:
        """Upstream's sizes where nobody names any, the meaning of a strength, and the noise of what a stochastic bridge keeps."""
        job, changes = self.prepare(request), {}
        if job.upstream and not (request.sizing or request.geometry):
            changes["sizes"] = "upstream"
        if isinstance(job.plan.sampler, BridgeSampler):
            if job.plan.sampler.stochastic and request.mode in KEEPING:
                changes["kept"] = "noisy"
        elif request.mode in WITH_STRENGTH:
            changes["strength"] = "share of noise"
        return changes

    def check(self, request: EditRequest) -> None:
        """Reads the adapters' headers, and no weights."""
        self.prepare(request)

    def notes(self, request: EditRequest) -> Sequence[str]:
        """The notes on its plan and its adapters."""
        return (*self.prepare(request).plan.notes, *left_out(request.adapters))

    def prepare(self, request: EditRequest) -> Job:
        """How the request will be sampled, and the size of its pictures.

        Raises:
            InputError: it cannot be served.
        """
        self.abilities.check(request)
        if request.controls and self.edition.max_images == 1:
            raise InputError("the first Qwen-Image-Edit takes one image, and a map of it is another: leave out control")
        if _sees_depth(request):
            self.depth.files()
        headers = [read_metadata(use.path) for use in request.adapters if use.weight != 0]
        if len({header.get("objective", "flow") for header in headers}) > 1:
            raise InputError("the adapters were trained for different objectives, lbm and flow: use them one at a time")
        first = headers[0] if headers else {}
        geometry = self.limits.applied_to(request.geometry or self._geometry(request, first))
        size = result_size(request, geometry)
        sees_scene = any(
            list(map(extra_file, [use.path for use in request.adapters if use.weight != 0]))
        )  # all are found
        job = Job(request, make_plan(request, first), geometry, size, sees_scene)
        check_request(request, job.frame.inner, job.stretched)
        return job

    def _geometry(self, request: EditRequest, metadata: Mapping[str, str]) -> Geometry:
        """The sizes of a request that brings none, for the header of its first adapter."""
        upstream = UpstreamGeometry(vision_pixels=self.edition.vision_pixels)
        if request.sizing == "upstream":
            return upstream
        if self.geometry:
            return self.geometry
        if "geometry" in metadata:
            return trained_geometry(metadata)
        return self._own_geometry if request.sizing == "own" else upstream

    @property
    def _own_geometry(self) -> Geometry:
        """As this project trains by default."""
        return replace(DEFAULT_GEOMETRY, vision_pixels=self.edition.vision_pixels)

    def geometry_for(self, adapters: Sequence[AdapterUse]) -> Geometry:
        """The first adapter's own, from its header."""
        first = next((read_metadata(use.path) for use in adapters if use.weight != 0), {})
        own = trained_geometry(first) if "geometry" in first else self._own_geometry
        return self.limits.applied_to(self.geometry or own)

    def compared_steps(self, request: EditRequest) -> tuple[int, ...]:
        """The step counts of its plan."""
        return self.prepare(request).plan.compared

    def preload(self, adapters: Sequence[AdapterUse] = ()) -> None:
        """As `BaseEditor.preload`; parts that the placement lets wait in CPU memory do so afterwards."""
        if self.placement.offload == "model" and self.placement.device.type == "cpu":
            raise InputError("--preload loads what --offload model on a CPU frees again: leave one of them out")
        with self.components.denoiser(adapters):
            pass
        with self.components.encoders():
            pass

    def forget(self) -> None:
        """Pictures and instructions of earlier requests are encoded again when they come again."""
        self._embeddings.clear()

    def edit(self, request: EditRequest, on_progress: OnProgress | None = None) -> list[EditResult]:
        """As `BaseEditor.edit`."""
        return self._make([Task.alone(self.prepare(request))], on_progress)[0]

    def batch_key(self, request: EditRequest) -> Hashable:
        """The same sampler, adapters and sizes. Controls and several pictures go by themselves."""
        job = self.prepare(request)
        if request.controls or request.count > 1:
            return None
        references = tuple(reference_sizes(request.images, job.size, job.geometry, request.bridge_image))
        return job.plan, tuple(request.adapters), job.size, references, request.mode in KEEPING

    def edit_together(
        self, requests: Sequence[EditRequest], on_progress: OnProgress | None = None
    ) -> list[list[EditResult]]:
        """All requests in every call of the denoiser."""
        jobs = [self.prepare(request) for request in requests]
        return [[result] for result in self._make([Task.together(jobs)], on_progress)[0]]

    def edit_groups(self, groups: Sequence[Sequence[EditRequest]]) -> list[list[list[EditResult]]]:
        """All are encoded, then all sampled, then all decoded, so that each part is needed once; each adapter too."""
        prepared = [[self.prepare(request) for request in group] for group in groups]
        tasks = [Task.together(jobs) if len(jobs) > 1 else Task.alone(jobs[0]) for jobs in prepared]
        made = self._make(tasks)
        return [
            [[each] for each in some] if len(group) > 1 else [some] for group, some in zip(groups, made, strict=True)
        ]

    @torch.no_grad()
    def _make(self, tasks: Sequence[Task], on_progress: OnProgress | None = None) -> list[list[EditResult]]:
        """The pictures of each task, in the order of its groups."""
        clocks = [_Clock(self.placement.device) for _ in tasks]
        maps = [[self._maps(job) for job in task.jobs] for task in tasks]
        encoded = self._encode(tasks, maps, clocks)
        latents = self._sample_all(tasks, encoded, clocks, _report(on_progress, sum(task.num_calls for task in tasks)))
        images = []
        with self.components.vae() as vae:
            for each, clock in zip(latents, clocks, strict=True):
                with clock.part("decode"):
                    images.append([image for some in each for image in _decode(vae, some)])
        self.spent = {part: sum(clock.spent[part] for clock in clocks) for part in clocks[0].spent}
        return [self._results(*each) for each in zip(tasks, maps, images, clocks, strict=True)]

    def _results(
        self,
        task: Task,
        maps: Sequence[list[Image.Image]],
        images: Sequence[Image.Image],
        clock: "_Clock",
    ) -> list[EditResult]:
        adapters, results = describe_adapters(task.adapters), []
        kept = [kept_part(job.request, job.frame.inner, job.stretched) for job in task.jobs]
        seconds, encoding = (each / len(images) for each in (sum(clock.spent.values()), clock.spent["encode"]))
        pictures = [picture for group in task.groups for picture in group]
        for (number, seed), image in zip(pictures, images, strict=True):
            image = task.jobs[number].frame.crop(image)
            into = kept[number]
            shown = into.with_edit(image) if into else image
            settings = self._settings(task.jobs[number], adapters, seed, shown)
            results.append(EditResult(shown, seed, seconds, settings, maps[number], encoding))
        return results

    def _encode(
        self, tasks: Sequence[Task], maps: Sequence[Sequence[list[Image.Image]]], clocks: Sequence["_Clock"]
    ) -> list[list[Encoded]]:
        """The encoders are loaded, or brought to their device, for what was not encoded lately."""
        with ExitStack() as in_use:

            @functools.cache
            def encoders() -> Encoders:
                with clock.paused("encode"):
                    return in_use.enter_context(self.components.encoders())

            def encode(job: Job, some: Sequence[Image.Image]) -> Encoded:
                kept = self._embeddings
                return _encode(RequestEncoder(encoders, job.geometry, self.placement.device, kept), job, some)

            encoded = []
            for task, some, clock in zip(tasks, maps, clocks, strict=True):
                with clock.part("encode"):
                    encoded.append(list(map(encode, task.jobs, some)))
            return encoded

    def _sample_all(
        self, tasks: Sequence[Task], encoded: Sequence[Sequence[Encoded]], clocks: Sequence["_Clock"], report: OnStep
    ) -> list[list[Tensor]]:
        """Latents of each task's groups; tasks with the same adapters one after the other."""
        latents: dict[int, list[Tensor]] = {}
        for adapters in dict.fromkeys(task.adapters for task in tasks):
            with self.components.denoiser(adapters) as denoiser:
                for number, task in enumerate(tasks):
                    if task.adapters != adapters:
                        continue
                    with clocks[number].part("sample"):
                        latents[number] = [
                            self._sample(denoiser, task.plan, encoded[number], group, report) for group in task.groups
                        ]
        return [latents[number] for number in range(len(tasks))]

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
        image = job.shown(image, reference_sizes([image], job.size, job.geometry)[0])
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
            "bridge_image": request.bridge_image or None,
            "original_size": keeps_size(request) or None,
            "computed_size": None if job.frame.is_full else [job.size.width, job.size.height],
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
    request, sampler, frame = job.request, job.plan.sampler, job.frame
    masks = (part(request, frame.inner, job.stretched) for part in (edit_mask, changed_part))
    mask, changed = (each and frame.extend(each) for each in masks)
    return encoder.encode(
        request.images,
        request.prompt or EMPTY_PROMPT,
        (request.negative_prompt or EMPTY_PROMPT) if sampler.guided else None,
        job.size,
        mask,
        maps,
        [control.strength for control in request.controls],
        empty=request.mode == "invert",
        white=job.sees_scene or (isinstance(sampler, BridgeSampler) and sampler.start == "white"),
        changed=changed,
        bridge_image=request.bridge_image,
        whole=shown_whole(request),
    )


def _decode(vae: VAE, latents: Tensor) -> list[Image.Image]:
    """One picture at a time: what a picture becomes does not depend on its batch, and memory stays small."""
    return [to_image(vae.decode(each[None])[0]) for each in latents]


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
    """The seconds spent in each part, the accelerator's work included."""

    def __init__(self, device: torch.device):
        self.device, self.spent = device, dict[str, float]()

    @contextmanager
    def part(self, name: str, sign: int = 1) -> Iterator[None]:
        """Adds what is spent inside."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.spent[name] = self.spent.get(name, 0.0) + sign * (time.perf_counter() - start)

    def paused(self, name: str) -> AbstractContextManager[None]:
        """Takes away what is spent inside, in the middle of a part."""
        return self.part(name, sign=-1)
