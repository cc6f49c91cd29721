"""`data_prep/run.py check`: what is wrong with a dataset file, and what training will make of it."""

import hashlib
import os
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from data_prep.check.cleaning import beside, cleaned_path, write_cleaned
from data_prep.check.findings import Limits
from data_prep.check.measures.measurement import Measure
from data_prep.check.report.facts import Facts, print_tables, write_json
from data_prep.check.report.page import write_page
from data_prep.check.report.summary import TEXT_WIDTH, VISION_SIDE, lay_out
from data_prep.check.survey import Survey, survey
from data_prep.cli import CORES, Engine, Processes
from data_prep.errors import InputError
from data_prep.files import make_folder, write_text
from data_prep.jobs.engines import make_engine
from data_prep.jobs.items import PARTS_FOLDER
from data_prep.model.directory import ModelDirectory
from data_prep.model.geometry import MULTIPLE, Geometry
from data_prep.rows.rows import read_rows

PRELOAD = ["data_prep.check.measures.measurement"]


def command(
    dataset: Annotated[str, typer.Option(help="Dataset file (JSON, JSONL, CSV, TSV, Parquet), folder or hub id.")],
    root: Annotated[Path | None, typer.Option(help="Folder of relative paths.", show_default="the file's own")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the report.", show_default="NAME-check beside the file")
    ] = None,
    fix: Annotated[
        bool, typer.Option("--fix", help="Write NAME.cleaned.jsonl without the rows that have errors.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="Model directory or hub id, whose tokenizer counts tokens.")] = None,
    time_caching: Annotated[int, typer.Option(help="Rows to encode with --model, to know how long caching takes.")] = 0,
    max_pixels: Annotated[int, typer.Option(help="As data.max_pixels in training.")] = 1024 * 1024,
    vision_pixels: Annotated[int, typer.Option(help="As data.vision_pixels in training.")] = 384 * 384,
    reference_pixels: Annotated[int | None, typer.Option(help="As data.reference_pixels in training.")] = None,
    micro_batch_sizes: Annotated[
        str, typer.Option(help="Of training, or its train.group_size: counts groups.")
    ] = "1,2,4,8",
    max_shift: Annotated[float, typer.Option(help="Pixels, at the size that is trained.")] = Limits.max_shift,
    max_zoom: Annotated[float, typer.Option(help="Per cent.")] = Limits.max_zoom,
    min_side: Annotated[int, typer.Option(help="Pixels; below it is a warning.")] = Limits.min_side,
    max_aspect: Annotated[
        float, typer.Option(help="Longer side over shorter; above it is a warning.")
    ] = Limits.max_aspect,
    max_tokens: Annotated[int, typer.Option(help="Of a prompt; above it is a warning.")] = Limits.max_tokens,
    ignore: Annotated[list[str] | None, typer.Option(help="A kind of finding that is meant; may be repeated.")] = None,
    processes: Processes = CORES,
    engine: Engine = "local",
) -> None:
    """Reads every file of every row as caching will, and tells what is wrong: on the terminal, in check.json and check.html.

    Files that cannot be used, targets shifted or zoomed against their sources, masks of the wrong polarity, duplicates,
    training rows that show what is held out. Ends with code 2 when rows must be fixed. Killed, it continues.

    Example: python data_prep/run.py check --dataset pairs.json --root photos
    """
    geometry = _geometry(max_pixels, vision_pixels, reference_pixels)
    limits = Limits(geometry, max_shift, max_zoom, min_side, max_aspect, max_tokens, frozenset(ignore or ()))
    sizes = _batch_sizes(micro_batch_sizes)
    if time_caching and not model:
        raise InputError("--time-caching needs --model, whose encoders it runs")
    out = out or beside(dataset, "-check")
    folder = Path(os.path.abspath(out))  # workers of a cluster may start elsewhere
    make_folder(folder)
    directory = ModelDirectory.resolve(model, weights=bool(time_caching)) if model else None
    tokenizer = _save_tokenizer(directory, folder / PARTS_FOLDER) if directory else None

    with closing(Survey(folder, limits)) as found:
        survey(found, dataset, root, Measure(tokenizer, geometry), make_engine(engine, processes, PRELOAD))
        layout = lay_out(found.columns, geometry, *_text_sizes(directory))
        seconds, device = None, ""
        if directory and time_caching:
            from data_prep.check.timing import seconds_per_row  # the encoders' libraries take seconds to import

            seconds, device = seconds_per_row(
                read_rows(dataset, root, text_to_image=True), time_caching, directory, geometry
            )
        counted_by = f"the tokenizer of {model}" if model else "estimated from bytes: --model DIR counts them"
        facts = Facts(dataset, root, found, layout, tuple(map(layout.groups, sizes)), counted_by, seconds, device)
        write_json(folder / "check.json", facts)
        write_page(folder / "check.html", facts)
        print_tables(facts)
        print(out / "check.html")
        _finish(facts, cleaned_path(dataset, folder), fix)


def _finish(facts: Facts, cleaned: Path, fix: bool) -> None:
    if fix:
        kept = write_cleaned(facts.dataset, facts.root, facts.survey.has_error, cleaned)
        use = f"; use them with data.root={facts.root}" if facts.root else ""
        print(f"{kept} rows without errors in {cleaned}; {facts.num_errors} left out{use}")
    elif facts.num_errors:
        raise InputError(
            f"{facts.num_errors} of {facts.survey.num_rows} rows must be fixed, all listed in check.json: mend them, write the "
            f"others to {cleaned} with --fix, or say --ignore KIND for what is meant"
        )


def _geometry(max_pixels: int, vision_pixels: int, reference_pixels: int | None) -> Geometry:
    for name, pixels in (("max", max_pixels), ("vision", vision_pixels), ("reference", reference_pixels)):
        if pixels is not None and pixels < MULTIPLE**2:
            raise InputError(f"--{name}-pixels must be {MULTIPLE**2} or more, got {pixels}")
    return Geometry(max_pixels, vision_pixels, reference_pixels)


def _batch_sizes(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise InputError(f"--micro-batch-sizes must be whole numbers above 0 with commas between, got {text!r}")
    return [int(part) for part in parts]


def _text_sizes(model: ModelDirectory | None) -> tuple[int, int]:
    """The width of the text encoder's hidden states, and the side of a vision token in pixels."""
    if model is None:
        return TEXT_WIDTH, VISION_SIDE
    vision = model.config("text_encoder").get("vision_config", {})
    side = vision.get("patch_size", 14) * vision.get("spatial_merge_size", 2)
    return model.config("transformer")["joint_attention_dim"], side


def _save_tokenizer(model: ModelDirectory, folder: Path) -> Path:
    """The model's tokenizer as one file, which workers read without loading transformers.

    Raises:
        InputError: the model has none.
    """
    from transformers import Qwen2Tokenizer  # two seconds

    try:
        tokenizer = Qwen2Tokenizer.from_pretrained(model.path / "processor", local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{model.path / 'processor'} has no tokenizer: {str(error).splitlines()[0]}") from None
    text = tokenizer.backend_tokenizer.to_str()
    path = folder / f"tokenizer-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}.json"
    if not path.exists():
        write_text(path, text)
    return path
