"""Settings under which a run fits that does not, the fastest first, and the strategy that would be faster than its own."""

import importlib.util
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from train.config import Config
from train.plan.gpus import GIB, Gpu
from train.plan.planner import Change, Planner, apply, can_shard, spread

SMALL_BUCKET = 50_000_000
AUTOMATIC: Change = {"train.gradient_checkpointing": "auto", "train.offload_blocks": "auto"}
NOTICEABLE = 0.98
"""A strategy is called faster if it takes at most this share of the time: figures are not better known."""


@dataclass(frozen=True)
class Suggestion:
    """Settings that would fit."""

    settings: str
    """As they are written on the command line."""
    num_gpus: int
    seconds: float | None = None
    """Seconds per step; None: not known."""
    changes_result: bool = False
    """Whether the adapter becomes another, and not only the time."""


def caching_advice(planner: Planner, config: Config, world_size: int, gpu: Gpu) -> list[Suggestion]:
    """If phase 1 does not fit, and what would."""
    available, small = gpu.memory_gib * GIB, {"cache.batch_size": 1}
    if planner.caching(config).total > available >= planner.caching(apply(config, small)).total:
        return [Suggestion(text_of(small), world_size)]
    return []


def training_advice(planner: Planner, config: Config, world_size: int, gpu: Gpu) -> list[Suggestion]:
    """Settings under which training fits, the fastest first.

    Those that change the result are left out unless they are faster than all that leave it as it is; sizes of pictures and
    adapter and the optimizer are changed only if nothing else fits.
    """

    def fitting(families: Iterator[list[tuple[Change, int]]], changes_result: bool) -> list[Suggestion]:
        found = []
        for family in families:
            tried = (suggestion(planner, config, change, n, gpu, changes_result) for change, n in family)
            found += itertools.islice(filter(None, tried), 1)
        return found

    found = fitting(spreads(config, world_size), False)
    fastest = min((s.seconds for s in found if s.num_gpus == world_size and s.seconds is not None), default=None)
    rounded = fitting(formats(config, world_size), True)
    found += [s for s in rounded if fastest is None or s.seconds is None or s.seconds < fastest]
    if not found:
        found = fitting(smaller(config, world_size), True)
    return sorted(found, key=lambda s: s.seconds or 0.0)


def suggestion(
    planner: Planner, config: Config, change: Change, num_gpus: int, gpu: Gpu, changes_result: bool
) -> Suggestion | None:
    """This change with what has to come with it to fit, or None."""
    for saving in savings(config):
        wanted = apply(config, AUTOMATIC, change, saving)
        total = wanted.train.global_batch_size
        if total and total % (wanted.train.micro_batch_size * num_gpus):
            continue
        resolved = planner.without_auto(wanted, num_gpus, gpu)
        if planner.fits(resolved, num_gpus, gpu):
            automatic = {
                key: value
                for key, value in AUTOMATIC.items()
                if getattr(config.train, name := key.partition(".")[2]) not in ("auto", getattr(resolved.train, name))
            }
            seconds = planner.seconds(resolved, num_gpus, gpu)
            return Suggestion(text_of(change, automatic, saving), num_gpus, seconds, changes_result)
    return None


def savings(config: Config) -> Iterator[Change]:
    """What costs time and changes no result, the smaller change first; nothing, to begin with."""
    settings, single = config.train, []
    if settings.micro_batch_size > 1:
        accumulated = settings.micro_batch_size * (settings.grad_accum_steps or 1)
        kept = {} if settings.global_batch_size else {"train.grad_accum_steps": accumulated}
        kept["train.group_size"] = settings.group_size or settings.micro_batch_size
        single.append({"train.micro_batch_size": 1, **kept})
    if config.parallel.stage == 2 and config.parallel.bucket_size > SMALL_BUCKET:
        single.append({"parallel.bucket_size": SMALL_BUCKET})
    for count in range(len(single) + 1):
        for chosen in itertools.combinations(single, count):
            yield {key: value for change in chosen for key, value in change.items()}


def spreads(config: Config, world_size: int) -> Iterator[list[tuple[Change, int]]]:
    """The strategy as it is, and others, by family; within one, fewer GPUs first."""
    yield [({}, world_size)]
    if config.parallel.stage == 3:
        yield [(whole(config, world_size), world_size)]
    if can_shard(config):
        tried = {1, world_size} if config.parallel.name == "zero3" else {1}
        counts = sorted({world_size, *(n for n in (2, 4, 8) if n > world_size)} - tried)
        yield [(spread("zero3"), count) for count in counts]
        if not config.parallel.offload:
            yield [(spread("zero3", offload=True), world_size)]


def formats(config: Config, world_size: int) -> Iterator[list[tuple[Change, int]]]:
    """Other formats of the frozen weights."""
    for weights in ("fp8", "int8", "nf4"):
        if not config.adapter.dora and weights != config.model.weights:
            yield [({"model.weights": weights, **whole(config, world_size)}, world_size)]


def whole(config: Config, world_size: int) -> Change:
    """From a strategy that cuts blocks to one that does not."""
    return spread("single" if world_size == 1 else "ddp") if config.parallel.stage == 3 else {}


def smaller(config: Config, world_size: int) -> Iterator[list[tuple[Change, int]]]:
    """What learns something else, by family; within one, the smaller change first."""
    if config.optim["_target_"] == "train.optim.AdamW" and importlib.util.find_spec("bitsandbytes"):
        yield [({"optim": {**config.optim, "bits": 8}}, world_size)]
    yield [({"data.max_pixels": n * n}, world_size) for n in (768, 512, 384) if n * n < config.data.max_pixels]
    halved = itertools.takewhile(lambda rank: rank >= 4, (config.adapter.rank >> n for n in itertools.count(1)))
    yield [({"adapter.rank": rank}, world_size) for rank in halved]


def faster_strategy(planner: Planner, config: Config, world_size: int, gpu: Gpu) -> Suggestion | None:
    """The fastest strategy that fits on this machine, if it is another than the configuration's.

    Args:
        config: as configured, `auto` included.
    """
    names = ("single",) if world_size == 1 else ("ddp", "zero2")
    changes = [spread(name) for name in names]
    if can_shard(config):
        changes += [spread("zero3")] * (world_size > 1) + [spread("zero3", offload=True)]
    own = planner.seconds(planner.without_auto(config, world_size, gpu), world_size, gpu)
    best = None
    for change in changes:
        resolved = planner.without_auto(apply(config, change), world_size, gpu)
        seconds = planner.seconds(resolved, world_size, gpu)
        if seconds is None or own is None or not planner.fits(resolved, world_size, gpu):
            continue
        if seconds <= NOTICEABLE * own and (best is None or seconds < (best.seconds or 0)):
            best = Suggestion(text_of(change), world_size, seconds)
    return best


def text_of(*changes: Change) -> str:
    """As they are written on the command line."""
    values: Change = {key: value for change in changes for key, value in change.items()}
    if strategy := values.pop("parallel.strategy", None):
        values = {"parallel": f"{strategy}_offload" if values.pop("parallel.offload") else strategy} | values
    if optim := values.pop("optim", None):
        values["++optim.bits"] = optim["bits"]
    return " ".join(f"{key}={value}" for key, value in values.items())
