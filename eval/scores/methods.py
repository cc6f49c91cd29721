"""What is compared: pictures of adapters and of the base, made as a table of edits, or of any other tool, found in a folder."""

import csv
import itertools
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep.cache.sizes import image_size
from data_prep.errors import InputError
from data_prep.model.geometry import Geometry
from data_prep.rows.folders import list_images
from data_prep.rows.rows import EMPTY_PROMPT, RejectedRow, Row
from eval.request.base import BaseEditor
from eval.request.knobs import AdapterUse
from eval.request.metadata import added_modules, describe_adapters
from eval.request.provenance import read_png
from eval.tables.job_files import KeyedJob
from eval.tables.outcomes import FAILED, RESULTS, read_seconds
from eval.tables.table import Job

BASE = "base"
"""The name of the model without an adapter."""
TAKEN = re.compile(rf"edits|pictures|wandb|cache|{BASE}|(source|target)(-\d+)?")
"""Names that no adapter and no folder of pictures has in an evaluation: its folders, and sources and targets of a size."""
OBJECTIVES = {"BridgeSampler": "Latent Bridge Matching", "FlowSampler": "flow matching"}


@dataclass(frozen=True)
class Method:
    """Pictures that are scored together."""

    subject: str
    """Whose they are: an adapter's, the base's, or a folder's name."""
    files: Mapping[str, Path]
    """One for each row, by its id."""
    steps: int | None = None
    seconds: tuple[float, ...] = ()
    """Seconds of sampling and decoding, of the images for which they are known."""
    sampler: dict[str, Any] | None = None
    """What made them."""

    @property
    def column(self) -> str:
        """Its name among those of its subject."""
        return "pictures" if self.steps is None else f"steps_{self.steps}"

    @property
    def name(self) -> str:
        """Its name among all."""
        return self.subject if self.steps is None else f"{self.subject}/{self.column}"

    @property
    def objective(self) -> str | None:
        """In words."""
        name = self.sampler["name"] if self.sampler else None
        return OBJECTIVES.get(name or "", name)

    @property
    def median_seconds(self) -> float | None:
        """Per edit."""
        return statistics.median(self.seconds) if self.seconds else None


@dataclass(frozen=True)
class Contest:
    """Edits of the same rows by several adapters at several step counts, as jobs of a table.

    Args:
        editor: opened, nothing loaded.
        adapters: each is scored by itself.
        base: the model without an adapter is scored too. Beside adapters it is shown pictures of the first one's size.
        knobs: fields of `EditRequest` that all edits have.
        steps: counts; by default (empty) what suits each.
        seed: row n is made with the seed `seed + n`.
    """

    editor: BaseEditor
    adapters: Sequence[AdapterUse]
    base: bool
    knobs: Mapping[str, Any]
    steps: Sequence[int] = ()
    seed: int = 0

    @cached_property
    def subjects(self) -> dict[str, tuple[AdapterUse, ...]]:
        """Names, and what each uses."""
        named = zip(own_names(run_name(use.path) for use in self.adapters), self.adapters, strict=True)
        found: dict[str, tuple[AdapterUse, ...]] = {name: (use,) for name, use in named}
        return found | ({BASE: ()} if self.base or not found else {})

    @property
    def settings(self) -> dict[str, Any]:
        """For the report."""
        return {
            "adapters": {name: describe_adapters(uses)[0] for name, uses in self.subjects.items() if uses},
            "sizes": {name: self.geometry(name).max_pixels for name in self.subjects},
            **self.knobs,
        }

    def notes(self, rows: Sequence[Row]) -> list[str]:
        """What the figures do not say by themselves: an adapter with modules that see masks edits these rows without."""
        masked = sum(row.back_mask is not None for row in rows)
        seeing = [name for name, uses in self.subjects.items() if any(added_modules(use.path) for use in uses)]
        return [
            f"{masked} of {len(rows)} rows have a mask, but the modules that {name} adds do not see it here. In training and in "
            "its validation they do, so those scores may be better"
            for name in (seeing if masked else [])
        ]

    def geometry(self, subject: str) -> Geometry:
        """The sizes of a subject's pictures."""
        return self.editor.geometry_for(self.subjects[subject] or self.adapters[:1])

    def jobs(self, rows: Sequence[Row]) -> list[Job]:
        """Each subject's rows one after the other, all counts of a row together, so that its images are encoded once.

        Raises:
            InputError: the base cannot serve the knobs, or an adapter cannot be sampled as asked.
        """
        jobs = []
        for subject in self.subjects:
            first = self._job(rows[0], subject, None).placeholder()
            counts = dict.fromkeys(self.steps or self.editor.compared_steps(first))
            for count in counts:
                self.editor.check(replace(first, steps=count))
            jobs += [self._job(row, subject, count) for row in rows for count in counts]
        return jobs

    def _job(self, row: Row, subject: str, count: int | None) -> Job:
        geometry, target = self.geometry(subject), image_size(row.image)
        knobs = {
            "negative_prompt": row.negative_prompt,
            **self.knobs,
            "prompt": row.prompt if self.knobs.get("mode") != "variation" else "",
            "adapters": self.subjects[subject],
            "steps": count,
            "seed": self.seed + row.number,
            "size": target and geometry.target_size(target),
            "bridge_image": row.bridge_image,
            "geometry": geometry,
        }
        return Job(row.number, f"{subject}/steps_{count}/{row.id}", row.edit_image, str(row.edit_image[0]), knobs)


