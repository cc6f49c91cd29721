"""Scores a denoiser on held-out rows: what it makes of each source, beside the target and beside doing nothing."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_prep.cache.batches import collate
from data_prep.cache.reader import CacheReader, Record
from data_prep.errors import InputError
from data_prep.jobs.progress import progress
from data_prep.model.geometry import LATENT_CELL, Size
from eval.qwen.samplers import Sampler, describe_sampler
from eval.scores.fidelity import compare
from eval.scores.metrics.metric import Example, Scores
from eval.scores.row_results import SOURCE, TARGET, RowResult, Truth, read_truth, unit_image, write_results
from eval.scores.splits import choose_rows
from losses.randomness import SampleRandom
from train.loop import ValidationFailed
from train.parallel.processes import Processes
from train.record.loggers import Picture

Scorer = Callable[[Example], Scores]
"""Numbers of one picture, by metric."""


def basic_scores(example: Example) -> Scores:
    """PSNR and SSIM, against the target: what needs no weights and little time."""
    return compare(example.prediction, example.target, example.background)


@dataclass
class ValidationResult:
    """What the loggers get."""

    numbers: dict[str, float]
    """`source/psnr`, `steps_4/ssim`, `steps_4/seconds_per_edit`, `white/steps_4/psnr`, …"""
    images: dict[str, Picture]
    """`validation/grid`: the picture grid; `validation/row-0` and on: source, edit with most steps, and target of a row."""


class Validation:
    """Edits fixed rows from fixed seeds with every step count, and writes `metrics.json`, `grid.png` and `row-N.jpg`.

    Args:
        reader: the cache of the held-out rows. Targets, sources and masks are read from the rows' own files.
        decode: latents (B, 16, h, w) -> pixels (B, 3, 8h, 8w) in about [-1, 1].
        folder: where `step-NNNNNN/` folders are written.
        sampler: sampler that makes the edited latents.
        white: sampler for the sub stream of a bridge, which starts from white. Its numbers are called `white/steps_1/…`.
        steps: numbers of sampling steps to validate with. Each is a column of the picture grid.
        num_rows: number of held-out rows to use, chosen by `seed` and the same in every validation.
        batch_size: number of rows of one bucket that are sampled together. It changes results only by rounding.
        seed: random seed for choosing the rows and for the noise of each row.
        grid_rows: number of rows in the picture grid.
        show_progress: show a progress bar on stderr. A training has its own, so leave this off there.
        processes: those that share the rows out and all call this; rank 0 writes. None for one process.
        scorer: metrics to measure on each edit and on each row's unchanged source. By default they are PSNR and SSIM.

    Raises:
        ValueError: a number is not positive, or there are no rows.
        InputError: a file that a row names is gone.
    """

    def __init__(
        self,
        reader: CacheReader,
        decode: Callable[[Tensor], Tensor],
        folder: str | Path,
        sampler: Sampler,
        steps: Sequence[int] = (1, 4),
        num_rows: int = 16,
        batch_size: int = 1,
        seed: int = 0,
        grid_rows: int = 8,
        show_progress: bool = False,
        processes: Processes | None = None,
        scorer: Scorer = basic_scores,
        white: Sampler | None = None,
    ):
        sizes = {"num_rows": num_rows, "batch_size": batch_size, "grid_rows": grid_rows, "steps": min(steps, default=0)}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"validate.{name} must be positive, got {value}")
        if len(reader) == 0:
            raise ValueError("validation needs at least one row, the cache has none")
        self.reader, self.decode, self.folder = reader, decode, Path(folder)
        self.sampler, self.white, self.steps, self.seed, self.batch_size = (
            sampler,
            white,
            sorted(set(steps)),
            seed,
            batch_size,
        )
        self.show_progress, self.processes, self.scorer = show_progress, processes, scorer
        self.rows = choose_rows(len(reader), num_rows, seed)
        self.shown = set(self.rows[:grid_rows])
        for index in self.rows:
            _check_files(reader[index].row)

    def __call__(self, denoiser: nn.Module, step: int) -> ValidationResult:
        """Scores the denoiser after `step` steps and writes `folder/step-NNNNNN/`."""
        return self.write(denoiser, self.folder / f"step-{step:06d}")

    def write(self, denoiser: nn.Module, folder: Path) -> ValidationResult:
        """Scores the denoiser, which is put back in the mode it was in, and writes the folder's files.

        On other ranks than 0 nothing is written, and the result is empty.
        """
        with evaluating(denoiser), torch.no_grad():
            rows, seconds = self._score(denoiser)
        if self.processes and not self.processes.is_main:
            return ValidationResult({}, {})
        results = [rows[index] for index in self.rows]
        shown = [rows[index] for index in self.rows if index in self.shown]
        try:
            metrics, pictures = write_results(folder, results, shown, seconds, describe_sampler(self.sampler))
        except OSError as error:  # the other ranks have done their part
            raise ValidationFailed(f"{type(error).__name__}: {error}") from error
        numbers = {f"{method}/{name}": value for method in results[0].scores for name, value in metrics[method].items()}
        numbers |= {f"{method}/seconds_per_edit": value for method, value in metrics["seconds_per_edit"].items()}
        return ValidationResult(numbers, {f"validation/{name}": picture for name, picture in pictures.items()})

    def _methods(self) -> dict[str, tuple[Sampler, int]]:
        """`steps_4` -> the sampler and 4; `white/steps_4` -> the one from white and 4."""
        samplers = {"": self.sampler} | ({"white/": self.white} if self.white else {})
        return {f"{name}steps_{n}": (sampler, n) for name, sampler in samplers.items() for n in self.steps}

    def _score(self, denoiser: nn.Module) -> tuple[dict[int, RowResult], dict[str, list[float]]]:
        """Results by index of the reader, and the seconds per edit of every batch by method, of all ranks.

        Every rank samples equally often, because under ZeRO-3 they need each other for a forward pass: a rank that has no
        batch left samples the last one again and forgets it, and one that cannot read or score a row samples on.

        Raises:
            ValidationFailed: some rank could not read or score its rows. Every rank raises it.
        """
        rank, world_size = (self.processes.rank, self.processes.world_size) if self.processes else (0, 1)
        batches = list(self._batches())
        device = next(denoiser.parameters()).device
        rows: dict[int, RowResult] = {}
        seconds: dict[str, list[float]] = {method: [] for method in self._methods()}
        failures: list[str] = []
        with progress("validating", len(self.rows), shown=self.show_progress) as advance:
            for number in range(rank, math.ceil(len(batches) / world_size) * world_size, world_size):
                indices = batches[min(number, len(batches) - 1)]
                records = [self.reader[index] for index in indices]
                edit = collate(records).to(device)
                generator = SampleRandom(self.seed, [record.row["number"] for record in records])
                files: list[_Files] = []
                with noting(failures, world_size):
                    files += [
                        _read_files(record, self.scorer, keep=index in self.shown)
                        for index, record in zip(indices, records, strict=True)
                    ]
                if number < len(batches) and files:
                    rows.update((index, each.result) for index, each in zip(indices, files, strict=True))
                for method, (sampler, num_steps) in self._methods().items():
                    start = time.perf_counter()
                    pixels = self.decode(sampler(denoiser, edit, num_steps, generator)).float().cpu()
                    seconds[method].append((time.perf_counter() - start) / len(indices))
                    with noting(failures, world_size):
                        for each, prediction in zip(files, pixels, strict=bool(files)):
                            each.score(method, (prediction.clamp(-1, 1) + 1) / 2)
                advance(len(indices))
        part = rows, seconds, failures
        parts = self.processes.gather(part) if self.processes else [part]
        if failures := [failure for *_, some in parts for failure in some]:
            raise ValidationFailed(failures[0])
        rows = {index: row for part, *_ in parts for index, row in part.items()}
        return rows, {method: [each for _, part, _ in parts for each in part[method]] for method in seconds}

    def _batches(self) -> Iterator[list[int]]:
        """Rows of one bucket, `batch_size` at a time."""
        for members in self.reader.buckets.values():
            chosen = np.intersect1d(members, self.rows).tolist()
            for start in range(0, len(chosen), self.batch_size):
                yield chosen[start : start + self.batch_size]


@contextmanager
def noting(failures: list[str], world_size: int) -> Iterator[None]:
    """Among several processes, notes an error instead of raising it: the others need this one for their forward passes."""
    try:
        yield
    except Exception as error:
        if world_size == 1:
            raise
        failures.append(f"{type(error).__name__}: {error}")


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every submodule is in the mode that it was in."""
    modes = {each: each.training for each in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for each, training in modes.items():
            each.training = training


@dataclass
class _Files:
    """What a row's files say, and the row's result so far."""

    result: RowResult
    scorer: Scorer
    truth: Truth
    keep: bool
    """Keep the pictures, to show them."""

    def score(self, method: str, unit: Tensor) -> None:
        """Scores pixels (3, H, W) in [0, 1]."""
        self.result.scores[method] = self.scorer(self.truth.example(self.result.id, self.result.prompt, method, unit))
        if self.keep:
            self.result.pictures[method] = unit_image(unit)


def _read_files(record: Record, scorer: Scorer, keep: bool) -> _Files:
    """Reads target, source and mask at the size of the record's target, and scores the source."""
    row, size = record.row, Size(*(side * LATENT_CELL for side in record.target_latents.shape[-2:]))
    truth = read_truth(*_paths(row), size)
    files = _Files(RowResult(record.id, row["prompt"]), scorer, truth, keep)
    files.score(SOURCE, truth.source)
    if keep:
        files.result.pictures[TARGET] = unit_image(truth.target)
    return files


def _paths(row: dict[str, Any]) -> tuple[str, str, str | None]:
    """The files of the ground truth, of the bridge's source, and of the mask if there is one."""
    return row["ref_gt"] or row["image"], row["edit_image"][row["bridge_image"]], row["back_mask"] or None


def _check_files(row: dict[str, Any]) -> None:
    """Finds a missing file before the training, and not when it is first needed."""
    for path in filter(None, _paths(row)):
        if not Path(path).is_file():
            raise InputError(f"validation row {row['id']!r} names {path}, which is gone: restore it or remove the row")
