"""What a run will need, before anything is loaded: memory by part, time, disk; and settings that fit where these do not."""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from data_prep.cache.index import DatasetDigest
from data_prep.cache.sizes import Bucket, DatasetSizes, cached_sizes, estimated_sizes, num_tokens
from data_prep.errors import InputError
from data_prep.model.directory import ModelDirectory
from data_prep.rows.rows import Row
from train.config import Config
from train.config.training_rows import configured_rows, preserved_prompts
from train.plan.advice import Suggestion, caching_advice, faster_strategy, training_advice
from train.plan.gpus import GIB, Gpu
from train.plan.planner import (
    FLOAT,
    BuildOptimizer,
    Change,
    Memory,
    Planner,
    apply,
    geometry_of,
    lora_sizes,
    utilisation,
)
from train.plan.speed import GIGA, LINK_BUSY, UTILISATION, Step

SHOWN_BUCKETS = 5


@dataclass(frozen=True)
class Plan:
    """A run in numbers; `render` makes them a text."""

    name: str
    gpu: Gpu
    world_size: int
    dtype: str
    num_parameters: int
    """Frozen ones."""
    num_lora: int
    """Trainable parameters of LoRA."""
    num_modules: int
    """With LoRA or LoKr."""
    kind: str
    """Which of these."""
    ranks: str
    """One, or the smallest to the largest."""
    num_extra: int
    """Trainable parameters beside it."""
    extra: str
    """What is trained beside it, in words."""
    data: DatasetSizes
    buckets: list[Bucket]
    memory: Memory
    """Memory of phase 2."""
    cache_phase: Memory
    """Memory of phase 1."""
    cache_bytes: int
    caching_flops: float | None
    """Operations of phase 1 for each row; None if every row is cached."""
    checkpoint_bytes: int
    """Bytes of one checkpoint."""
    num_checkpoints: int
    decided: Change
    """What every `auto` about memory comes to, by full key."""
    group_size: int
    """Places that are filled from one bucket."""
    empty_share: float
    """Share of all places that stay empty."""
    weights: str
    """Format of the frozen weights."""
    parallel: str
    num_blocks: int
    shipped: bool
    """Whether the model's sizes are those that ship with the project."""
    batch: tuple[int, int]
    """Samples of a micro-batch, and how many are accumulated."""
    step: Step
    """On one rank."""
    utilisation: float
    """The assumed share of the GPU's peak."""
    seconds_per_step: float | None
    """None where no speed is known: of another GPU, or with another `model.dtype` than bfloat16."""
    num_steps: int
    fits: bool
    """Whether both phases find enough memory."""
    advice: list[Suggestion]
    """Settings that would make it fit, the fastest first; empty if it fits."""
    faster: Suggestion | None
    """The strategy that would be faster."""

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps in which every row is drawn once."""
        return self.data.num_rows / (1 - self.empty_share) / (self.samples_per_step * self.world_size)

    @property
    def samples_per_step(self) -> int:
        """Places on one rank."""
        return self.batch[0] * self.batch[1]

    @property
    def flops_per_step(self) -> int:
        """On one rank."""
        return self.step.flops + self.step.flops_8bit

    def render(self) -> str:
        """A screen of text."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        gpu, rate = self.gpu, "speed not known" if self.gpu.tflops is None else f"{self.gpu.tflops:g} TFLOPS"
        yield f"plan of {self.name} for {self.world_size} x {gpu.name}, {gpu.memory_gib:.1f} GiB, {rate} ({gpu.origin})"
        blocks = "" if self.weights == "bf16" else f", the blocks' in {self.weights}"
        known = " (published sizes, shipped with the project)" if self.shipped else ""
        yield f"  model      {_count(self.num_parameters)} parameters in {self.dtype}{blocks}{known}"
        yield f"  {self.kind:<10} rank {self.ranks} on {self.num_modules} modules: {_count(self.num_lora)} parameters"
        if self.num_extra:
            yield f"  beside it  {self.extra}: {_count(self.num_extra)} parameters"
        yield f"  data       {self.data.num_rows} rows, from {self.data.origin}"
        for label, bucket in zip(
            itertools.chain(["sequences"], itertools.repeat("")), self.buckets[:SHOWN_BUCKETS], strict=False
        ):
            yield f"  {label:10} {_describe(bucket)}"
        if len(self.buckets) > SHOWN_BUCKETS:
            yield f"  {'':10} and {len(self.buckets) - SHOWN_BUCKETS} shorter buckets"
        samples, accumulated = self.batch
        yield (
            f"  batch      global batch {samples * accumulated * self.world_size} = {_plural(samples, 'sample')} x "
            f"{accumulated} accumulated x {_plural(self.world_size, 'GPU')}"
        )
        yield (
            f"  an epoch   {self.steps_per_epoch:.4g} steps, in groups of {self.group_size} from one bucket; "
            f"{self.empty_share:.1%} of the places stay empty. {self.num_steps} steps are "
            f"{self.num_steps / self.steps_per_epoch:.3g} epochs"
        )
        yield "  memory per GPU, GiB"
        for part, num_bytes in self.memory.gpu.items():
            yield f"    {num_bytes / GIB:8.2f}  {part}"
        yield f"    {self.memory.total / GIB:8.2f}  of {gpu.memory_gib:.1f} in training"
        yield f"    {self.cache_phase.total / GIB:8.2f}  while caching, before that"
        yield from self._elsewhere()
        yield (
            f"  disk       {_size(self.cache_bytes)} cache, {self.num_checkpoints} checkpoints of "
            f"{_size(self.checkpoint_bytes)} (one more while saving)"
        )
        yield from self._caching()
        yield from self._time()
        if self.faster:
            yield f"  faster     {self.faster.settings}, with about {self.faster.seconds:.3g} s per step"
        yield (
            "  it fits"
            if self.fits
            else "  IT DOES NOT FIT"
            + (
                ". These settings would fit, the fastest first, with their times compared with it:"
                if self.advice
                else ""
            )
        )
        fastest = min((each.seconds for each in self.advice if each.seconds), default=None)
        for each in self.advice:
            yield f"    {each.settings}{_notes(each, self.world_size, fastest)}"

    def _elsewhere(self) -> Iterator[str]:
        """What is in the machine's memory, and what comes from there and from other GPUs."""
        gpu, step, link = self.gpu, self.step, "NVLink" if self.gpu.nvlink else "PCIe"
        if self.memory.cpu:
            machine = "" if gpu.host_gib is None else f"; the machine has {gpu.host_gib:.1f}"
            yield f"    {self.memory.cpu / GIB:8.2f}  of CPU memory per process, pinned{machine}"
        if step.copied:
            waiting = self.decided["train.offload_blocks"]
            what = f"{waiting} of {self.num_blocks} blocks are" if waiting else "the weights are"
            taken = _transfer(step.copied, gpu.pcie)
            yield f"  copies     {what} in CPU memory: {taken} over PCIe each step, while computing"
        if step.gathered:
            yield f"  links      each GPU receives {_transfer(step.gathered, gpu.link)} of weights over {link}, while computing"
        if step.reduced:
            yield f"  links      each GPU receives {_transfer(step.reduced, gpu.link)} of LoRA over {link}, after computing"
        if self.world_size > gpu.per_machine:
            yield f"  links      traffic between machines of {gpu.per_machine} GPUs is slower than this plan assumes"

    def _caching(self) -> Iterator[str]:
        """What phase 1 has to do, and how long it takes at an assumed share of the peak."""
        if self.caching_flops is None or self.gpu.tflops is None or self.dtype != "bfloat16":
            return
        share = UTILISATION["plain"]
        seconds = self.data.num_rows * self.caching_flops / (self.gpu.tflops * 1e12 * share) / self.world_size
        if seconds >= 1:  # the encoders take longer to load
            yield (
                f"  caching    {self.caching_flops / 1e12:.3g} TFLOP per row: about {_duration(seconds)} at {share:.0%} of peak, "
                "if files are read that fast; an estimate, not measured"
            )

    def _time(self) -> Iterator[str]:
        samples = _plural(self.samples_per_step, "sample")
        work = f"{self.flops_per_step / 1e12:.4g} TFLOP per step ({samples} per GPU)"
        if self.seconds_per_step is None or self.seconds_per_step < 0.1:  # too little for a peak to say anything
            yield f"  time       {work}"
            return
        yield (
            f"  time       {work}: about {_duration(self.seconds_per_step)} at {self.utilisation:.0%} of peak, "
            f"{_duration(self.seconds_per_step * self.num_steps)} for {self.num_steps} steps"
        )
        unmeasured = {
            f"products in {self.weights}": self.step.flops_8bit,
            f"dequantising {self.weights}": self.step.rounded and not self.step.flops_8bit,
            "copies beside the computation": self.step.copied,
            "several GPUs": self.world_size > 1,
        }
        if named := [name for name, part in unmeasured.items() if part]:
            yield f"             an estimate, because these were not measured: {', '.join(named)}"


