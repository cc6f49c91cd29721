"""Scores adapters on a dataset file and writes `metrics.json`, `report.html` and a picture grid for each.

    python eval/run.py --model models/tiny --adapter runs/lbm/checkpoints/step-000400 \
        --dataset pairs.json --root photos --steps 1,2,4 --out runs/scores

Without `--adapter` the base model is scored.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import gc
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated

import torch
import typer

from data_prep.cache import build_cache
from data_prep.cli import OnErrorName, run_command
from data_prep.encode import Encoders
from data_prep.encoders import load_prompt_encoder, load_vae
from data_prep.errors import InputError
from data_prep.files import write_text
from data_prep.model_dir import ModelDirectory
from data_prep.records import CacheReader
from data_prep.rows import RejectedRow, Row, read_rows
from eval.editor import Editor
from eval.metadata import choose_geometry, choose_sampler, read_metadata
from eval.options import DEVICE, DTYPE, CfgScale, Device, Dtype, MaxPixels, Model, Seed, VisionPixels
from eval.report import RunSummary, print_table, write_report
from eval.validation import Validation

ENCODERS = ("vae", "text_encoder", "processor")
BASE = "base"
"""The name of the model without an adapter."""


def parse_steps(text: str) -> list[int]:
    """`1,2,4`."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"must look like 1,2,4, got {text!r}") from None


def score(
    *,
    model: Model,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(help="Checkpoint folder or safetensors file; repeatable.", show_default="the base model"),
    ] = None,
    dataset: Annotated[str, typer.Option(help="JSON, JSONL, CSV, Parquet, or a Hugging Face dataset.")],
    root: Annotated[
        str | None, typer.Option(help="Folder that the rows' paths are relative to.", show_default="the dataset's own")
    ] = None,
    steps: Annotated[
        list | None,
        typer.Option(
            parser=parse_steps, metavar="N,N", help="Step counts.", show_default="1,2,4 for a bridge, 4,20 for flow"
        ),
    ] = None,
    num_rows: Annotated[
        int | None, typer.Option(help="Score so many rows, chosen by the seed.", show_default="all")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows of one size sampled together.")] = 1,
    seed: Seed = 0,
    cfg_scale: CfgScale = None,
    max_pixels: MaxPixels = None,
    vision_pixels: VisionPixels = None,
    on_error: Annotated[OnErrorName, typer.Option(help="What an unusable row does.")] = "raise",
    device: Device = DEVICE,
    dtype: Dtype = DTYPE,
    title: Annotated[str, typer.Option(help="Of the report.")] = "Evaluation",
    out: Annotated[Path, typer.Option(help="Folder to write.")],
) -> None:
    """Scores adapters, or the base model, on a dataset file, beside the source unchanged.

    PSNR and SSIM are against ref_gt, or image where a row has none; with back_mask also inside and outside.
    """
    directory, place = ModelDirectory.resolve(model), (torch.device(device), getattr(torch, dtype))
    editors = {}
    for name, path in named_adapters(adapter or []):
        geometry = choose_geometry(read_metadata(path) if path else {}, max_pixels, vision_pixels)
        editors[name] = Editor(directory, path, *place, geometry)
        choose_sampler(editors[name].metadata, cfg_scale)  # refuses before anything is cached
    runs = []
    for name, editor in editors.items():
        reader = open_cache(editor, read_rows(dataset, root), out, on_error)
        choice = choose_sampler(editor.metadata, cfg_scale)
        counts, rows = steps or choice.compared, num_rows or len(reader)
        try:
            validation = Validation(
                reader, editor.vae.decode, out, choice.sampler, counts, rows, batch_size, seed, show_progress=True
            )
        except ValueError as error:
            raise InputError(str(error)) from error
        validation.write(editor.denoiser, out / name)
        metrics = json.loads((out / name / "metrics.json").read_text(encoding="utf-8"))
        runs.append(RunSummary(name, metrics, out / name / "grid.png"))
        del editor.denoiser  # room for the next
        gc.collect()
    metrics = {run.name: run.metrics for run in runs}
    write_text(out / "metrics.json", json.dumps(metrics, indent=1, ensure_ascii=False) + "\n")
    write_report(out / "report.html", title, runs)
    print_table(runs)
    print(out / "report.html")


def open_cache(editor: Editor, rows: Iterable[Row | RejectedRow], out: Path, on_error: OnErrorName) -> CacheReader:
    """The rows' cache in `out/cache`, built where it is not there already; the text encoder is gone afterwards."""
    model, fingerprint = editor.model, editor.model.fingerprint(*ENCODERS)

    def load_encoders() -> Encoders:
        place = editor.device, editor.dtype
        return Encoders(load_vae(model, *place), load_prompt_encoder(model, *place))

    summary = build_cache(
        rows,
        editor.geometry,
        load_encoders,
        out / "cache",
        fingerprint=fingerprint,
        rejected_path=out / "rejected.jsonl",
        dtype=editor.dtype,
        negative=True,
        on_error=on_error,
    )
    print(summary, file=sys.stderr, flush=True)
    return CacheReader(out / "cache", fingerprint=fingerprint, geometry=editor.geometry)


def named_adapters(paths: Sequence[Path]) -> Iterator[tuple[str, Path | None]]:
    """Names for folders and tables: the run's (`lbm` of `runs/lbm/checkpoints/step-000400`), numbered if they repeat."""
    taken = {"cache"}
    for path in paths or [None]:
        wanted = BASE if path is None else run_name(path)
        candidates = itertools.chain([wanted], (f"{wanted}-{number}" for number in itertools.count(2)))
        name = next(candidate for candidate in candidates if candidate not in taken)
        taken.add(name)
        yield name, path


def run_name(path: Path) -> str:
    """The innermost part of an adapter's path that says what it is."""
    parts = [part for part in path.resolve().parts if not re.fullmatch(r"checkpoints|step-\d+|adapter_model.*|/", part)]
    return Path(parts[-1]).stem if parts else "adapter"


if __name__ == "__main__":
    run_command(score)
