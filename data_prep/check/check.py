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
    dataset: Annotated[str, typer.Option(help="Dataset file (JSON, JSONL, CSV, TSV or Parquet), folder or hub id.")],
    root: Annotated[
        Path | None, typer.Option(help="Folder that relative paths start from.", show_default="the file's own")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write the report to.", show_default="NAME-check beside the file")
    ] = None,
    fix: Annotated[
        bool, typer.Option("--fix", help="Write NAME.cleaned.jsonl, which leaves out the rows with errors.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="Model folder or hub id. Its tokenizer counts the prompts' tokens.")
    ] = None,
    time_caching: Annotated[
        int, typer.Option(help="Number of rows to encode with --model, to estimate how long caching takes.")
    ] = 0,
    max_pixels: Annotated[
        int, typer.Option(help="Largest area of a target in pixels, the same as data.max_pixels in training.")
    ] = 1024 * 1024,
    vision_pixels: Annotated[
        int, typer.Option(help="Area that the text encoder sees in pixels, the same as data.vision_pixels.")
    ] = 384 * 384,
    reference_pixels: Annotated[
        int | None, typer.Option(help="Largest area of a reference in pixels, the same as data.reference_pixels.")
    ] = None,
    micro_batch_sizes: Annotated[
        str, typer.Option(help="Micro-batch sizes (or values of train.group_size) to count groups for.")
    ] = "1,2,4,8",
    max_shift: Annotated[
        float,
        typer.Option(help="Largest allowed shift of the target against its source, in pixels at the training size."),
    ] = Limits.max_shift,
    max_zoom: Annotated[
        float, typer.Option(help="Largest allowed scale difference between target and source, in per cent.")
    ] = Limits.max_zoom,
    min_side: Annotated[
        int, typer.Option(help="Warn if a target's shorter side has fewer pixels than this.")
    ] = Limits.min_side,
    max_aspect: Annotated[
        float, typer.Option(help="Warn if an image's longer side divided by its shorter one is above this.")
    ] = Limits.max_aspect,
    max_tokens: Annotated[int, typer.Option(help="Warn if a prompt has more tokens than this.")] = Limits.max_tokens,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Kind of finding to leave out, such as small. Repeatable.")
    ] = None,
    processes: Processes = CORES,
    engine: Engine = "local",
) -> None:
    """Reads every file of every row as caching will, and reports what is wrong on the terminal, in check.json and check.html.

    It finds files that cannot be used, targets that are shifted or scaled against their sources, masks of the wrong polarity,
    duplicates, and training rows that show held-out images. The exit code is 2 if rows must be fixed. If it is killed, the
    same command continues.

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
            f"{facts.num_errors} of {facts.survey.num_rows} rows must be fixed, all listed in check.json: fix them, write the "
            f"others to {cleaned} with --fix, or add --ignore KIND for findings that are intended"
        )


def _geometry(max_pixels: int, vision_pixels: int, reference_pixels: int | None) -> Geometry:
    for name, pixels in (("max", max_pixels), ("vision", vision_pixels), ("reference", reference_pixels)):
        if pixels is not None and pixels < MULTIPLE**2:
            raise InputError(f"--{name}-pixels must be {MULTIPLE**2} or more, got {pixels}")
    return Geometry(max_pixels, vision_pixels, reference_pixels)


def _batch_sizes(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise InputError(f"--micro-batch-sizes must be whole numbers above 0, separated by commas, got {text!r}")
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