def dataset_sizes(config: Config, model: ModelDirectory) -> DatasetSizes:
    """Sizes of the training rows: from the cache if it is finished and has this geometry, else from the images' headers.

    Raises:
        InputError: the dataset cannot be read, or none of its rows can be used.
    """
    geometry, dropout = geometry_of(config), config.data.caption_dropout > 0
    preserve = preserved_prompts(config)
    rows = [row for row in configured_rows(config) if isinstance(row, Row) and row.split == "train"]
    with contextlib.suppress(InputError):
        digest = str(DatasetDigest(rows))
        return cached_sizes(config.cache.dir, digest, None, geometry, dropout, preserve)
    vision = model.config("text_encoder").get("vision_config", {})
    side = vision.get("patch_size", 14) * vision.get("spatial_merge_size", 2)
    return estimated_sizes(rows, geometry, side, preserve=preserve)


def make_plan(
    config: Config,
    model: ModelDirectory,
    data: DatasetSizes,
    world_size: int,
    gpu: Gpu,
    build_optimizer: BuildOptimizer,
) -> Plan:
    """The plan of a run. Of the model, only the `config.json` files are read.

    Args:
        data: from `cached_sizes` or `estimated_sizes`.
        world_size: processes, one GPU each.
        build_optimizer: makes the optimizer of an `optim` node.

    Raises:
        InputError: `config.json` is missing or contradicts the configuration, or a LoRA target does not exist.
    """
    planner, configured = Planner(config, model, data, build_optimizer), config
    decided = planner.decide(config, world_size, gpu)
    config = apply(config, decided)
    settings, lora, cache_phase = config.train, lora_sizes(config), planner.caching(config)
    shapes, ranks = planner.transformer.lora_shapes(lora), planner.transformer.ranks(lora).values()
    trained = planner.num_lora(config) + planner.num_extra(config)
    phases = cache_phase.total <= gpu.memory_gib * GIB, planner.fits(config, world_size, gpu)
    advice = [] if phases[0] else caching_advice(planner, configured, world_size, gpu)
    if not phases[1]:
        advice += training_advice(planner, configured, world_size, gpu)
    return Plan(
        name=config.name,
        gpu=gpu,
        world_size=world_size,
        dtype=config.model.dtype,
        num_parameters=planner.transformer.num_parameters,
        num_lora=planner.num_lora(config),
        num_modules=len(shapes),
        kind="LoKr" if lora.lokr else "LoRA",
        ranks=" to ".join(map(str, sorted({min(ranks), max(ranks)}))),
        num_extra=planner.num_extra(config),
        extra="; ".join(filter(None, [_in_full(lora.train_modules), ", ".join(lora.nodes)])),
        data=data,
        buckets=planner.buckets(config),
        memory=planner.training(config, world_size, gpu),
        cache_phase=cache_phase,
        cache_bytes=planner.cache_bytes(config),
        caching_flops=None if data.cached else planner.caching_flops(config),
        checkpoint_bytes=trained * (planner.dtype.itemsize + FLOAT) + planner.optimizer_bytes(config),
        num_checkpoints=min(settings.keep_last, -(-settings.num_steps // settings.save_every)),
        decided=decided,
        group_size=settings.group_size or settings.micro_batch_size,
        empty_share=planner.empty_share(config),
        weights=config.model.weights,
        parallel=config.parallel.name,
        num_blocks=planner.transformer.num_layers,
        shipped=model.shipped,
        batch=(settings.micro_batch_size, settings.accumulation(world_size)),
        step=planner.step(config, world_size, gpu),
        utilisation=utilisation(config),
        seconds_per_step=planner.seconds(config, world_size, gpu),
        num_steps=settings.num_steps,
        fits=all(phases),
        advice=advice,
        faster=faster_strategy(planner, configured, world_size, gpu) if phases[1] else None,
    )


def _notes(each: Suggestion, world_size: int, fastest: float | None) -> str:
    notes = [f"on {each.num_gpus} GPUs"] if each.num_gpus != world_size else []
    if each.seconds and fastest:
        notes.append(f"{each.seconds:.3g} s per step, {each.seconds / fastest:.2f} x")
    if each.changes_result:
        notes.append("changes results")
    return f"  ({', '.join(notes)})" if notes else ""


def _in_full(train_modules: tuple[str, ...]) -> str:
    return f"{', '.join(train_modules)} in full" if train_modules else ""


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")


def _transfer(num_bytes: int, rate: float) -> str:
    """Its size, and how long it takes if the link's speed is known."""
    return _size(num_bytes) + (f" ({num_bytes / (rate * GIGA * LINK_BUSY):.2g} s)" if rate else "")


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    scale, unit = next((n, unit) for n, unit in ((3600, "h"), (60, "min"), (1, "s")) if seconds >= 2 * n or n == 1)
    number = seconds / scale
    return f"{number:.0f} {unit}" if number >= 10 else f"{number:.2g} {unit}"


def _describe(bucket: Bucket) -> str:
    images = " + ".join(f"{size} ({num_tokens(size)})" for size in (bucket.target, *bucket.references))
    return f"{images} + text ({bucket.text_tokens}) = {bucket.length} tokens, {bucket.share:.0%} of the draws"
