"""Scores a denoiser on held-out rows: what it makes of each source, beside the target and beside doing nothing."""

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from data_prep.cache.batches import collate
from data_prep.cache.reader import CacheReader, Record
from data_prep.errors import InputError
from data_prep.files import atomic_file, write_text
from data_prep.jobs.progress import progress
from data_prep.model.geometry import LATENT_CELL, Size, fit, fit_back_mask, to_image, to_pixels
from data_prep.rows.images import open_image, open_mask
from eval.qwen.samplers import Sampler, describe_sampler
from eval.scores.fidelity import compare, mean_scores
from eval.scores.grid import GridRow, draw_grid, side_by_side
from eval.scores.metrics.metric import Example, Scores
from losses.randomness import SampleRandom
from train.loop import ValidationFailed
from train.parallel.processes import Processes
from train.record.loggers import Picture

SOURCE = "source"
"""The baseline's name among the methods: the source image, returned unchanged."""
TARGET = "target"

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


@dataclass
class RowResult:
    """One row: its scores by method (`source`, `steps_1`, …) and, if it is shown, its pictures at the target's size."""

    id: str
    prompt: str
    scores: dict[str, Scores] = field(default_factory=dict)
    pictures: dict[str, Image.Image] = field(default_factory=dict)
    """By method, and the `target`."""


