"""What a run will need, before anything is loaded: memory by part, time, disk; and settings that fit where these do not."""

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep.cache.reader import CacheReader
from data_prep.cache.sizes import Bucket, DatasetSizes, cached_sizes, estimated_sizes, num_tokens
from data_prep.errors import InputError
from data_prep.model.directory import ModelDirectory
from data_prep.rows.rows import Row, read_rows
from train.config import Config
from train.model.execution import Execution
from train.plan.gpus import Gpu
from train.plan.planner import (
    FLOAT,
    GIB,
    BuildOptimizer,
    Change,
    Memory,
    Planner,
    apply,
    forwards_per_sample,
    geometry_of,
    lora_sizes,
    rollout_share,
)

UTILISATION = {"compiled": 0.47, "plain": 0.34}
"""Share of the GPU's bf16 peak that training reaches: measured on one H200 (docs/performance.md), assumed of other GPUs."""
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
    num_trainable: int
    num_modules: int
    """With LoRA."""
    rank: int
    data: DatasetSizes
    buckets: list[Bucket]
    memory: Memory
    """Of phase 2."""
    cache_phase: Memory
    """Of phase 1."""
    cache_bytes: int
    checkpoint_bytes: int
    """Of one."""
    num_checkpoints: int
    decided: Change
    """What every `auto` about memory comes to, by full key."""
    compiled: bool
    """Whether blocks are compiled on a GPU."""
    samples_per_step: int
    """Places on one rank."""
    group_size: int
    """Places that are filled from one bucket."""
    empty_share: float
    """Of all places, those that stay empty."""
    flops_per_step: int
    """On one rank."""
    num_steps: int
    advice: list[str]
    """Settings that would make it fit, the smallest change first; empty if it fits."""

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps in which every row is drawn once."""
        return self.data.num_rows / (1 - self.empty_share) / (self.samples_per_step * self.world_size)

    @property
    def fits(self) -> bool:
        """Whether both phases find enough memory."""
        return max(self.memory.total, self.cache_phase.total) <= self.gpu.memory_gib * GIB

    @property
    def seconds_per_step(self) -> float | None:
        """At the assumed utilisation; None where no speed is known: of another GPU, or with other weights than bfloat16."""
        if self.gpu.tflops is None or self.dtype != "bfloat16":
            return None
        return self.flops_per_step / (self.gpu.tflops * 1e12 * self.utilisation)

    @property
    def utilisation(self) -> float:
        """The assumed one."""
        return UTILISATION["compiled" if self.compiled else "plain"]

    def render(self) -> str:
        """A screen of text."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        gpu, rate = self.gpu, "speed not known" if self.gpu.tflops is None else f"{self.gpu.tflops:g} TFLOPS"
        yield f"plan of {self.name} for {self.world_size} x {gpu.name}, {gpu.memory_gib:.1f} GiB, {rate} ({gpu.origin})"
        yield f"  model      {_count(self.num_parameters)} parameters in {self.dtype}"
        yield f"  LoRA       rank {self.rank} on {self.num_modules} modules: {_count(self.num_trainable)} parameters"
        yield f"  data       {self.data.num_rows} rows, from {self.data.origin}"
        for label, bucket in zip(
            itertools.chain(["sequences"], itertools.repeat("")), self.buckets[:SHOWN_BUCKETS], strict=False
        ):
            yield f"  {label:10} {_describe(bucket)}"
        if len(self.buckets) > SHOWN_BUCKETS:
            yield f"  {'':10} and {len(self.buckets) - SHOWN_BUCKETS} shorter buckets"
        yield (
            f"  an epoch   {self.steps_per_epoch:.4g} steps of {self.samples_per_step * self.world_size} places, in groups of "
            f"{self.group_size} from one bucket; {self.empty_share:.1%} of the places stay empty"
        )
        yield "  memory per GPU, GiB"
        for part, num_bytes in self.memory.gpu.items():
            yield f"    {num_bytes / GIB:8.2f}  {part}"
        yield f"    {self.memory.total / GIB:8.2f}  of {gpu.memory_gib:.1f} in training"
        yield f"    {self.cache_phase.total / GIB:8.2f}  while caching, before that"
        if self.memory.cpu:
            yield f"    {self.memory.cpu / GIB:8.2f}  of CPU memory per process"
        yield (
            f"  disk       {_size(self.cache_bytes)} cache, {self.num_checkpoints} checkpoints of "
            f"{_size(self.checkpoint_bytes)} (one more while saving)"
        )
        yield f"  time       {self._time()}"
        yield "  it fits" if self.fits else "  IT DOES NOT FIT" + ("; this would:" if self.advice else "")
        for line in self.advice:
            yield f"    {line}"

    def _time(self) -> str:
        work = f"{self.flops_per_step / 1e12:.4g} TFLOP a step ({self.samples_per_step} samples per GPU)"
        if self.seconds_per_step is None or self.seconds_per_step < 0.1:  # too little for a peak to say anything
            return work
        return (
            f"{work}: about {_duration(self.seconds_per_step)} at {self.utilisation:.0%} of peak, "
            f"{_duration(self.seconds_per_step * self.num_steps)} for {self.num_steps} steps"
        )


