"""The training loop."""

import resource
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass
class Every:
    """Steps between events; each also happens at the end."""

    save: int
    validate: int


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
        """Of each part, and of the whole `step` until now, when all that was launched is done."""
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


def train(
    processes: Processes,
    parallel: Parallel,
    adapter: Adapter,
    loss: Loss,
    optimizer: Optimizer,
    stream: BatchStream,
    checkpoints: Checkpoints,
    loggers: Loggers,
    validate: Callable[[nn.Module, int], ValidationResult] | None,
    every: Every,
    first_step: int,
    num_steps: int,
    identity: dict[str, Any],
    max_grad_norm: float | None = None,
) -> None:
    """Trains from `first_step` (steps done) to `num_steps`, logging every step.

    Every rank calls this; what is logged is of all of them, and only rank 0 writes. `identity` is saved with each
    checkpoint, to find out whether a continued run still has the same data.

    Raises:
        TrainingDiverged: a loss or gradient is not finite; names step, records and terms. Nothing is saved.
    """
    parameters = adapter.parameters()
    parallel.publish()
    for step in range(first_step, num_steps):
        watch = Stopwatch()
        with watch.part("data"):
            micro_batches = stream.micro_batches(step)
        collected: list[LossTerms] = []
        for micro in micro_batches:
            with watch.part("data"):
                batch = micro.batch.to(processes.device)
            with watch.part("forward"):
                terms = loss(parallel.denoiser, batch, micro.random)
            with watch.part("backward"):
                parallel.backward(micro.share * terms.loss.mean(), last=micro is micro_batches[-1])
            collected.append(terms)
        with watch.part("optimizer"):
            grad_norm = gradient_norm(parameters, max_grad_norm)
            check_finite(collected, grad_norm, step, [micro.batch.ids for micro in micro_batches])
            optimizer.step(step)
            parallel.publish()

        done = step + 1
        counted = [terms for micro, terms in zip(micro_batches, collected, strict=True) if micro.share]
        numbers = over_ranks(
            processes,
            sums(counted) | {f"seconds/{name}": (value, 1) for name, value in watch.read().items()},
            memory(),
        )
        numbers["samples_per_s"] = stream.num_samples(step) / numbers["seconds/step"]
        loggers.log(done, numbers | {"grad_norm": grad_norm.item()} | optimizer.numbers())
        if validate and (done % every.validate == 0 or done == num_steps):
            with optimizer.averaged():
                parallel.publish()
                result = validate(parallel.denoiser, done)
            parallel.publish()
            loggers.log(done, {f"validation/{name}": value for name, value in result.numbers.items()})
            loggers.images(done, result.images)
        if done % every.save == 0 or done == num_steps:
            check_agreement(processes, done, adapter, optimizer)
            if processes.is_main:
                folder = checkpoints.save(done, adapter, optimizer, identity | {"loggers": loggers.state()})
                loggers.artifact(done, folder)


def gradient_norm(parameters: list[nn.Parameter], max_norm: float | None) -> Tensor:
    """The norm of all gradients together, which are scaled down to `max_norm` if they exceed it."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


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
        "Nothing was saved: resume from the last checkpoint with a smaller learning rate, or look at these records"
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
