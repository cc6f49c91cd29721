"""Trains a transformer of the real size, with random weights on random data, and compares its memory with the plan.

    accelerate launch scripts/gpu_smoke.py --out runs/gpu_smoke
    accelerate launch scripts/gpu_smoke.py --out runs/gpu_smoke_zero2 parallel=zero2 train.num_steps=5
    python scripts/gpu_smoke.py --size tiny --out runs/cpu_smoke

Everything of phase 2 is what a run uses; nothing is downloaded, and no weights are on the disk. The first is the
production recipe at 1024 x 1024 with one reference. Prints a table and writes OUT/smoke.json.
"""

import argparse
import json
import math
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_prep.cache.encoding import Encoders
from data_prep.cache.writer import build_cache
from data_prep.errors import InputError, exit_codes
from data_prep.model.directory import ModelDirectory
from data_prep.model.geometry import LATENT_CELL, Geometry
from data_prep.rows.rows import read_rows
from train.config import Config, compose
from train.model.denoiser import build_dit
from train.parallel.processes import Processes
from train.phases import ENCODERS, plan_run, train_phase
from train.plan.planner import GIB, geometry_of

SHIPPED = Path(__file__).parent / "tiny"
TRANSFORMER = {
    **{"num_layers": 60, "num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 3584},
    **{"in_channels": 64, "out_channels": 16, "axes_dims_rope": [16, 56, 56], "patch_size": 2, "zero_cond_t": True},
}
"""Of Qwen-Image-Edit-2511: 20.43 B parameters."""
PROMPT_TOKENS = 250
SIZES = {
    "full": ["data.max_pixels=1048576", "adapter.rank=64", "train.grad_accum_steps=1"],
    "tiny": ["data.max_pixels=4096", "adapter.rank=4", "train.grad_accum_steps=1", "model.dtype=float32"],
}


def write_model(folder: Path, size: str) -> None:
    """The `config.json` files of a model directory, at the real sizes (`full`) or the tiny model's; no weights."""
    parts = {name: json.loads((SHIPPED / f"{name}_config.json").read_text()) for name in ("vae", "text_encoder")}
    transformer = json.loads((SHIPPED / "transformer_config.json").read_text())
    if size == "full":
        transformer = TRANSFORMER
        parts["vae"] |= {"base_dim": 96, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
        text = parts["text_encoder"]
        text["text_config"] |= {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
        text["text_config"] |= {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064}
        text["vision_config"] |= {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584}
    for component, config in ({"transformer": transformer} | parts).items():
        (folder / component).mkdir(parents=True, exist_ok=True)
        (folder / component / "config.json").write_text(json.dumps(config))
    for component in ("tokenizer", "processor"):
        (folder / component).mkdir(exist_ok=True)


@dataclass(frozen=True)
class RandomModel(ModelDirectory):
    """A model directory whose transformer's weights are drawn when they are read."""

    device: torch.device | str = "cpu"

    def shapes(self, component: str) -> dict[str, tuple[int, ...]]:
        """Those of the transformer that `config.json` describes."""
        with torch.device("meta"):
            state = build_dit(self.config(component)).state_dict()
        return {name: tuple(tensor.shape) for name, tensor in state.items()}

    def tensors(self, component: str) -> Iterator[tuple[str, Tensor]]:
        """Normal with a standard deviation that keeps activations at their size; scales are 1."""
        for name, shape in self.shapes(component).items():
            fan_in = shape[-1] if len(shape) > 1 else 1
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

    def encode(self, prompt: str, images: list[Image.Image]) -> Tensor:
        """(PROMPT_TOKENS, width)."""
        return torch.randn(PROMPT_TOKENS, self.width)


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
        geometry,
        lambda: Encoders(RandomVae(), RandomPrompts(width)),
        Path(config.cache.dir) / "train",
        fingerprint=model.fingerprint(*ENCODERS),
        rejected_path=folder / "rejected.jsonl",
    )


def main(arguments: argparse.Namespace) -> None:
    """Writes the model's sizes and the data, plans, trains, and compares."""
    out: Path = arguments.out
    if (out / "run").exists():
        raise InputError(f"{out}/run exists: name another --out, or remove it")
    defaults = [*SIZES[arguments.size], "train.num_steps=20", "train.save_every=20", "logger=none", "validate=none"]
    paths = [f"model.path={out}/model", f"data.dataset={out}/rows.json", f"run_dir={out}/run", f"cache.dir={out}/cache"]
    config = compose(["+exp=lbm_2511", *defaults, *paths, *arguments.overrides])
    processes = Processes.start(config.train.device)
    if processes.is_main:
        write_model(out / "model", arguments.size)
    processes.barrier()
    model = RandomModel(out / "model", processes.device)
    geometry = geometry_of(config)
    if processes.is_main:
        write_cache(config, model, geometry, out)
    processes.barrier()
    plan = plan_run(config, model, processes.world_size)
    processes.say(plan.render())
    train_phase(config, model, geometry, processes)
    if processes.is_main:
        figures = measure(config, plan.memory.total)
        (out / "smoke.json").write_text(json.dumps(figures, indent=1) + "\n")
        print("\n".join(f"{name:28} {value}" for name, value in figures.items()))
    processes.stop()


def measure(config: Config, planned: int) -> dict[str, str | float]:
    """Figures of the run; memory only where it is a GPU's."""
    steps = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    seconds = sorted(step["seconds/step"] for step in steps[1:])
    figures: dict[str, str | float] = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU",
        "parallel": config.parallel.name,
        "steps": len(steps),
        "first loss": steps[0]["loss"],
        "last loss": steps[-1]["loss"],
        "median seconds per step": seconds[len(seconds) // 2],
        "planned GiB": planned / GIB,
    }
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        outside = total - free - torch.cuda.memory_reserved()  # the context, and what libraries take for themselves
        peak = torch.cuda.max_memory_allocated() + outside
        figures |= {"measured GiB": peak / GIB, "measured / planned": peak / planned}
    return figures


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Trains a random transformer of the real size and checks the plan.")
    parser.add_argument(
        "--size", choices=SIZES, default="full", help="of the transformer and the images (default full)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as of train/run.py")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    with exit_codes():
        main(parse_arguments())