def dataset_sizes(config: Config, model: ModelDirectory) -> DatasetSizes:
    """Of the training rows: from the cache if it is finished and has this geometry, else from the images' headers.

    Raises:
        InputError: the dataset cannot be read, or none of its rows can be used.
    """
    geometry, folder = geometry_of(config), Path(config.cache.dir) / "train"
    with contextlib.suppress(InputError):
        CacheReader(folder, geometry=geometry)
        return cached_sizes(folder)
    assert config.data.dataset is not None
    rows = read_rows(config.data.dataset, config.data.root)
    vision = model.config("text_encoder").get("vision_config", {})
    side = vision.get("patch_size", 14) * vision.get("spatial_merge_size", 2)
    return estimated_sizes((r for r in rows if isinstance(r, Row) and r.split == "train"), geometry, side)


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
    planner = Planner(config, model, data, build_optimizer)
    decided = planner.decide(config, world_size, gpu)
    config = apply(config, decided)
    memory, cache_phase = planner.training(config, world_size), planner.caching(config)
    settings, lora = config.train, lora_sizes(config)
    shapes = planner.transformer.lora_shapes(lora)
    trainable = sum(math.prod(shape) for group in shapes.values() for shape in group)
    buckets = data.buckets(geometry_of(config))
    samples = settings.micro_batch_size * settings.accumulation(world_size)
    execution = Execution.of(settings.gradient_checkpointing)
    rolled = rollout_share(config)
    flops = forwards_per_sample(config) * sum(
        bucket.share
        * (
            planner.transformer.flops(bucket, lora, execution)
            + rolled * sum(planner.transformer.forward_flops(bucket, lora))
        )
        for bucket in buckets
    )
    group_size = settings.group_size or settings.micro_batch_size
    empty_share = _empty_share(buckets, data.num_rows, group_size)
    plan = Plan(
        name=config.name,
        gpu=gpu,
        world_size=world_size,
        dtype=config.model.dtype,
        num_parameters=planner.transformer.num_parameters,
        num_trainable=trainable,
        num_modules=len(shapes),
        rank=lora.rank,
        data=data,
        buckets=buckets,
        memory=memory,
        cache_phase=cache_phase,
        cache_bytes=planner.cache_bytes(config),
        checkpoint_bytes=trainable * (planner.dtype.itemsize + FLOAT) + planner.optimizer_bytes(config),
        num_checkpoints=min(settings.keep_last, -(-settings.num_steps // settings.save_every)),
        decided=decided,
        compiled=settings.compile != "off",
        samples_per_step=samples,
        group_size=group_size,
        empty_share=empty_share,
        flops_per_step=round(flops * samples * (1 - empty_share)),
        num_steps=settings.num_steps,
        advice=[],
    )
    return plan if plan.fits else replace(plan, advice=planner.advice(config, world_size, gpu))


def _empty_share(buckets: list[Bucket], num_rows: int, group_size: int) -> float:
    """Of the places of all groups, those that no row fills."""
    counts = [max(1, round(bucket.share * num_rows)) for bucket in buckets]
    return 1 - sum(counts) / (group_size * sum(-(-count // group_size) for count in counts))


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
    return f"{images} + text ({bucket.text_tokens}) = {bucket.length} tokens, {bucket.share:.0%} of the rows"
