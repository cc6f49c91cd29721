"""Scores adapters on a dataset file and writes `report.json`, `report.html` and every picture.

    python eval/run.py --model models/tiny --adapter runs/lbm --adapter runs/flow --base \
        --dataset pairs.json --root photos --steps 1,4 --out runs/scores

Without `--adapter` the base model is scored. docs/evaluation.md says what is measured and how it is read.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
__import__("data_prep")  # without the environment, it says how to enter it

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated

import torch
import typer

from data_prep.cache.encoding import Encoders
from data_prep.cache.reader import CacheReader
from data_prep.cache.writer import build_cache
from data_prep.cli import OnErrorName, run_command
from data_prep.errors import InputError
from data_prep.files import write_text
from data_prep.model.directory import ModelDirectory
from data_prep.model.geometry import Geometry
from data_prep.rows.images import file_digest
from data_prep.rows.rows import RejectedRow, Row
from eval.qwen.modes import SamplerChoice, choose_sampler
from eval.qwen.weights.components import Components
from eval.reports.card import BASE, CardRequest, check_card, write_card
from eval.reports.evaluation_page import print_report, write_page
from eval.reports.publishing import check_push, push
from eval.reports.runs_report import OBJECTIVES
from eval.reports.summary import Report, build_report, unmeasured
from eval.reports.wandb_table import log_wandb
from eval.request.lookup import find_model
from eval.request.metadata import describe_adapters, read_metadata, trained_geometry
from eval.request.options import (
    DEVICE,
    DTYPE,
    CfgScale,
    Compile,
    Device,
    Dtype,
    MaxPixels,
    Model,
    Seed,
    VisionPixels,
    option,
    parse_adapter,
)
from eval.request.placement import Placement, make_placement
from eval.request.request import AdapterUse
from eval.request.sizes import SizeLimits
from eval.scores.metrics.catalog import ALL, METRICS, load_battery
from eval.scores.metrics.metric import check_names
from eval.scores.metrics.sources import CLIP, DINO, Places
from eval.scores.recorder import Recorder
from eval.scores.splits import EVERY, HELD_OUT, rows_of_split
from eval.scores.validation import Validation, choose_rows
from train.record.loggers import Picture

ENCODERS = ("vae", "text_encoder", "processor")


def parse_steps(text: str) -> list[int]:
    """`1,2,4`."""
    counts = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if min(counts) < 1:
        raise ValueError(f"must look like 1,2,4, each 1 or more, got {text!r}")
    return counts


def parse_metrics(text: str) -> list[str]:
    """`psnr,ssim`, or `all`."""
    names = [name.strip() for name in text.split(",")]
    check_names([name for name in names if name != ALL], list(METRICS))
    return names


@dataclass(frozen=True)
class Subject:
    """An adapter, or the base model, and how it is sampled."""

    name: str
    use: AdapterUse | None
    geometry: Geometry
    choice: SamplerChoice

    @property
    def objective(self) -> str:
        """In words."""
        name = type(self.choice.sampler).__name__
        return OBJECTIVES.get(name, name)


def score(
    *,
    model: Model,
    adapter: Annotated[
        list[AdapterUse] | None,
        typer.Option(
            parser=option(parse_adapter),
            metavar="PATH[:WEIGHT]",
            help="Run, checkpoint or safetensors file; repeatable, each is scored by itself.",
            show_default="the base model",
        ),
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Score the model without an adapter too.")] = False,
    dataset: Annotated[str, typer.Option(help="JSON, JSONL, CSV, Parquet, or a Hugging Face dataset.")],
    root: Annotated[
        str | None, typer.Option(help="Folder that the rows' paths are relative to.", show_default="the dataset's own")
    ] = None,
    split: Annotated[
        str,
        typer.Option(
            help=f"Score the rows of this split, or “{EVERY}”. A dataset without a column split is scored whole. Figures of "
            "rows that are not known to be held out are marked as such, and a card does not publish them as an evaluation."
        ),
    ] = HELD_OUT,
    steps: Annotated[
        list | None,
        typer.Option(
            parser=option(parse_steps),
            metavar="N,N",
            help="Step counts.",
            show_default="1,2,4 for a bridge, 4,20 for flow",
        ),
    ] = None,
    num_rows: Annotated[
        int | None, typer.Option(help="Score so many rows, chosen by the seed.", min=1, show_default="all")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows of one size sampled together.", min=1)] = 1,
    metrics: Annotated[
        list | None,
        typer.Option(
            parser=option(parse_metrics),
            metavar="NAME,…|all",
            help=f"What to measure, fetching weights: {', '.join(METRICS)}.",
            show_default="those whose weights are here",
        ),
    ] = None,
    rank_by: Annotated[
        str, typer.Option(help="The metric that best, median and worst pictures are chosen by.")
    ] = "psnr",
    clip: Annotated[str, typer.Option(help="Folder or hub id of a CLIP.")] = CLIP,
    dino: Annotated[str, typer.Option(help="Folder or hub id of a DINO or DINOv2.")] = DINO,
    torch_hub: Annotated[
        Path | None,
        typer.Option(
            help="Torch's hub folder, with checkpoints/ of AlexNet, SqueezeNet, VGG16.", show_default="torch's own"
        ),
    ] = None,
    face: Annotated[
        Path | None, typer.Option(help="Folder of dlib's face models.", show_default="the extra “identity”")
    ] = None,
    fid: Annotated[
        Path | None,
        typer.Option(help="Inception's weights (.pth), or features by torch.export (.pt2).", show_default="no"),
    ] = None,
    seed: Seed = 0,
    cfg_scale: CfgScale = None,
    max_pixels: MaxPixels = None,
    vision_pixels: VisionPixels = None,
    on_error: Annotated[OnErrorName, typer.Option(help="What an unusable row does.")] = "raise",
    device: Device = DEVICE,
    dtype: Dtype = DTYPE,
    compile: Compile = False,
    title: Annotated[str, typer.Option(help="Of the report.")] = "Evaluation",
    wandb: Annotated[
        str | None, typer.Option(metavar="PROJECT", help="Log numbers, rows and pictures to W&B.", show_default="no")
    ] = None,
    publish_card: Annotated[
        bool, typer.Option("--publish-card", help="Write a model card beside the (first) adapter; needs --license.")
    ] = False,
    license: Annotated[
        str | None, typer.Option(help="Of the adapter, as the hub names it: apache-2.0.", show_default="the card's")
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="In the card.", show_default="the adapter's, if it is a hub id"),
    ] = None,
    push_to: Annotated[
        str | None, typer.Option("--push", metavar="OWNER/NAME", help="Upload adapter and card.", show_default="no")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="A repository that --push makes is private.")] = False,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
) -> None:
    """Scores adapters, or the base model, on a dataset file's held-out rows, beside the source unchanged.

    The ground truth is ref_gt, or image where a row has none; with back_mask also inside and outside. A metric whose weights
    cannot be had is reported as such, and the rest goes on.
    """
    check_names([rank_by], list(METRICS))
    placement = make_placement(device, dtype, compile=compile)
    subjects = list(choose_subjects(adapter or [], base, cfg_scale, SizeLimits(max_pixels, vision_pixels)))
    card = None
    if publish_card or push_to:
        if not adapter:
            raise InputError("--publish-card and --push describe an adapter: give one with --adapter")
        card = check_card(CardRequest(adapter[0].path, license, base_model, push_to))
    if push_to:
        check_push(push_to)
    places = Places(clip, dino, torch_hub, face, fid, placement.device, download=metrics is not None)
    battery = load_battery(metrics, places)
    if rank_by in battery.unavailable or rank_by not in battery.chosen:
        raise InputError(
            f"--rank-by {rank_by} is not measured: {battery.unavailable.get(rank_by, 'name it in --metrics')}"
        )

    directory = ModelDirectory.resolve(find_model(model))
    scored = rows_of_split(dataset, root, split)
    rows = chosen_rows(scored.rows, num_rows, seed)
    readers = cache_rows(subjects, rows, directory, placement, out, on_error)
    components, recorder, pictures = Components(directory, placement), Recorder(battery, out), {}
    for subject in subjects:
        recorder.begin(subject.name, subject.objective, subject.geometry)
        reader, counts = readers[subject.geometry], steps or subject.choice.compared
        pictures[subject.name] = sample(subject, components, reader, recorder, out, counts, batch_size, seed)
    settings = {
        "model": model,
        "adapters": {each.name: describe_adapters([each.use])[0] for each in subjects if each.use},
        "dataset": dataset,
        "dataset_digest": file_digest(dataset) if Path(dataset).is_file() else None,
        "root": root,
        "split": split,
        "caution": scored.caution,
        "num_rows": num_rows,
        "batch_size": batch_size,
        "seed": seed,
        "cfg_scale": cfg_scale,
        "sizes": {each.name: each.geometry.max_pixels for each in subjects},
        "device": device_name(placement.device),
        "dtype": dtype,
        "compile": compile,
        "clip": clip,
        "dino": dino,
        "fid": str(fid) if fid else None,
        "rank_by": rank_by,
    }
    methods = list(recorder.methods.values())
    missing = unmeasured(battery.chosen, methods, battery.unavailable)
    report = build_report(title, methods, recorder.prompts, missing, settings, seed)
    write_reports(report, recorder, out, rank_by)
    if card:
        print(write_card(card, report, pictures[subjects[0].name]))
    try:
        if push_to and card:
            print(push(card.folder, card.files, push_to, private))
    finally:  # neither server keeps the other from its part
        if wandb:
            log_wandb(wandb, report, recorder.picture, out)


def choose_subjects(
    adapters: Sequence[AdapterUse],
    base: bool,
    cfg_scale: float | None,
    limits: SizeLimits,
) -> Iterator[Subject]:
    """What is to be scored. The base model beside adapters is shown pictures of the first one's size.

    Raises:
        InputError: an adapter's header cannot be read, or it cannot be sampled as wanted.
    """
    headers = [read_metadata(each.path) for each in adapters]
    for (name, use), header in zip(named_adapters(adapters), headers, strict=True):
        yield Subject(name, use, limits.applied_to(trained_geometry(header)), choose_sampler(header, cfg_scale))
    if base or not adapters:
        first = headers[0] if headers else {}
        yield Subject(BASE, None, limits.applied_to(trained_geometry(first)), choose_sampler({}, cfg_scale))


def chosen_rows(rows: Sequence[Row | RejectedRow], num_rows: int | None, seed: int) -> list[Row | RejectedRow]:
    """So many of the usable rows (None: all), in order, and the rejected ones, which are to be reported."""
    good = [row for row in rows if isinstance(row, Row)]
    if num_rows is None:
        return list(rows)
    chosen = choose_rows(len(good), num_rows, seed)
    return [*(good[index] for index in chosen), *(row for row in rows if isinstance(row, RejectedRow))]


def cache_rows(
    subjects: Sequence[Subject],
    rows: Sequence[Row | RejectedRow],
    model: ModelDirectory,
    placement: Placement,
    out: Path,
    on_error: OnErrorName,
) -> dict[Geometry, CacheReader]:
    """The rows' records by geometry, in `out/cache`, built where they are not there; the encoders are gone afterwards."""
    fingerprint, components = model.fingerprint(*ENCODERS), Components(model, placement)
    readers = {}
    for geometry in dict.fromkeys(subject.geometry for subject in subjects):
        with ExitStack() as in_use:

            def load_encoders(in_use: ExitStack = in_use) -> Encoders:
                return Encoders(*in_use.enter_context(components.encoders()))

            summary = build_cache(
                rows,
                geometry,
                load_encoders,
                out / "cache",
                fingerprint=fingerprint,
                rejected_path=out / "rejected.jsonl",
                dtype=placement.dtype,
                negative=True,
                on_error=on_error,
            )
        print(summary, file=sys.stderr, flush=True)
        readers[geometry] = CacheReader(
            out / "cache",
            summary.dataset,
            fingerprint=fingerprint,
            geometry=geometry,
            negative=True,
            encoder_dtype=str(placement.dtype).removeprefix("torch."),
        )
    return readers


