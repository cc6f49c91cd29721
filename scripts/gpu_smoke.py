"""Trains a transformer of the real size, with random weights on random data, and compares memory and time with the plan.

    accelerate launch scripts/gpu_smoke.py --out runs/gpu_smoke
    accelerate launch scripts/gpu_smoke.py --out runs/gpu_smoke_zero2 parallel=zero2 train.num_steps=5
    python scripts/gpu_smoke.py --out runs/gpu_smoke_all train.num_steps=6 \\
        --vary optim=adamw,prodigy --vary train.gradient_checkpointing=full,auto
    python scripts/gpu_smoke.py --size tiny --out runs/cpu_smoke

It uses the same code as a real run. Nothing is downloaded, and no weights are read from disk. The first command is the
production recipe at 1024 x 1024 with one reference. Every combination of the `--vary` values is a separate run in this
process, and its memory is freed before the next. It prints a table and writes OUT/smoke.json after each run. The first step of
a run, which compiles and fills caches, is shown separately; all other times are medians of the later steps. The checkpoints
are deleted.
"""

import argparse
import contextlib
import gc
import io
import itertools
import json
import math
import platform
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_prep.cache.encoding import Encoders
from data_prep.cache.index import CacheHeader
from data_prep.cache.writer import build_cache
from data_prep.errors import BadPrompt, InputError, exit_codes
from data_prep.files import write_text
from data_prep.model.directory import KNOWN, ModelDirectory
from data_prep.model.encoders import build_text_encoder, build_vae
from data_prep.model.geometry import LATENT_CELL, Geometry
from data_prep.rows.rows import read_rows
from train.config import Config, compose
from train.model.denoiser import build_dit
from train.parallel.processes import Processes
from train.phases import ENCODERS, plan_run, train_phase
from train.plan.plan import Plan
from train.plan.planner import GIB, geometry_of
from train.record.run_files import CHECKPOINTS

SHIPPED = Path(__file__).parent / "tiny"
REAL = ModelDirectory(KNOWN["Qwen/Qwen-Image-Edit-2511"])
"""Sizes of the published model: 20.43 B parameters."""
PROMPT_TOKENS = 250
ONE_FORWARD = ("train.global_batch_size=null", "train.grad_accum_steps=1")
SIZES = {
    "full": ["data.max_pixels=1048576", "adapter.rank=64", *ONE_FORWARD],
    "tiny": ["data.max_pixels=4096", "adapter.rank=4", *ONE_FORWARD, "model.dtype=float32"],
}


Figures = dict[str, str | float]
"""Measurements of a run, by name."""
PARTS = ("data", "forward", "backward", "optimizer")
"""Parts of a step."""
TABLE = ("s/step", *PARTS, "first step", "planned s", "planned GiB", "measured GiB", "GiB before")


def write_model(folder: Path, size: str, num_layers: int | None = None) -> None:
    """The `config.json` files of a model directory, at the real sizes (`full`) or the tiny model's; no weights."""
    for component in ("transformer", "vae", "text_encoder"):
        tiny = SHIPPED / f"{component}_config.json"
        config = REAL.config(component) if size == "full" else json.loads(tiny.read_text())
        if component == "transformer" and num_layers:
            config["num_layers"] = num_layers
        (folder / component).mkdir(parents=True, exist_ok=True)
        (folder / component / "config.json").write_text(json.dumps(config))
    for component in ("tokenizer", "processor"):
        (folder / component).mkdir(exist_ok=True)


