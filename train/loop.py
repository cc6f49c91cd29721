"""The training loop."""

import math
import resource
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from data_prep.cache.batches import BatchStream
from losses.batch import Batch
from losses.randomness import SampleRandom
from losses.terms import LossTerms
from train.model.adapter import Adapter
from train.optim import Optimizer
from train.parallel.processes import Processes
from train.parallel.strategies import Parallel
from train.record.checkpoint import Checkpoints
from train.record.loggers import Loggers, Picture

Loss = Callable[[nn.Module, Batch, SampleRandom], LossTerms]
Sums = dict[str, tuple[float, int]]
"""Name -> sum and count of what is averaged over ranks."""


class ValidationResult(Protocol):
    """What a validation returns."""

    numbers: dict[str, float]
    images: dict[str, Picture]


class TrainingDiverged(RuntimeError):
    """A loss or a gradient is not finite. The last checkpoint is from before."""


class ValidationFailed(RuntimeError):
    """A validation failed and left the ranks in step with each other: training can go on."""


@dataclass
class Intervals:
    """How often a run saves and validates; it also does both at its end, and saves what it validates."""

    save: int
    """Steps between checkpoints."""
    validate: int
    """Steps between validations."""
    save_minutes: float = math.inf
    """The longest time between checkpoints."""


@dataclass
class Training:
    """A run that trains: its parts, and how far it is.

    Attributes:
        identity: saved with each checkpoint, to find out whether a continued run still has the same data.
        stop: whether this process was asked to stop.
        step: steps done.
        saved: steps done at the newest checkpoint.
        ids: the records of the step that is being computed.
    """

    processes: Processes
    parallel: Parallel
    adapter: Adapter
    loss: Loss
    optimizer: Optimizer
    stream: BatchStream
    checkpoints: Checkpoints
    loggers: Loggers
    validate: Callable[[nn.Module, int], ValidationResult] | None
    intervals: Intervals
    num_steps: int
    identity: dict[str, Any]
    stop: Callable[[], bool] = bool
    step: int = 0
    saved: int = 0
    ids: list[str] = field(default_factory=list)
    last_save: float = field(default_factory=time.monotonic)


class Stopwatch:
    """Seconds of a step, by part. On CUDA by events in the stream, so that nothing waits for anything until `read`."""

    def __init__(self):
        self.start = time.perf_counter()
        self.parts: list[tuple[str, Any, Any]] = []

    @contextmanager
    def part(self, name: str):
        """Adds the time inside to `name`."""
        start = _now()
        yield
        self.parts.append((name, start, _now()))

    def read(self) -> dict[str, float]:
        """Seconds of each part, and of the whole `step` until now, after everything that was launched is done."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        for name, start, end in self.parts:
            took = end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
            seconds[name] = seconds.get(name, 0.0) + took
        return seconds | {"step": time.perf_counter() - self.start}


def _now() -> Any:
    """A moment: of the processor, or of the GPU when it comes to it."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def train(run: Training) -> bool:
    """Trains from `run.step` to `run.num_steps`, logging every step. True if it got there, False if it was asked to stop.

    Every rank calls this; what is logged is of all of them, and only rank 0 writes. A run that is asked to stop does so before
    the next micro-batch: it drops the unfinished step and saves the last complete one.

    Raises:
        TrainingDiverged: a loss or gradient is not finite; names step, records and terms. Nothing is saved.
    """
    processes = run.processes
    if run.step == 0:
        validate(run)  # the untrained model; and whatever is wrong with the validation is found in the first minute
    while run.step < run.num_steps:
        watch = Stopwatch()
        with watch.part("data"):
            micro_batches = run.stream.micro_batches(run.step)
        run.ids = [name for micro in micro_batches for name in micro.batch.ids]
        collected: list[LossTerms] = []
        for micro in micro_batches:
            if processes.any(run.stop()):
                save(run)
                return False
            with watch.part("data"):
                batch = micro.batch.to(processes.device)
            with watch.part("forward"):
                terms = run.loss(run.parallel.denoiser, batch, micro.random)
            with watch.part("backward"):
                run.parallel.backward(micro.share * terms.loss.mean(), last=micro is micro_batches[-1])
            collected.append(terms)
        with watch.part("optimizer"):
            grad_norm = run.optimizer.clip_gradients()
            check_finite(collected, grad_norm, run.step, [micro.batch.ids for micro in micro_batches])
            run.parallel.step(run.optimizer, run.step)
        run.step += 1

        counted = [terms for micro, terms in zip(micro_batches, collected, strict=True) if micro.share]
        numbers = over_ranks(
            processes,
            sums(counted) | {f"seconds/{name}": (value, 1) for name, value in watch.read().items()},
            memory(),
        )
        numbers["samples_per_s"] = run.stream.num_samples(run.step - 1) / numbers["seconds/step"]
        run.loggers.log(run.step, numbers | {"grad_norm": grad_norm.item()} | run.optimizer.numbers())
        ends = run.step == run.num_steps
        validates = run.validate is not None and (ends or run.step % run.intervals.validate == 0)
        late = time.monotonic() - run.last_save > 60 * run.intervals.save_minutes
        if processes.any(ends or validates or late or run.step % run.intervals.save == 0):
            save(run)
        if validates:
            validate(run)
    return True


