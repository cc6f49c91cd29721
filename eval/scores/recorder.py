"""What an evaluation keeps of every picture: its scores, and the picture itself on disk."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from data_prep.files import atomic_file
from data_prep.model.geometry import Geometry, to_image
from eval.scores.metrics.catalog import Battery
from eval.scores.metrics.metric import Example, Scores
from eval.scores.metrics.registration import registration_scores
from eval.scores.validation import SOURCE, TARGET, method_label

QUALITY = 92
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
    """Of all pictures together."""
    kind: Kind = "edit"
    """Names do not say it: a run may be called `target`."""
    baseline: str | None = None
    """Of an edit: the name of the source unchanged at its size."""


class Recorder:
    """The scorer of a validation, which knows whose pictures it is shown.

    Sources and targets are measured and kept once for all adapters of one geometry.

    Args:
        battery: the metrics.
        folder: where `pictures/` is written.
    """

    def __init__(self, battery: Battery, folder: Path):
        self.battery, self.folder = battery, folder / "pictures"
        self.methods: dict[str, Measured] = {}
        self.prompts: dict[str, str] = {}
        """By the row's id, in the order of the dataset as it is scored."""
        self._numbers: dict[str, int] = {}
        self._geometries: list[Geometry] = []
        self._adapter, self._objective = "", ""

    def begin(self, adapter: str, objective: str, geometry: Geometry) -> None:
        """The pictures to come are this adapter's."""
        self._adapter, self._objective = adapter, objective
        if geometry not in self._geometries:
            self._geometries.append(geometry)
        number = self._geometries.index(geometry)
        self._suffix = f"-{number + 1}" if number else ""

    def __call__(self, example: Example) -> Scores:
        self.prompts.setdefault(example.id, example.prompt)
        self._numbers.setdefault(example.id, len(self._numbers))
        if example.method != SOURCE:
            steps = int(example.method.removeprefix("steps_"))
            name = f"{self._adapter}/{example.method}"
            baseline = SOURCE + self._suffix
            made = Measured(name, self._adapter, steps, self._objective, baseline=baseline)
            self.methods.setdefault(name, made)
            return self._record(name, example)
        name = SOURCE + self._suffix
        measured = self.methods.setdefault(name, Measured(name, kind="source"))
        if example.id not in measured.rows:
            self._record(name, example)
            self._record_target(example)
        return measured.rows[example.id]

    def finish(self, seconds: dict[str, float]) -> None:
        """The adapter's pictures are all there.

        Args:
            seconds: per edit, by step count (`steps_4`).
        """
        for method, value in seconds.items():
            self.methods[f"{self._adapter}/{method}"].seconds = value
        for name in (SOURCE + self._suffix, *(f"{self._adapter}/{method}" for method in seconds)):
            self.methods[name].whole = self.battery.of_sets(name)

    def picture(self, method: str, row: str) -> Path:
        """The file of a row's picture by a method; full size, as JPEG."""
        return self.folder / method / f"{self._numbers[row]:05d}.jpg"

    def _record(self, name: str, example: Example) -> Scores:
        self._save(name, example.id, example.prediction)
        scores = self.battery(replace(example, method=name))
        self.methods[name].rows[example.id] = scores
        return scores

    def _record_target(self, example: Example) -> None:
        """The target drifts too, in data made by a model: what a trained model can be expected to do."""
        name = TARGET + self._suffix
        self._save(name, example.id, example.target)
        drift = registration_scores(example.source, example.target, example.background)
        scores = {metric: value for metric, value in drift.items() if metric in self.battery.chosen}
        if scores:
            self.methods.setdefault(name, Measured(name, kind="target")).rows[example.id] = scores

    def _save(self, method: str, row: str, pixels: Tensor) -> None:
        with atomic_file(self.picture(method, row)) as temporary:
            to_image(pixels * 2 - 1).save(temporary, format="jpeg", quality=QUALITY)


def label(method: str) -> str:
    """`lbm, 4 steps` for `lbm/steps_4`; `source unchanged`."""
    if "/" in method:
        return method_label(method)
    kind, _, number = method.partition("-")
    words = {SOURCE: "source unchanged", TARGET: "target"}[kind]
    return f"{words}, size {number}" if number else words
