"""What an evaluation measures of pictures that are there: their scores, and what is kept to be shown."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from data_prep.cache.sizes import image_size
from data_prep.files import atomic_file
from data_prep.jobs.progress import progress
from data_prep.model.geometry import Size, to_pixels
from data_prep.rows.images import RejectedImage, open_image
from data_prep.rows.rows import RejectedRow, Row
from eval.scores.methods import Method
from eval.scores.metrics.catalog import Battery
from eval.scores.metrics.metric import Example, Scores
from eval.scores.metrics.registration import registration_scores
from eval.scores.row_results import (
    GRID_ROWS,
    QUALITY,
    SOURCE,
    TARGET,
    RowResult,
    Truth,
    method_label,
    read_truth,
    unit_image,
    write_results,
)
from train.record.loggers import Picture

Kind = Literal["edit", "source", "target"]


@dataclass
class Measured:
    """Rows' scores of one method: an adapter (or the base) at a step count, the source unchanged, or the target."""

    name: str
    """`lbm/steps_4`, `source`, `target`."""
    adapter: str | None = None
    steps: int | None = None
    objective: str | None = None
    seconds: float | None = None
    """Per edit, the median."""
    rows: dict[str, Scores] = field(default_factory=dict)
    """By the row's id."""
    whole: Scores = field(default_factory=dict)
    """Scores of all images together."""
    kind: Kind = "edit"
    """Names do not say it: a run may be called `target`."""
    baseline: str | None = None
    """For an edit: the name of the unchanged source at its size."""


class Recorder:
    """Measures the pictures of methods, and the sources and targets beside them at each size that they have.

    Args:
        battery: the metrics.
        folder: where `pictures/` is written, and for every subject its `metrics.json`, `grid.png` and `row-N.jpg`.

    Attributes:
        methods: what was measured, by name, sources and targets among them.
        prompts: by the row's id, in the order of the rows.
    """

    def __init__(self, battery: Battery, folder: Path):
        self.battery, self.folder = battery, folder
        self.methods: dict[str, Measured] = {}
        self.prompts: dict[str, str] = {}
        self._numbers: dict[str, int] = {}

    def measure(self, rows: Sequence[Row], methods: Sequence[Method]) -> list[Row | RejectedRow]:
        """Scores every row's pictures, of which each method has one. Returns the rows, rejected where a file cannot be used."""
        answers: list[Row | RejectedRow] = []
        sources = baselines(rows, methods)
        with progress("measuring", len(rows)) as advance:
            for row in rows:
                try:
                    pictures = {method.name: to_pixels(open_image(method.files[row.id])) for method in methods}
                    truths = {size: _truth(row, size) for size in {pixels.shape[1:] for pixels in pictures.values()}}
                except RejectedImage as error:
                    answers.append(RejectedRow(row.number, row.id, str(error.path), error.reason))
                else:
                    answers.append(row)
                    self.prompts[row.id], self._numbers[row.id] = row.prompt, len(self._numbers)
                    for method, pixels in zip(methods, pictures.values(), strict=True):
                        self._score(row, method, (pixels + 1) / 2, truths[pixels.shape[1:]], sources[method.name])
                advance(1)
        for name, measured in self.methods.items():
            measured.whole = self.battery.of_sets(name) if measured.kind != "target" else {}
        return answers

    def _score(self, row: Row, method: Method, unit: Tensor, truth: Truth, source: str) -> None:
        """Of one picture, and of its row's source and target where they were not measured at this size."""
        baseline = self.methods.setdefault(source, Measured(source, kind="source"))
        if row.id not in baseline.rows:
            self._record(truth.example(row.id, row.prompt, source, truth.source))
            self._record_target(truth.example(row.id, row.prompt, source.replace(SOURCE, TARGET), truth.target))
        made = Measured(
            *(method.name, method.subject, method.steps, method.objective, method.median_seconds), baseline=source
        )
        self.methods.setdefault(method.name, made)
        self._record(truth.example(row.id, row.prompt, method.name, unit))

    def write(self, methods: Sequence[Method]) -> dict[str, list[Picture]]:
        """Writes a folder for every subject.

        Returns:
            By subject, the rows that were written by themselves, from the first on.
        """
        shown: dict[str, list[Picture]] = {}
        for subject in dict.fromkeys(method.subject for method in methods):
            own = [method for method in methods if method.subject == subject]
            source = self.methods[own[0].name].baseline or SOURCE
            names = {SOURCE: source, **{method.column: method.name for method in own}}
            rows = [
                RowResult(row, prompt, {column: self.methods[name].rows[row] for column, name in names.items()})
                for row, prompt in self.prompts.items()
            ]
            for row in rows[:GRID_ROWS]:
                for column, name in {**names, TARGET: source.replace(SOURCE, TARGET)}.items():
                    row.pictures[column] = open_image(self.picture(name, row.id))
            seconds = {method.column: list(method.seconds) for method in own}
            folder = self.folder / subject
            _, pictures = write_results(folder, rows, rows[:GRID_ROWS], seconds, own[0].sampler)
            shown[subject] = [picture for name, picture in pictures.items() if name != "grid"]
        return shown

    def picture(self, method: str, row: str) -> Path:
        """The file of a row's picture by a method; full size, as JPEG."""
        return self.folder / "pictures" / method / f"{self._numbers[row]:05d}.jpg"

    def _record(self, example: Example) -> None:
        self._save(example)
        self.methods[example.method].rows[example.id] = self.battery(example)

    def _record_target(self, example: Example) -> None:
        """The target drifts too, in data made by a model: what a trained model can be expected to do."""
        self._save(example)
        drift = registration_scores(example.source, example.target, example.background)
        if scores := {metric: value for metric, value in drift.items() if metric in self.battery.chosen}:
            measured = self.methods.setdefault(example.method, Measured(example.method, kind="target"))
            measured.rows[example.id] = scores

    def _save(self, example: Example) -> None:
        with atomic_file(self.picture(example.method, example.id)) as temporary:
            unit_image(example.prediction).save(temporary, format="jpeg", quality=QUALITY)


def _truth(row: Row, size: Sequence[int]) -> Truth:
    return read_truth(row.ref_gt or row.image, row.edit_image[row.bridge_image], row.back_mask, Size(*size))


def baselines(rows: Sequence[Row], methods: Sequence[Method]) -> dict[str, str]:
    """`source`, or `source-2` and on for methods whose pictures of these rows have other sizes than the first's, by method's
    name."""
    sizes = {method.name: tuple(image_size(method.files[row.id]) for row in rows) for method in methods}
    places = list(dict.fromkeys(sizes.values()))
    numbers = {name: places.index(each) + 1 for name, each in sizes.items()}
    return {name: SOURCE if number == 1 else f"{SOURCE}-{number}" for name, number in numbers.items()}


def label(method: str, kind: Kind) -> str:
    """`lbm, 4 steps` for the edit `lbm/steps_4`; `source unchanged` and `target, size 2` for `source` and `target-2`."""
    if kind == "edit":
        return method_label(method)
    words = {SOURCE: "source unchanged", TARGET: "target"}[kind]
    number = method.partition("-")[2]
    return f"{words}, size {number}" if number else words
