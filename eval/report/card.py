"""A model card: README.md beside an adapter, with the hub's metadata, how it was trained, how good it is, and how it is used."""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from safetensors import safe_open

from data_prep.errors import InputError
from data_prep.files import atomic_file, write_bytes, write_text
from data_prep.model.editions import FIRST, PLUS
from data_prep.model.hub_files import HUB_ID
from eval.exports import PIPELINE
from eval.report.evaluation_page import CHARTED, ScoreCell, score_tables
from eval.report.summary import Report
from eval.request.metadata import read_metadata, stored_digest
from eval.scores.methods import BASE
from eval.scores.metrics.metric import Metric
from eval.scores.row_results import steps_label
from train.model.adapter import CONFIG_FILE
from train.model.adapter_files import EXTRA_FILE, EXTRA_KEY, adapter_file
from train.record.loggers import Picture

README, SAMPLES, SAMPLE = "README.md", "samples", "row-*.jpg"
MARKUP = re.compile(r"[\\`*_\[\]<>|#~!]")
"""What Markdown would not take for text."""
MARKER = "<!-- This card was written by eval/run.py --publish-card; without this line it is left alone. -->"
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
NUM_SAMPLES = 4
SHOWN_CONFIG = ("adapter", "loss", "optim", "train")
"""Sections of the training's configuration; the others are paths and places of one machine."""


@dataclass(frozen=True)
class CardRequest:
    """What is to be said that the adapter does not say itself."""

    adapter: Path
    """A checkpoint folder or a safetensors file."""
    license: str | None = None
    base_model: str | None = None
    """Hub id."""
    repository: str | None = None
    """Where it will be, OWNER/NAME."""


@dataclass(frozen=True)
class Card:
    """A card that can be written."""

    file: Path
    """The adapter's weights."""
    license: str
    base_model: str | None
    repository: str | None
    metadata: dict[str, str]
    """The adapter's header."""

    @property
    def folder(self) -> Path:
        """Where the adapter is, and the card will be."""
        return self.file.parent

    @property
    def extra(self) -> dict[str, Any] | None:
        """What was trained beside LoRA: `file`, `in_full` and `added`; None where there was nothing."""
        return json.loads(self.metadata[EXTRA_KEY]) if EXTRA_KEY in self.metadata else None

    @property
    def is_first(self) -> bool:
        """Whether it was trained on the first Qwen-Image-Edit, whose pipeline in diffusers is another."""
        return self.metadata.get("base_pipeline") == FIRST.pipeline

    @property
    def kind(self) -> str:
        """`lora`, `dora` or `lokr`."""
        with safe_open(self.file, framework="pt") as opened:
            dora = any("lora_magnitude_vector" in key or "dora_scale" in key for key in opened.keys())  # noqa: SIM118
        return "dora" if dora else self.metadata.get("kind", "lora")

    @property
    def files(self) -> list[str]:
        """What is to be uploaded: the adapter, the card and its pictures, and nothing of the training's state."""
        beside = [EXTRA_FILE] if EXTRA_KEY in self.metadata else []
        own = [
            name
            for name in (self.file.name, *beside, CONFIG_FILE, PIPELINE.name, README)
            if (self.folder / name).is_file()
        ]
        return [*own, *(f"{SAMPLES}/{path.name}" for path in sorted((self.folder / SAMPLES).glob(SAMPLE)))]


def check_card(request: CardRequest) -> Card:
    """Finds what would prevent a card, before anything is computed.

    Raises:
        InputError: there is another README.md, no licence is named, or a name is not one.
    """
    file = adapter_file(request.adapter)
    there = file.parent / README
    old = there.read_text(encoding="utf-8") if there.is_file() else None
    if old is not None and MARKER not in old:
        raise InputError(f"{there} was not written by this command: move it away, or add this line to it: {MARKER}")
    mine = file.parent / PIPELINE.name
    if mine.is_file() and mine.read_bytes().splitlines()[:1] != PIPELINE.read_bytes().splitlines()[:1]:
        raise InputError(
            f"{mine} was not written by this command, and the pipeline for diffusers belongs there: move it away"
        )
    license = request.license or (ModelCard(old, ignore_metadata_errors=True).data.get("license") if old else None)
    if not license:
        raise InputError("a model card must name a licence: add --license, for example apache-2.0")
    if not LICENSE.fullmatch(license):
        raise InputError(f"--license must be a licence as the hub names it, such as apache-2.0, got {license!r}")
    if request.base_model and not HUB_ID.fullmatch(request.base_model):
        raise InputError(f"--base-model must look like OWNER/NAME, got {request.base_model!r}")
    metadata = read_metadata(file)
    trained_on = metadata.get("base_model", "")
    known = trained_on if HUB_ID.fullmatch(trained_on) and not Path(trained_on).exists() else None
    return Card(file, license, request.base_model or known, request.repository, metadata)