def usable(row: Row | RejectedRow) -> Row | RejectedRow:
    """The row, or why it cannot be scored, as far as it is seen without decoding a picture."""
    if isinstance(row, RejectedRow):
        return row
    if not row.edit_image:
        return RejectedRow(row.number, row.id, str(row.image), "it has no source: there is nothing to edit")
    for path in filter(None, (row.image, row.ref_gt, row.back_mask)):
        if not path.is_file() or (path != row.back_mask and image_size(path) is None):
            return RejectedRow(row.number, row.id, str(path), "the image does not exist or cannot be read")
    return row


def edited_methods(jobs: Sequence[Job], done: Sequence[KeyedJob], folder: Path) -> list[Method]:
    """What an engine has made of a contest's jobs in a folder, in the order of the jobs.

    Raises:
        InputError: an adapter, or the base, has no picture at a step count; a report would leave it out without a word.
    """
    groups: dict[tuple[str, str], dict[str, KeyedJob]] = {}
    for job in jobs:
        subject, count, _ = job.id.split("/", 2)
        groups[subject, count] = {}
    for keyed in done:
        subject, count, row = keyed.job.id.split("/", 2)
        groups[subject, count][row] = keyed
    if empty := ", ".join("/".join(names) for names, made in groups.items() if not made):
        raise InputError(f"every row failed for {empty}, {folder / FAILED} says why: fix the rows, or leave it out")
    known, methods = read_seconds(folder), []
    for (subject, count), made in groups.items():
        files = {row: folder / keyed.outputs[0] for row, keyed in made.items()}
        times = [known[keyed.key] for keyed in made.values() if keyed.key in known]
        seconds = tuple(each["seconds"][0] - each.get("encoding", [0.0])[0] for each in times)
        sampler = read_png(next(iter(files.values())))["sampler"]
        methods.append(Method(subject, files, int(count.removeprefix("steps_")), seconds, sampler))
    return methods


def found_methods(folders: Sequence[Path], rows: Sequence[Row]) -> list[Method]:
    """The pictures of folders, each called as its row or as the end of its target's path; a table's `results.csv` says which
    is which.

    Raises:
        InputError: there is no such folder, it has no picture, or nobody can tell which row a picture is of.
    """
    methods = []
    for name, folder in zip(own_names(folder.resolve().name for folder in folders), folders, strict=True):
        pictures = named_pictures(folder)
        if (folder / RESULTS).is_file():
            pictures |= _listed_pictures(folder)
        files: dict[str, Path] = {}
        owners: dict[str, str] = {}
        for row in rows:
            if found := next((each for each in (row.id, *_path_ends(row.image)) if each in pictures), None):
                files[row.id] = pictures[found]
                if (owner := owners.setdefault(found, row.id)) != row.id:
                    raise InputError(
                        f"{pictures[found]} could belong to the rows {owner} and {row.id}: name the images by the rows' ids, "
                        "or put them into the same folders as the targets"
                    )
        methods.append(Method(name, files))
    return methods


def named_pictures(folder: Path) -> dict[str, Path]:
    """The pictures of a folder by their paths below it, without the endings: `cats/001`.

    Raises:
        InputError: there is no such folder, it has no picture, or two have one name.
    """
    pictures: dict[str, Path] = {}
    for path in list_images(folder):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if (first := pictures.setdefault(name, path)) != path:
            raise InputError(f"{first} and {path} have the same name: rename or remove one of them")
    return pictures


def _listed_pictures(folder: Path) -> dict[str, Path]:
    """Those of a table, by the row's id."""
    pictures: dict[str, Path] = {}
    with open(folder / RESULTS, encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            if line["id"] in pictures:
                raise InputError(
                    f"{folder / RESULTS} lists several pictures of {line['id']}: score one picture per row, "
                    "made with count=1"
                )
            pictures[line["id"]] = folder / line["output"]
    return pictures


def _path_ends(path: Path) -> Iterator[str]:
    """Of `/photos/cats/001.png`: `photos/cats/001`, `cats/001`, `001`."""
    parts = path.absolute().with_suffix("").parts
    yield from ("/".join(parts[start:]) for start in range(1, len(parts)))


def with_all(rows: Sequence[Row], methods: Sequence[Method]) -> Iterator[Row | RejectedRow]:
    """The rows, rejected where a method has no picture."""
    for row in rows:
        missing = next((method.name for method in methods if row.id not in method.files), None)
        reason = f"{missing} has no image named {row.id} or {row.image.stem}"
        yield RejectedRow(row.number, row.id, str(row.image), reason) if missing else row


def rows_of_folders(sources: Path, targets: Path) -> list[Row | RejectedRow]:
    """A row for each picture of a folder of targets, with the source of the same name in another folder; no instructions.

    Raises:
        InputError: there is no such folder, it has no picture, or two have one name.
    """
    named = named_pictures(sources)
    rows: list[Row | RejectedRow] = []
    for number, (name, path) in enumerate(named_pictures(targets).items(), start=1):
        reason = f"{sources} has no image named {name}"
        rows.append(
            Row(number, name, EMPTY_PROMPT, path.absolute(), (named[name].absolute(),))
            if name in named
            else RejectedRow(number, name, str(path), reason)
        )
    return rows


def own_names(wanted: Iterable[str]) -> Iterator[str]:
    """Names for folders and tables; `lbm (2)` where they repeat or are TAKEN."""
    seen: set[str] = set()
    for name in wanted:
        candidates = itertools.chain([name], (f"{name} ({number})" for number in itertools.count(2)))
        own = next(each for each in candidates if each not in seen and not TAKEN.fullmatch(each))
        seen.add(own)
        yield own


def run_name(path: Path) -> str:
    """The innermost part of an adapter's path that says what it is: `lbm` of `runs/lbm/checkpoints/step-000400`."""
    parts = [part for part in path.resolve().parts if not re.fullmatch(r"checkpoints|step-\d+|adapter_model.*|/", part)]
    return Path(parts[-1]).stem if parts else "adapter"