@dataclass(frozen=True)
class RandomModel(ModelDirectory):
    """A model directory whose weights are drawn when they are read."""

    device: torch.device | str = "cpu"

    def shapes(self, component: str) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors of the component that `config.json` describes."""
        build = {"transformer": build_dit, "vae": build_vae, "text_encoder": build_text_encoder}[component]
        with torch.device("meta"):
            state = build(self.config(component)).state_dict()
        return {name: tuple(tensor.shape) for name, tensor in state.items()}

    def tensors(self, component: str) -> Iterator[tuple[str, Tensor]]:
        """Normal with a standard deviation that keeps activations at their size; scales are 1."""
        for name, shape in self.shapes(component).items():
            fan_in = math.prod(shape[1:])
            drawn = torch.randn(shape, device=self.device) / fan_in**0.5
            yield name, drawn if len(shape) > 1 else torch.full_like(drawn, float(name.endswith("weight")))


class RandomVae:
    """Latents of the right shape."""

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 16, H/8, W/8)."""
        return torch.randn(len(pixels), 16, *(side // LATENT_CELL for side in pixels.shape[-2:]))


@dataclass
class RandomPrompts:
    """Prompt embeddings of the right width."""

    width: int

    def encode_many(
        self, requests: Sequence[tuple[str, list[Image.Image]]], batch_size: int
    ) -> list[Tensor | BadPrompt]:
        """(PROMPT_TOKENS, width) of each."""
        return [torch.randn(PROMPT_TOKENS, self.width) for _ in requests]


def write_cache(config: Config, model: ModelDirectory, geometry: Geometry, folder: Path) -> None:
    """Four rows with one reference each."""
    folder.mkdir(parents=True, exist_ok=True)
    side = math.isqrt(config.data.max_pixels)
    Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(folder / "image.png")
    rows = [{"prompt": f"edit {i}", "image": "image.png", "edit_image": "image.png"} for i in range(4)]
    (folder / "rows.json").write_text(json.dumps(rows))
    width = model.config("transformer")["joint_attention_dim"]
    build_cache(
        read_rows(folder / "rows.json"),
        CacheHeader(model.fingerprint(*ENCODERS), geometry, encoder_dtype=config.model.dtype),
        lambda: Encoders(RandomVae(), RandomPrompts(width)),
        config.cache.dir,
        rejected_path=folder / "rejected.jsonl",
    )


def variations(vary: list[str]) -> list[list[str]]:
    """Every combination of one value of each `key=value,value`, as overrides.

    Raises:
        InputError: it is not written so.
    """
    choices = []
    for each in vary:
        key, equals, values = each.partition("=")
        if not (key and equals and all(values.split(","))):
            raise InputError(f"--vary takes key=value,value, got {each!r}")
        choices.append([f"{key}={value}" for value in values.split(",")])
    return [list(combination) for combination in itertools.product(*choices)]


def main(arguments: argparse.Namespace) -> bool:
    """Writes the model's sizes, and plans, trains and compares for each combination. True if every run ended well."""
    out: Path = arguments.out
    if (out / "runs").exists():
        raise InputError(f"{out}/runs exists: name another --out, or remove it")
    defaults = [*SIZES[arguments.size], "train.num_steps=20", "train.save_every=20", "logger=none", "validate=none"]
    paths = [f"model.path={out}/model", f"data.dataset={out}/rows.json", f"cache.dir={out}/cache"]
    combinations = variations(arguments.vary)
    configs = [
        compose(["+exp=lbm_2511", *defaults, *paths, f"run_dir={out}/runs/{number}", *arguments.overrides, *varied])
        for number, varied in enumerate(combinations)
    ]
    processes = Processes.start(configs[0].train.device)
    if processes.is_main:
        write_model(out / "model", arguments.size)
    processes.barrier()
    model = RandomModel(out / "model", processes.device)
    results: list[Figures] = []
    for config, varied in zip(configs, combinations, strict=True):
        figures: Figures = {"varied": " ".join(varied) or "as configured", "parallel": config.parallel.name}
        figures |= attempt(config, model, processes)
        results.append(figures)
        if processes.is_main:
            write_text(out / "smoke.json", json.dumps(results, indent=1) + "\n")
            print("\n".join(f"{name:28} {value}" for name, value in figures.items()), flush=True)
    if processes.is_main:
        print(table(results))
    processes.stop()
    return not any("failed" in figures for figures in results)


def attempt(config: Config, model: RandomModel, processes: Processes) -> Figures:
    """The figures of one run; where there is one process, a run that fails does not take the others with it."""
    figures: Figures = free()
    try:
        return figures | train_once(config, model, processes)
    except Exception as error:
        if processes.world_size > 1:  # where the others wait for this one
            raise
        return figures | {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}


def free() -> Figures:
    """Gives back what the run before held, and says what it did not."""
    gc.collect()
    if deepspeed := sys.modules.get("deepspeed"):
        for held in gc.get_objects():
            if issubclass(type(held), deepspeed.DeepSpeedEngine) and "module" in vars(held):
                strip(held)
        gc.collect()
    torch._dynamo.reset()  # each run compiles for itself, as if it were the only one
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return {"GiB before": torch.cuda.memory_allocated() / GIB}
    tensors = (held for held in gc.get_objects() if issubclass(type(held), torch.Tensor))
    return {"GiB before": sum(tensor.nbytes for tensor in tensors) / GIB}


def strip(engine: Any) -> None:
    """Takes all tensors from a DeepSpeed engine, which its hooks on autograd's nodes keep alive for ever."""
    with contextlib.redirect_stdout(io.StringIO()):
        engine.destroy()
    for parameter in engine.module.parameters():
        for tensor in (parameter, getattr(parameter, "ds_tensor", parameter)):
            tensor.data, tensor.grad = tensor.data.new_empty(0), None
    for part in (engine.optimizer, engine):
        vars(part).clear()


def train_once(config: Config, model: RandomModel, processes: Processes) -> Figures:
    """Plans, trains and compares."""
    geometry = geometry_of(config)
    if processes.is_main:
        write_cache(config, model, geometry, Path(config.cache.dir).parent)
    processes.barrier()
    plan = plan_run(config, model, processes.world_size)
    processes.say(plan.render())
    train_phase(config, model, geometry, processes, plan)
    if not processes.is_main:
        return {}
    shutil.rmtree(Path(config.run_dir) / CHECKPOINTS)
    return measure(config, plan)


def measure(config: Config, plan: Plan) -> Figures:
    """Figures of the run; memory only where it is a GPU's, time only where the plan knows its speed."""
    steps = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    later = steps[1:] or steps
    figures: Figures = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU",
        "torch": torch.__version__,
        "checkpointing": str(plan.decided["train.gradient_checkpointing"]),
        "steps": len(steps),
        "first loss": steps[0]["loss"],
        "last loss": steps[-1]["loss"],
        "first step": steps[0]["seconds/step"],
        "s/step": statistics.median(step["seconds/step"] for step in later),
    }
    figures |= {part: statistics.median(step[f"seconds/{part}"] for step in later) for part in PARTS}
    if plan.seconds_per_step is not None:
        figures |= {"planned s": plan.seconds_per_step}
        figures |= {"measured / planned s": float(figures["s/step"]) / plan.seconds_per_step}
    figures["planned GiB"] = plan.memory.total / GIB
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        outside = total - free - torch.cuda.memory_reserved()  # the context, and what libraries take for themselves
        peak = torch.cuda.max_memory_allocated() + outside
        figures |= {"measured GiB": peak / GIB, "measured / planned": peak / plan.memory.total}
    return figures


def table(results: list[Figures]) -> str:
    """A line for each run."""
    width = max(len(str(figures["varied"])) for figures in results)
    lines = [" " * width + "".join(f"{name:>13}" for name in TABLE)]
    for figures in results:
        cells = [figures.get(name, "") for name in TABLE]
        text = "".join(f"{cell:13.3f}" if isinstance(cell, float) else f"{cell:>13}" for cell in cells)
        lines.append(f"{figures['varied']:{width}}{figures.get('failed') or text}")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Trains a random transformer of the real size and checks the plan.")
    parser.add_argument(
        "--size", choices=SIZES, default="full", help="Size of the transformer and the images (default full)."
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="Folder to write to.")
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="key=value,…",
        help="Run once for each value. Repeatable: every combination is run.",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Settings, as for train/run.py.")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    with exit_codes():
        sys.exit(0 if main(parse_arguments()) else 1)
