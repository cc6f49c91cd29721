"""The training loop."""

import resource
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from data_prep.batches import BatchStream
from losses.batch import Batch
from losses.randomness import SampleRandom
from losses.terms import LossTerms
from train.adapter import Adapter
from train.checkpoint import Checkpoints
from train.denoiser import Denoiser
from train.loggers import Loggers
from train.optim import Optimizer

Loss = Callable[[Denoiser, Batch, SampleRandom], LossTerms]


class ValidationResult(Protocol):
    """What a validation returns."""

    numbers: dict[str, float]
    images: dict[str, Path]


class TrainingDiverged(RuntimeError):
    """A loss or a gradient is not finite. The last checkpoint is from before."""


@dataclass
class Every:
    """Steps between events; each also happens at the end."""

    save: int
    validate: int


@dataclass
class Stopwatch:
    """Seconds of a step, by part."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str):
        """Adds the time inside to `name`."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def numbers(self, num_samples: int) -> dict[str, float]:
        """`seconds/<part>`, their sum and samples per second."""
        total = sum(self.seconds.values())
        parts = {f"seconds/{name}": value for name, value in self.seconds.items()}
        return parts | {"seconds/step": total, "samples_per_s": num_samples / total}


def train(
    denoiser: Denoiser,
    adapter: Adapter,
    loss: Loss,
    optimizer: Optimizer,
    stream: BatchStream,
    checkpoints: Checkpoints,
    loggers: Loggers,
    validate: Callable[[Denoiser, int], ValidationResult] | None,
    every: Every,
    first_step: int,
    num_steps: int,
    seed: int,
    device: torch.device,
    identity: dict[str, Any],
    max_grad_norm: float | None = None,
) -> None:
    """Trains from `first_step` (steps done) to `num_steps`, logging every step.

    `identity` is saved with each checkpoint, to find out whether a continued run still has the same data.

    Raises:
        TrainingDiverged: a loss or gradient is not finite; names step, records and terms. Nothing is saved.
    """
    parameters = adapter.parameters()
    for step in range(first_step, num_steps):
        watch = Stopwatch()
        with watch.part("data"):
            micro_batches = stream.micro_batches(step)
        collected: list[LossTerms] = []
        for micro in micro_batches:
            with watch.part("data"):
                batch = micro.batch.to(device)
            with watch.part("forward"):
                terms = loss(denoiser, batch, SampleRandom(seed, micro.numbers))
            check_finite(terms.loss, step, batch.ids, terms)
            with watch.part("backward"):
                (terms.loss.mean() / len(micro_batches)).backward()
            collected.append(terms)
        with watch.part("optimizer"):
            grad_norm = gradient_norm(parameters, max_grad_norm)
            check_finite(grad_norm, step, [id for micro in micro_batches for id in micro.batch.ids], collected[-1])
            optimizer.step(step)

        done = step + 1
        numbers = means(collected) | {"grad_norm": grad_norm.item()} | optimizer.numbers()
        loggers.log(done, numbers | watch.numbers(sum(map(len, (t.loss for t in collected)))) | memory())
        if validate and (done % every.validate == 0 or done == num_steps):
            with optimizer.averaged():
                result = validate(denoiser, done)
            loggers.log(done, {f"validation/{name}": value for name, value in result.numbers.items()})
            loggers.images(done, result.images)
        if done % every.save == 0 or done == num_steps:
            checkpoints.save(done, adapter, optimizer, identity)


def gradient_norm(parameters: list[nn.Parameter], max_norm: float | None) -> Tensor:
    """The norm of all gradients together, which are scaled down to `max_norm` if they exceed it."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def check_finite(values: Tensor, step: int, ids: list[str], terms: LossTerms) -> None:
    """Raises `TrainingDiverged` unless every value is finite."""
    if not bool(values.isfinite().all()):
        shown = {name: [round(x, 4) for x in value.tolist()] for name, value in terms.logged.items()}
        raise TrainingDiverged(
            f"step {step + 1}: loss or gradient is not finite for the records {', '.join(ids)}; terms {shown}. "
            "Nothing was saved: resume from the last checkpoint with a smaller learning rate, or look at these records"
        )


def means(collected: list[LossTerms]) -> dict[str, float]:
    """`loss` and every term, averaged over the samples of the global batch that have it."""
    losses = torch.cat([terms.loss.detach() for terms in collected])
    numbers = {"loss": losses.mean().item()}
    for name in {name: None for terms in collected for name in terms.logged}:
        values = torch.cat([terms.logged[name] for terms in collected if name in terms.logged])
        if not bool(values.isnan().all()):
            numbers[f"loss/{name}"] = values.nanmean().item()
    return numbers


def memory() -> dict[str, float]:
    """Peak memory in GiB: of the accelerator if there is one, else of this process."""
    if torch.cuda.is_available():
        return {"memory_peak_gib": torch.cuda.max_memory_allocated() / 2**30}
    return {"memory_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