class Validation:
    """Edits fixed rows from fixed seeds with every step count, and writes `metrics.json`, `grid.png` and `row-N.jpg`.

    Args:
        reader: the cache of the held-out rows. Targets, sources and masks are read from the rows' own files.
        decode: latents (B, 16, h, w) -> pixels (B, 3, 8h, 8w) in about [-1, 1].
        folder: where `step-NNNNNN/` folders are written.
        sampler: makes the edited latents.
        white: another one, for the second stream of a bridge; its methods are `white/steps_1` and so on.
        steps: step counts to try, each a column of the grid.
        num_rows: rows to use, chosen by `seed` and the same ever after; all of them if there are fewer.
        batch_size: rows of one bucket that are sampled together; it changes no result but by rounding.
        seed: of the choice of rows and of every row's noise.
        grid_rows: rows that the picture shows.
        show_progress: draw a bar on stderr; not inside a training, which has its own.
        processes: those that share the rows out and all call this; rank 0 writes. None for one process.
        scorer: what is measured of every picture, and of every row's source; PSNR and SSIM by default.

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
        try:
            return self._write(rows, seconds, folder)
        except OSError as error:  # the other ranks have done their part
            raise ValidationFailed(f"{type(error).__name__}: {error}") from error

    def _write(self, rows: dict[int, RowResult], seconds: dict[str, list[float]], folder: Path) -> ValidationResult:
        """The files, and what the loggers get."""
        results = [rows[index] for index in self.rows]
        metrics = summarise(results, seconds) | {"sampler": describe_sampler(self.sampler)}
        pictures = self._pictures(folder, [rows[index] for index in self.rows if index in self.shown])
        write_text(folder / "metrics.json", json.dumps(metrics, indent=1, ensure_ascii=False) + "\n")
        methods = [SOURCE, *self._methods()]
        numbers = {f"{method}/{name}": value for method in methods for name, value in metrics[method].items()}
        numbers |= {f"{method}/seconds_per_edit": value for method, value in metrics["seconds_per_edit"].items()}
        return ValidationResult(numbers, pictures)

    def _pictures(self, folder: Path, rows: list[RowResult]) -> dict[str, Picture]:
        """Writes the grid, and every shown row by itself in full size."""
        with atomic_file(folder / "grid.png") as temporary:
            self._draw(rows).save(temporary, format="png")
        pictures = {"validation/grid": Picture(folder / "grid.png")}
        last = f"steps_{self.steps[-1]}"
        for number, row in enumerate(rows):
            file = folder / f"row-{number}.jpg"
            with atomic_file(file) as temporary:
                strip = side_by_side([row.pictures[name] for name in (SOURCE, last, TARGET)])
                strip.save(temporary, format="jpeg", quality=92)
            pictures[f"validation/row-{number}"] = Picture(
                file, f"{row.prompt} · {row.scores[last]['psnr']:.1f} dB ({row.id}: source, {last}, target)"
            )
        written = {picture.path for picture in pictures.values()}
        for old in set(folder.glob("row-*.jpg")) - written:  # of an earlier run with more rows
            old.unlink()
        return pictures

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
                            each.score(method, prediction)
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

    def _draw(self, rows: list[RowResult]) -> Image.Image:
        steps = {method: method_label(method) for method in self._methods()}
        lines = []
        for row in rows:
            pictures = [row.pictures[name] for name in (SOURCE, *steps, TARGET)]
            captions = [f"{row.scores[method]['psnr']:.1f} dB" for method in (SOURCE, *steps)]
            lines.append(GridRow(row.prompt, pictures, [*captions, ""]))
        return draw_grid(["source", *steps.values(), "target"], lines)


@contextmanager
def noting(failures: list[str], world_size: int) -> Iterator[None]:
    """Among several processes, notes an error instead of raising it: the others need this one for their forward passes."""
    try:
        yield
    except Exception as error:
        if world_size == 1:
            raise
        failures.append(f"{type(error).__name__}: {error}")


def method_label(method: str) -> str:
    """`4 steps` for `steps_4`, `white, 4 steps` for `white/steps_4`."""
    start, _, steps = method.rpartition("/")
    label = steps_label(int(steps.removeprefix("steps_")))
    return f"{start}, {label}" if start else label


def steps_label(steps: int) -> str:
    """`4 steps`."""
    return f"{steps} step{'s' * (steps > 1)}"


def choose_rows(available: int, num_rows: int, seed: int) -> list[int]:
    """`num_rows` of the indices below `available`, in order; random, since neighbours in a file are often alike."""

    def draw(index: int) -> bytes:
        return hashlib.blake2b(f"{seed}/{index}/validation".encode(), digest_size=8).digest()

    return sorted(sorted(range(available), key=draw)[:num_rows])


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


def summarise(rows: Sequence[RowResult], seconds: dict[str, list[float]]) -> dict[str, Any]:
    """The content of `metrics.json`: means by method, over all rows and per instruction, and every row's scores.

    `seconds_per_edit` is the median over batches of sampling and decoding.
    """
    by_prompt: dict[str, list[RowResult]] = {}
    for row in rows:
        by_prompt.setdefault(row.prompt, []).append(row)
    return {
        "num_rows": len(rows),
        **_means(rows),
        "seconds_per_edit": {method: statistics.median(values) for method, values in seconds.items()},
        "by_prompt": {prompt: {"num_rows": len(some), **_means(some)} for prompt, some in by_prompt.items()},
        "per_row": [{"id": row.id, "prompt": row.prompt, **row.scores} for row in rows],
    }


def _means(rows: Sequence[RowResult]) -> dict[str, Scores]:
    return {method: mean_scores([row.scores[method] for row in rows]) for method in rows[0].scores}


@dataclass
class _Files:
    """What a row's files say, and the row's result so far."""

    result: RowResult
    scorer: Scorer
    target: Tensor
    source: Tensor
    background: Tensor | None
    keep: bool
    """Keep the pictures, to show them."""

    def score(self, method: str, prediction: Tensor) -> None:
        """Scores pixels (3, H, W) in about [-1, 1]."""
        unit = (prediction.clamp(-1, 1) + 1) / 2
        row = self.result
        example = Example(row.id, row.prompt, method, unit, self.target, self.source, self.background)
        row.scores[method] = self.scorer(example)
        if self.keep:
            self.result.pictures[method] = to_image(prediction)


def _read_files(record: Record, scorer: Scorer, keep: bool) -> _Files:
    """Reads target, source and mask at the size of the record's target, and scores the source."""
    row, size = record.row, Size(*(side * LATENT_CELL for side in record.target_latents.shape[-2:]))
    target = fit(open_image(_truth(row)), size)
    source = fit(open_image(_start(row)), size)
    background = None
    if row["back_mask"]:
        background = torch.from_numpy(np.array(fit_back_mask(open_mask(row["back_mask"]), size)) >= 128)
    before, truth = (to_pixels(image) for image in (source, target))
    files = _Files(RowResult(record.id, row["prompt"]), scorer, (truth + 1) / 2, (before + 1) / 2, background, keep)
    files.score(SOURCE, before)
    if keep:
        files.result.pictures[TARGET] = target
    return files


def _truth(row: dict[str, Any]) -> str:
    """The file that the prediction is compared with."""
    return row["ref_gt"] or row["image"]


def _start(row: dict[str, Any]) -> str:
    """The file of the bridge's source."""
    return row["edit_image"][row["bridge_image"]]


def _check_files(row: dict[str, Any]) -> None:
    """Finds a missing file before the training, and not when it is first needed."""
    for path in filter(None, (_truth(row), _start(row), row["back_mask"])):
        if not Path(path).is_file():
            raise InputError(f"validation row {row['id']!r} names {path}, which is gone: restore it or remove the row")