def sample(
    subject: Subject,
    components: Components,
    reader: CacheReader,
    recorder: Recorder,
    out: Path,
    steps: Sequence[int],
    batch_size: int,
    seed: int,
) -> list[Picture]:
    """Makes a subject's pictures and shows them to the recorder; writes `metrics.json` and the grid in `out/NAME`.

    Returns:
        The rows that were written by themselves, from the first on.
    """
    adapters = [subject.use] if subject.use else []
    folder = out / subject.name
    with components.denoiser(adapters) as denoiser, components.vae() as vae:
        try:
            validation = Validation(
                *(reader, vae.decode, out, subject.choice.sampler, steps, len(reader), batch_size, seed),
                show_progress=True,
                scorer=recorder,
            )
        except ValueError as error:
            raise InputError(str(error)) from error
        written = validation.write(denoiser, folder)
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    recorder.finish(metrics["seconds_per_edit"])
    return [picture for name, picture in written.images.items() if name.startswith("validation/row-")]


def write_reports(report: Report, recorder: Recorder, out: Path, rank_by: str) -> None:
    """Writes `report.json` and `report.html`, and prints the tables."""
    write_text(out / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    write_page(out / "report.html", report, recorder.picture, rank_by)
    print_report(report)
    print(out / "report.html")


def device_name(device: torch.device) -> str:
    """What people call it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def named_adapters(adapters: Sequence[AdapterUse]) -> Iterator[tuple[str, AdapterUse]]:
    """Names for folders and tables: the run's (`lbm` of `runs/lbm/checkpoints/step-000400`), numbered if they repeat."""
    taken = {"cache", "pictures", "wandb", BASE}
    for use in adapters:
        wanted = run_name(use.path)
        candidates = itertools.chain([wanted], (f"{wanted}-{number}" for number in itertools.count(2)))
        name = next(candidate for candidate in candidates if candidate not in taken)
        taken.add(name)
        yield name, use


def run_name(path: Path) -> str:
    """The innermost part of an adapter's path that says what it is."""
    parts = [part for part in path.resolve().parts if not re.fullmatch(r"checkpoints|step-\d+|adapter_model.*|/", part)]
    return Path(parts[-1]).stem if parts else "adapter"


if __name__ == "__main__":
    run_command(score)