def save(run: Training) -> None:
    """Writes a checkpoint of the last complete step, unless there is one."""
    if run.saved == run.step:
        return
    check_agreement(run.processes, run.step, run.adapter, run.optimizer)
    if run.processes.is_main:
        identity = run.identity | {"loggers": run.loggers.state()}
        run.loggers.artifact(run.step, run.checkpoints.save(run.step, run.adapter, run.optimizer, identity))
    run.saved, run.last_save = run.step, time.monotonic()


def validate(run: Training) -> None:
    """Validates with the averaged weights. Once training has begun, a failure is shown and the run goes on."""
    if run.validate is None:
        return
    with run.parallel.averaged(run.optimizer):
        try:
            result = run.validate(run.parallel.denoiser, run.step)
        except Exception as error:
            if run.step == 0 or not (isinstance(error, ValidationFailed) or run.processes.world_size == 1):
                raise  # among several, a rank that failed by itself is out of step with the others
            result = None
            run.loggers.problem(f"the validation after step {run.step} failed: {type(error).__name__}: {error}")
    if result is not None:
        numbers = {f"validation/{name}": value for name, value in result.numbers.items()}
        run.loggers.log(run.step, numbers)
        run.loggers.images(run.step, result.images)
        if run.processes.is_main:
            run.checkpoints.judge(run.step, numbers)


def check_finite(collected: list[LossTerms], grad_norm: Tensor, step: int, ids: list[list[str]]) -> None:
    """Raises `TrainingDiverged` unless every loss and the gradient are finite. Asked once a step: the GPU must be waited for."""
    asked = [*(terms.loss.detach().isfinite().all() for terms in collected), grad_norm.isfinite()]
    finite = torch.stack([each.to(asked[0].device) for each in asked]).tolist()  # masters may be on the CPU
    if all(finite):
        return
    first = finite.index(False)
    guilty = ids[first] if first < len(ids) else [name for group in ids for name in group]
    terms = collected[min(first, len(ids) - 1)]
    shown = {name: [round(x, 4) for x in value.tolist()] for name, value in terms.logged.items()}
    raise TrainingDiverged(
        f"step {step + 1}: loss or gradient is not finite for the records {', '.join(guilty)}; terms {shown}. "
        "Nothing was saved: resume from the last checkpoint with a smaller learning rate, or check these records"
    )


def sums(collected: list[LossTerms]) -> Sums:
    """`loss`, and every term over the samples that have it (the others are NaN)."""
    losses = [loss for terms in collected for loss in terms.loss.detach().double().tolist()]
    totals: Sums = {"loss": (sum(losses), len(losses))}
    for name in {name: None for terms in collected for name in terms.logged}:
        values = torch.cat([terms.logged[name] for terms in collected if name in terms.logged])
        totals[f"loss/{name}"] = values.double().nansum().item(), int((~values.isnan()).sum())
    return totals


def over_ranks(processes: Processes, totals: Sums, peaks: dict[str, float]) -> dict[str, float]:
    """Means over all samples of all ranks, and the largest of the peaks. The same on every rank."""
    gathered = processes.gather((totals, peaks))
    numbers = {}
    for name in {name: None for part, _ in gathered for name in part}:
        values, counts = zip(*(part[name] for part, _ in gathered if name in part), strict=True)
        if sum(counts):
            numbers[name] = sum(values) / sum(counts)
    return numbers | {name: max(part[name] for _, part in gathered) for name in peaks}


def check_agreement(processes: Processes, step: int, adapter: Adapter, optimizer: Optimizer) -> None:
    """Raises `TrainingDiverged` unless every rank holds bit for bit the same weights and step size, as it must."""
    total = torch.stack([weight.double().sum() for weight in adapter.state_dict().values()]).sum().item()
    everyone = processes.gather((total, optimizer.numbers()))
    if any(each != everyone[0] for each in everyone):
        raise TrainingDiverged(
            f"step {step}: the ranks disagree on weights or step size: {everyone}. Nothing was saved"
        )


def memory() -> dict[str, float]:
    """Peak memory in GiB: of the accelerator if there is one, else of this process."""
    if torch.cuda.is_available():
        return {"memory_peak_gib": torch.cuda.max_memory_allocated() / 2**30}
    return {"memory_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
