"""Compares images with their ground truth, and writes `report.json`, `report.html` and every image.

    python eval/run.py --model models/tiny --adapter runs/lbm --adapter runs/flow --base \
        --dataset pairs.json --root photos --steps 1,4 --out runs/scores

    python eval/run.py --pictures others/made --dataset pairs.json --root photos --out runs/scores

    python eval/run.py --runs runs/lbm --runs runs/flow --out runs/compared

The first command edits the rows of a dataset like a table, and continues when it is run again. The second scores images of any
tool without a model. The third compares the last validations of runs. docs/evaluation.md explains the metrics and the report.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
__import__("data_prep")  # without the environment, it says how to enter it

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_prep.cli import OnErrorName, run_command
from data_prep.errors import InputError
from data_prep.rows.rows import RejectedRow, Row
from eval.request.knobs import AdapterUse
from eval.request.options import (
    ModelOptions,
    PlaceOptions,
    given_knobs,
    given_options,
    knob_options,
    option,
    with_options,
)
from eval.request.request import MAX_STEPS
from eval.scores.metrics.metric import ALL, CLIP, DINO, METRICS, check_names
from eval.scores.splits import EVERY, HELD_OUT, ScoredRows, chosen_rows, rows_of_split
from eval.tables.command import WINDOW, BatchSize, Window

if TYPE_CHECKING:  # with torch, after the command line has been checked
    from torch import device as Device

    from eval.report.card import Card
    from eval.scores.methods import Method
    from eval.scores.metrics.catalog import Battery

EDITS = "edits"
"""Folder of the table that edits are made as, below `--out`."""


def parse_steps(text: str) -> list[int]:
    """`1,2,4`."""
    counts = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if not 1 <= min(counts) <= max(counts) <= MAX_STEPS:
        raise ValueError(f"must look like 1,2,4, each 1 or more and at most {MAX_STEPS}, got {text!r}")
    return counts


def parse_metrics(text: str) -> list[str]:
    """`psnr,ssim`, or `all`."""
    names = [name.strip() for name in text.split(",")]
    check_names([name for name in names if name != ALL], list(METRICS))
    return names


@dataclass(frozen=True)
class RowOptions:
    """Which rows are scored."""

    dataset: Annotated[
        str | None,
        typer.Option(
            help="Dataset to score on: a JSON, JSONL, CSV or Parquet file, or a Hugging Face dataset.",
            show_default="required",
        ),
    ] = None
    root: Annotated[
        str | None, typer.Option(help="Folder that the rows' paths are relative to.", show_default="the dataset's own")
    ] = None
    sources: Annotated[
        Path | None, typer.Option(help="Folder with the source images, used with --targets instead of --dataset.")
    ] = None
    targets: Annotated[
        Path | None, typer.Option(help="Folder with the ground-truth images, named like those in --sources.")
    ] = None
    split: Annotated[
        str,
        typer.Option(
            help=f"Split to score, or “{EVERY}”. A dataset without a column split is scored whole. Scores of rows that may "
            "not be held out are marked in the report, and a model card does not publish them as an evaluation."
        ),
    ] = HELD_OUT
    num_rows: Annotated[
        int | None, typer.Option(help="Score only this many rows, chosen by the seed.", min=1, show_default="all")
    ] = None
    on_error: Annotated[
        OnErrorName,
        typer.Option(
            help="What to do about a row that cannot be used: end with exit code 2 (raise) or leave it out (skip)."
        ),
    ] = "raise"

    def check(self) -> None:
        """Before anything is read.

        Raises:
            InputError: no ground truth is named, or two are, or an option is for the other kind.
        """
        if bool(self.dataset) == bool(self.sources and self.targets) or bool(self.sources) != bool(self.targets):
            raise InputError("give the ground truth with --dataset, or with the two folders --sources and --targets")
        unread = given_options(replace(self, sources=None, targets=None, num_rows=None, on_error=RowOptions.on_error))
        if self.sources and unread:
            raise InputError(f"{', '.join(unread)} is only for --dataset: leave it out with --sources and --targets")

    def read(self, seed: int) -> tuple[list[Row], str | None]:
        """The rows, as far as they are wanted, and what is to be said of rows that may not be held out.

        Raises:
            InputError: there are none, or some cannot be used and that is no reason to go on.
        """
        from eval.scores.methods import rows_of_folders, usable

        if self.sources and self.targets:
            found = ScoredRows(rows_of_folders(self.sources, self.targets), None)
        else:
            assert self.dataset
            found = rows_of_split(self.dataset, self.root, self.split)
        rows = [usable(row) for row in chosen_rows(found.rows, self.num_rows, seed)]
        return self.good(rows), found.caution

    def good(self, rows: Sequence[Row | RejectedRow]) -> list[Row]:
        """The usable ones; the others are said.

        Raises:
            InputError: there are none, or others, and that is no reason to go on.
        """
        rejected = [row for row in rows if isinstance(row, RejectedRow)]
        for row in rejected:
            print(row, file=sys.stderr)
        if rejected and (self.on_error == "raise" or len(rejected) == len(rows)):
            raise InputError(f"{len(rejected)} of {len(rows)} rows cannot be scored, the first is {rejected[0]}")
        return [row for row in rows if isinstance(row, Row)]

    @property
    def settings(self) -> dict[str, Any]:
        """For the report."""
        from data_prep.rows.images import file_digest

        dataset = self.dataset or str(self.targets)
        digest = file_digest(dataset) if Path(dataset).is_file() else None
        sources = {"sources": str(self.sources)} if self.sources else {}
        return {
            **{"dataset": dataset, "dataset_digest": digest, "root": self.root, **sources},
            **{"split": self.split if self.dataset else EVERY, "num_rows": self.num_rows},
        }


@dataclass(frozen=True)
class MetricOptions:
    """What is measured, and where its weights are."""

    metrics: Annotated[
        list | None,
        typer.Option(
            parser=option(parse_metrics),
            metavar="NAME,…|all",
            help=f"Metrics to measure, whose weights are downloaded: {', '.join(METRICS)}.",
            show_default="those whose weights are here",
        ),
    ] = None
    rank_by: Annotated[
        str, typer.Option(help="Metric that decides which images the report shows as best, median and worst.")
    ] = "psnr"
    clip: Annotated[str, typer.Option(help="CLIP model: a folder or a hub id.")] = CLIP
    dino: Annotated[str, typer.Option(help="DINO or DINOv2 model: a folder or a hub id.")] = DINO
    torch_hub: Annotated[
        Path | None,
        typer.Option(
            help="Torch's hub folder, whose checkpoints/ holds AlexNet, SqueezeNet and VGG16.",
            show_default="torch's own",
        ),
    ] = None
    face: Annotated[
        Path | None, typer.Option(help="Folder with dlib's face models.", show_default="the extra “identity”")
    ] = None
    fid: Annotated[
        Path | None,
        typer.Option(
            help="Feature network for FID: Inception's weights (.pth) or an exported program (.pt2).", show_default="no"
        ),
    ] = None

    def battery(self, device: "Device") -> "Battery":
        """The metrics, loaded.

        Raises:
            InputError: there is no such metric, or the one to rank by is not measured.
        """
        from eval.scores.metrics.catalog import load_battery
        from eval.scores.metrics.sources import Places

        places = Places(self.clip, self.dino, self.torch_hub, self.face, self.fid, device, self.metrics is not None)
        battery = load_battery(self.metrics, places)
        if self.rank_by in battery.unavailable or self.rank_by not in battery.chosen:
            reason = battery.unavailable.get(self.rank_by, "name it in --metrics")
            raise InputError(f"--rank-by {self.rank_by} is not measured: {reason}")
        return battery

    @property
    def settings(self) -> dict[str, Any]:
        """For the report."""
        return {"clip": self.clip, "dino": self.dino, "fid": self.fid and str(self.fid), "rank_by": self.rank_by}


@dataclass(frozen=True)
class EditOptions:
    """How rows are edited before they are scored."""

    adapter: Annotated[
        list[AdapterUse] | None,
        typer.Option(
            parser=option(AdapterUse.parse),
            metavar="PATH[:WEIGHT]",
            help="LoRA to score: run folder, checkpoint or safetensors file. Repeatable: each is scored by itself.",
            show_default="the base model",
        ),
    ] = None
    base: Annotated[bool, typer.Option("--base", help="Also score the base model without an adapter.")] = False
    steps: Annotated[
        list | None,
        typer.Option(
            parser=option(parse_steps),
            metavar="N,N",
            help="Numbers of sampling steps to score, separated by commas.",
            show_default="1,2,4 for a bridge, 4,20 for flow",
        ),
    ] = None
    batch_size: BatchSize = 1
    window: Window = WINDOW


EditKnobs = knob_options("mode", "sampler", "cfg_scale", "strength", "negative_prompt")
"""Knobs that all edits have: the mode is one that needs no mask and no map."""


@dataclass(frozen=True)
class PublishOptions:
    """Where the figures go besides the report."""

    title: Annotated[str, typer.Option(help="Title of the report.")] = "Evaluation"
    wandb: Annotated[
        str | None,
        typer.Option(metavar="PROJECT", help="W&B project to log the scores, rows and images to.", show_default="no"),
    ] = None
    publish_card: Annotated[
        bool, typer.Option("--publish-card", help="Write a model card beside the first adapter. Needs --license.")
    ] = False
    license: Annotated[
        str | None,
        typer.Option(
            help="Licence of the adapter by its name on the hub, such as apache-2.0.", show_default="the card's"
        ),
    ] = None
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME",
            help="Base model to name in the model card.",
            show_default="the adapter's, if it is a hub id",
        ),
    ] = None
    push_to: Annotated[
        str | None,
        typer.Option(
            "--push",
            metavar="OWNER/NAME",
            help="Hub repository to upload the adapter and its model card to.",
            show_default="no",
        ),
    ] = None
    private: Annotated[bool, typer.Option("--private", help="Make the repository private if --push creates it.")] = (
        False
    )

    def check(self, adapters: Sequence[AdapterUse]) -> "Card | None":
        """Finds what would prevent it, before anything is computed. The card, if there is to be one.

        Raises:
            InputError: no adapter, no licence, another's card, no hub, or what nothing is published with.
        """
        if not (self.publish_card or self.push_to):
            if given := given_options(replace(self, title=PublishOptions.title, wandb=None)):
                raise InputError(
                    f"{', '.join(given)} is only for a model card: add --publish-card or --push, or leave it out"
                )
            return None
        if not adapters:
            raise InputError("--publish-card and --push describe an adapter: give one with --adapter")
        from eval.report.card import CardRequest, check_card
        from eval.report.publishing import check_push

        card = check_card(CardRequest(adapters[0].path, self.license, self.base_model, self.push_to))
        if self.push_to:
            check_push(self.push_to)
        return card


@with_options(EditOptions, EditKnobs, RowOptions, MetricOptions, PublishOptions, ModelOptions, PlaceOptions)
def score(
    edit: EditOptions,
    knobs: Any,
    rows: RowOptions,
    metrics: MetricOptions,
    publish: PublishOptions,
    model: ModelOptions,
    place: PlaceOptions,
    *,
    pictures: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder with finished images to score, named like the rows or their targets. Repeatable.",
        ),
    ] = None,
    runs: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="RUN_DIR", help="Training run whose last validation is compared with those of others. Repeatable."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed for the noise and for choosing rows.", min=0)] = 0,
    out: Annotated[Path, typer.Option(help="Folder to write the report to.")],
) -> None:
    """Scores adapters, the base model or finished images on the held-out rows of a dataset, beside the unchanged source.

    The ground truth of a row is ref_gt if it has one, otherwise image. Rows with a back_mask are also scored inside and
    outside the mask. A metric whose weights are not available is reported as such, and the others are still measured.
    """
    if sum(map(bool, (model.model, pictures, runs))) != 1:
        raise InputError(
            "give exactly one of --model (to score its edits), --pictures (finished images) and --runs (to compare)"
        )
    if runs:
        others = given_options(edit, knobs, rows, metrics, replace(publish, title=PublishOptions.title), model, place)
        check_alone("--runs", "compares finished validations", [*others, *(["--seed"] if seed else [])])
        compare(runs, publish, out)
        return
    if pictures:
        card = replace(publish, title=PublishOptions.title, wandb=None)
        others = given_options(edit, knobs, card, model, replace(place, device=None))
        check_alone("--pictures", "scores finished images without a model or an adapter", others)
    rows.check()
    check_names([metrics.rank_by], list(METRICS))
    card = publish.check(edit.adapter or [])
    if pictures:
        found = score_pictures(pictures, rows, metrics, place, seed)
    else:
        found = score_edits(edit, given_knobs(knobs), rows, metrics, model, place, seed, out / EDITS)
    if found:
        report(found, rows, metrics, publish, card, seed, out)


def check_alone(way: str, does: str, others: Sequence[str]) -> None:
    """Finds options of another way, and processes that would do the same beside each other.

    Raises:
        InputError: there are some.
    """
    if others:
        raise InputError(f"{way} {does}: leave out {', '.join(others)}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(f"{way} runs in one process: launch several processes only with --model")


def compare(runs: list[Path], publish: PublishOptions, out: Path) -> None:
    """The last validations of training runs beside each other."""
    from eval.report.publishing import Publication
    from eval.report.run_history import compare_runs, read_runs

    found = read_runs(runs)
    Publication().publish(compare_runs(publish.title, found), out, runs=found)


@dataclass(frozen=True)
class Found:
    """Pictures that are there, and the rows that they are of."""

    methods: "list[Method]"
    rows: list[Row]
    battery: "Battery"
    settings: dict[str, Any]
    """How they were made."""


def score_pictures(
    pictures: list[Path], rows: RowOptions, metrics: MetricOptions, place: PlaceOptions, seed: int
) -> Found:
    """Scores the images of folders."""
    from eval.scores.methods import found_methods

    placement = place.place()
    wanted, caution = rows.read(seed)
    methods = found_methods(pictures, wanted)
    battery = metrics.battery(placement.device)
    names = {method.subject: str(folder) for method, folder in zip(methods, pictures, strict=True)}
    return Found(methods, wanted, battery, {"caution": caution, **placement.shown, "pictures": names})


def score_edits(
    edit: EditOptions,
    knobs: dict[str, Any],
    rows: RowOptions,
    metrics: MetricOptions,
    model: ModelOptions,
    place: PlaceOptions,
    seed: int,
    folder: Path,
) -> Found | None:
    """Scores the results of a table of edits. None on all processes but the first."""
    from eval.scores.methods import Contest, edited_methods
    from eval.tables.engine import Engine, check_done

    engine = Engine.start(model, place, edit.window)
    wanted, caution = rows.read(seed)
    battery = metrics.battery(engine.placement.device) if engine.is_main else None
    contest = Contest(engine.editor, edit.adapter or [], edit.base, knobs, edit.steps or (), seed)
    jobs = contest.jobs(wanted)
    for note in contest.notes(wanted) if engine.is_main else ():
        print(f"note: {note}", file=sys.stderr)
    summary = engine.edit(jobs, folder, edit.batch_size)
    if not summary or not battery:
        return None
    check_done(summary, folder, rows.on_error)
    own = {"caution": caution, **engine.placement.shown, "model": model.model, "batch_size": edit.batch_size}
    return Found(edited_methods(jobs, summary.done, folder), wanted, battery, {**own, **contest.settings})


def report(
    found: Found,
    rows: RowOptions,
    metrics: MetricOptions,
    publish: PublishOptions,
    card: "Card | None",
    seed: int,
    out: Path,
) -> None:
    """Measures the pictures, and publishes what comes out."""
    from eval.report.publishing import Publication
    from eval.report.summary import build_report, unmeasured
    from eval.scores.methods import with_all
    from eval.scores.recorder import Recorder

    recorder = Recorder(found.battery, out)
    rows.good(recorder.measure(rows.good(list(with_all(found.rows, found.methods))), found.methods))
    usual = {"model": None, "adapters": {}, "cfg_scale": None, "batch_size": None, "sizes": {}}
    settings = {**usual, **found.settings, **rows.settings, "seed": seed, **metrics.settings}
    measured = list(recorder.methods.values())
    missing = unmeasured(found.battery.chosen, measured, found.battery.unavailable)
    made = build_report(publish.title, measured, recorder.prompts, missing, settings, seed)
    publication = Publication(card, publish.push_to, publish.private, publish.wandb)
    publication.publish(made, out, recorder.picture, recorder.write(found.methods), metrics.rank_by)


if __name__ == "__main__":
    run_command(score)