def write_card(card: Card, report: Report, pictures: Sequence[Picture]) -> Path:
    """Writes the card, its pictures and the pipeline for diffusers beside the adapter, and returns the card's path.

    Args:
        card: checked.
        report: the content of `report.json`, in which the adapter is the first.
        pictures: rows of this evaluation, of which the first are shown: source, edit with most steps, target, and captions with
            the instruction.
    """
    samples = _copy_samples(pictures[:NUM_SAMPLES], card.folder)
    if card.kind == "lora":
        write_bytes(card.folder / PIPELINE.name, PIPELINE.read_bytes())
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    own = card_adapter(report)
    text = environment.get_template("card.md.j2").render(
        data=_card_data(card, report).to_yaml(),
        marker=MARKER,
        name=card_name(card, report),
        card=card,
        digest=stored_digest(card.file),
        repository=card.repository or "OWNER/NAME",
        pipeline=card.repository or "OWNER/NAME",
        base_model=card.base_model or "MODEL",
        weights=card.file.name,
        max_pixels=json.loads(card.metadata.get("geometry", "{}")).get("max_pixels", "1024 * 1024"),
        stock=(FIRST if card.is_first else PLUS).pipeline,
        bridge=card.metadata.get("objective") == "lbm",
        lokr=card.kind == "lokr",
        dora=card.kind == "dora",
        report=report,
        own=[method for method in report["methods"] if method["adapter"] in (own, BASE)],
        tables=[(table.title, *_markdown(table.headings, table.rows, own)) for table in score_tables(report)],
        config=_training(card.folder),
        samples=samples,
    )
    write_text(card.folder / README, text)
    return card.folder / README


def _copy_samples(pictures: Sequence[Picture], folder: Path) -> list[tuple[str, str]]:
    """Puts pictures in the place of those of an earlier card; their names, and captions as Markdown."""
    for old in (folder / SAMPLES).glob(SAMPLE):
        old.unlink()
    samples = []
    for number, picture in enumerate(pictures):
        name = f"{SAMPLES}/{SAMPLE.replace('*', str(number))}"
        with atomic_file(folder / name) as temporary:
            shutil.copyfile(picture.path, temporary)
        samples.append((name, MARKUP.sub(r"\\\g<0>", " ".join(picture.caption.split()))))
    return samples


def card_name(card: Card, report: Report) -> str:
    """The repository's name, else the adapter's in the report."""
    if card.repository:
        return card.repository.partition("/")[2]
    return card_adapter(report)


def card_adapter(report: Report) -> str:
    """The adapter that the card is about: the report's first."""
    return next(method["adapter"] for method in report["methods"] if method["adapter"])


def _card_data(card: Card, report: Report) -> ModelCardData:
    """The hub's metadata. Figures are an evaluation, and so in it, only if their rows are known to be held out."""
    name, kind = card_name(card, report), card.metadata.get("kind", "lora")
    results = [
        EvalResult(
            task_type="image-to-image",
            dataset_type="custom",
            dataset_name=Path(report["settings"]["dataset"]).name,
            metric_type=metric,
            metric_name=f"{report['metrics'][metric]['label']}, {steps_label(method['steps'])}",
            metric_value=round(score["mean"], 6),
        )
        for method in report["methods"]
        if method["adapter"] == card_adapter(report)
        for metric, score in method["scores"].items()
        if metric in CHARTED and not report["settings"]["caution"]
    ]
    return ModelCardData(
        base_model=card.base_model,
        license=card.license,
        library_name="diffusers" if kind == "lora" else None,
        pipeline_tag="image-to-image",
        tags=[
            kind,
            "image-editing",
            *(["latent-bridge-matching"] if card.metadata.get("objective") == "lbm" else []),
        ],
        model_name=name,
        eval_results=results or None,
    )


def _training(folder: Path) -> str | None:
    """The configuration that the checkpoint was trained with, as YAML; None for an adapter without one."""
    file = folder / "config.yaml"
    if not file.is_file():
        return None
    config: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    shown = {name: config[name] for name in SHOWN_CONFIG if name in config}
    return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True).rstrip()


def _markdown(
    headings: Sequence[Metric], rows: Sequence[tuple[dict[str, Any], list[ScoreCell]]], own: str
) -> tuple[list[str], list[list[str]]]:
    """Heading and lines of a table."""
    lines = []
    for method, cells in ((method, cells) for method, cells in rows if method["adapter"] in (None, own, BASE)):
        shown = [f"{cell.text} ({cell.interval})" if cell.interval else cell.text for cell in cells]
        lines.append([method["label"], *shown])
    return ["", *(f"{metric.label} {'↑' if metric.better == 'higher' else '↓'}" for metric in headings)], lines
