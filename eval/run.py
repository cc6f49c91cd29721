"""Scores adapters on a dataset file and writes `metrics.json`, `report.html` and a picture grid for each.

    python eval/run.py --model models/tiny --adapter runs/lbm/checkpoints/step-000400 \
        --dataset pairs.json --root photos --steps 1 2 4 --out runs/scores

Without `--adapter` the base model is scored.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import gc
import itertools
import json
import re
from collections.abc import Iterator, Sequence

import torch

from data_prep.cache import build_cache
from data_prep.encode import Encoders
from data_prep.encoders import load_prompt_encoder, load_vae
from data_prep.errors import InputError, exit_codes
from data_prep.files import write_text
from data_prep.model_dir import ModelDirectory
from data_prep.records import CacheReader
from data_prep.rows import read_rows
from eval.editor import Editor
from eval.metadata import choose_geometry, choose_sampler, read_metadata
from eval.report import RunSummary, print_table, write_report
from eval.validation import Validation

ENCODERS = ("vae", "text_encoder", "processor")
BASE = "base"
"""The name of the model without an adapter."""


def main(arguments: argparse.Namespace) -> None:
    """Scores every adapter in turn.

    Raises:
        InputError: an argument is wrong, or a row or file cannot be used.
    """
    model = ModelDirectory.resolve(arguments.model)
    editors = [(name, make_editor(arguments, model, path)) for name, path in named_adapters(arguments.adapter)]
    for _, editor in editors:
        choose_sampler(editor.metadata, arguments.cfg_scale)  # refuses before anything is cached
    runs = []
    for name, editor in editors:
        runs.append(score(arguments, name, editor))
        del editor.denoiser  # room for the next
        gc.collect()
    metrics = {run.name: run.metrics for run in runs}
    write_text(arguments.out / "metrics.json", json.dumps(metrics, indent=1, ensure_ascii=False) + "\n")
    write_report(arguments.out / "report.html", arguments.title, runs)
    print_table(runs)
    print(arguments.out / "report.html")


def make_editor(arguments: argparse.Namespace, model: ModelDirectory, adapter: Path | None) -> Editor:
    """An editor, nothing loaded yet."""
    metadata = read_metadata(adapter) if adapter else {}
    geometry = choose_geometry(metadata, arguments.max_pixels, arguments.vision_pixels)
    return Editor(model, adapter, torch.device(arguments.device), getattr(torch, arguments.dtype), geometry)


def score(arguments: argparse.Namespace, name: str, editor: Editor) -> RunSummary:
    """Caches the rows at the adapter's sizes, edits them, and writes `OUT/NAME/`."""
    reader = open_cache(arguments, editor)
    choice = choose_sampler(editor.metadata, arguments.cfg_scale)
    try:
        validation = Validation(
            reader,
            editor.vae.decode,
            arguments.out,
            choice.sampler,
            arguments.steps or choice.compared,
            arguments.num_rows or len(reader),
            arguments.batch_size,
            arguments.seed,
            show_progress=True,
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    validation.write(editor.denoiser, arguments.out / name)
    metrics = json.loads((arguments.out / name / "metrics.json").read_text(encoding="utf-8"))
    return RunSummary(name, metrics, arguments.out / name / "grid.png")


def open_cache(arguments: argparse.Namespace, editor: Editor) -> CacheReader:
    """The rows' cache in `OUT/cache`, built where it is not there already; the text encoder is gone afterwards."""
    model, fingerprint = editor.model, editor.model.fingerprint(*ENCODERS)

    def load_encoders() -> Encoders:
        place = editor.device, editor.dtype
        return Encoders(load_vae(model, *place), load_prompt_encoder(model, *place))

    summary = build_cache(
        read_rows(arguments.dataset, arguments.root),
        editor.geometry,
        load_encoders,
        arguments.out / "cache",
        fingerprint=fingerprint,
        rejected_path=arguments.out / "rejected.jsonl",
        dtype=editor.dtype,
        negative=True,
        on_error=arguments.on_error,
    )
    print(summary, file=sys.stderr, flush=True)
    return CacheReader(arguments.out / "cache", fingerprint=fingerprint, geometry=editor.geometry)


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


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description="Scores adapters, or the base model, on a dataset file, beside the source unchanged.",
        epilog="PSNR and SSIM are against ref_gt, or image where a row has none; with back_mask also inside and outside.",
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="folder or hub id in the layout of Qwen/Qwen-Image-Edit-2511")
    add(
        "--adapter",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="checkpoint or safetensors; repeatable",
    )
    add("--dataset", required=True, metavar="FILE", help="JSON, JSONL, CSV, Parquet, or a Hugging Face dataset")
    add("--root", metavar="DIR", help="folder that the rows' paths are relative to (default: the dataset's own)")
    add("--steps", type=int, nargs="+", metavar="N", help="step counts (default: 1 2 4 for a bridge, 4 20 for flow)")
    add("--num-rows", type=int, metavar="N", help="score so many rows, chosen by the seed (default: all)")
    add("--batch-size", type=int, default=1, metavar="N", help="rows of one size sampled together (default 1)")
    add("--seed", type=int, default=0, metavar="N", help="of the noise and the choice of rows (default 0)")
    add("--cfg-scale", type=float, metavar="X", help="guidance of flow matching, 1 for none (default 4)")
    add("--max-pixels", type=int, metavar="N", help="largest area of a picture (default: as the adapter was trained)")
    add("--vision-pixels", type=int, metavar="N", help="area that the text encoder sees (default: as trained)")
    add("--on-error", choices=("raise", "skip"), default="raise", help="what an unusable row does (default raise)")
    add("--device", default="cuda" if cuda else "cpu", metavar="NAME", help="default: cuda if there is one, else cpu")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16" if cuda else "float32", help="of the weights")
    add("--title", default="Evaluation", metavar="TEXT", help="of the report")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    return parser.parse_args()


if __name__ == "__main__":
    with exit_codes():
        main(parse_arguments())
