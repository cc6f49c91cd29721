"""Measures what each way of saving memory saves and costs, compared with full weights in the same run.

    python scripts/bench/memory.py --model models/tiny
    python scripts/bench/memory.py --model models/tiny --grow 7 --size 512 --device cuda

Each option edits one image several times in its own process; the first edit is not timed. It measures the bytes of the
transformer's weights, and how many of them are on the device between edits; the peak memory of loading and editing
(torch's on cuda; on the CPU that of the process without its libraries); the seconds of one edit (on the CPU,
processor time); and the difference to the image from full weights. Then one image goes through the VAE, whole and in tiles.
It prints tables. `--grow` puts a random transformer with that many blocks, of 75 MB each in bfloat16, into a copy of the model:
its memory and time are more realistic than those of the tiny model, but its images are meaningless.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import gguf
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from data_prep.errors import InputError, exit_codes
from data_prep.model.directory import ModelDirectory
from data_prep.model.encoders import load_vae
from data_prep.model.geometry import Geometry
from eval.qwen.editor import Editor
from eval.qwen.weights.encoders import PlacedVAE
from eval.request.placement import make_placement
from eval.request.request import EditRequest
from train.model.denoiser import build_dit

GROWN = {"num_attention_heads": 8, "attention_head_dim": 128, "axes_dims_rope": [16, 56, 56]}
MIB = 2**20


@dataclass(frozen=True)
class Figures:
    """The measurements of one option."""

    stored: int
    """Bytes of the transformer's weights."""
    on_device: int
    """How many of them are on the device between two calls."""
    peak: int
    seconds: float
    picture: str
    """Path of an .npy file."""


def options(device: str, q8: Path) -> dict[str, dict[str, Any]]:
    """Every option that the device can serve, `full` first."""
    every: dict[str, dict[str, Any]] = {
        "full": {},
        "int8": {"weights": "int8"},
        "fp8": {"weights": "fp8"},
        "nf4": {"weights": "nf4"},
        "gguf Q8_0": {"gguf": q8},
        "offload=model": {"offload": "model"},
    }
    if device != "cpu":
        every["offload=layer"] = {"offload": "layer"}
        every["offload=layer, int8"] = {"offload": "layer", "weights": "int8"}
        every["encoders on cpu"] = {"encoder_device": "cpu"}
    return every


def grow(model: Path, blocks: int, folder: Path) -> Path:
    """A copy of the model with a random transformer of that many blocks."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors.index.json"))
    config_file = folder / "transformer" / "config.json"
    config = json.loads(config_file.read_text()) | GROWN | {"num_layers": blocks}
    config_file.write_text(json.dumps(config))
    for file in (folder / "transformer").glob("*.safetensors"):
        file.unlink()
    with torch.device("meta"):
        dit = build_dit(config)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: (torch.randn(shape.shape, generator=generator) * shape.shape[-1] ** -0.5).bfloat16()
        for name, shape in dit.state_dict().items()
    }
    save_file(weights, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    return folder


def write_gguf(weights: Mapping[str, Tensor], path: Path, prefix: str = "") -> None:
    """The transformer in GGUF: matrices of the blocks as Q8_0, other matrices as F16, the rest as F32."""
    writer = gguf.GGUFWriter(path, "qwen_image")
    for name, weight in weights.items():
        numbers, kind = weight.float().numpy(), gguf.GGMLQuantizationType.Q8_0
        if weight.ndim == 2 and name.startswith("transformer_blocks."):
            writer.add_tensor(prefix + name, gguf.quantize(numbers, kind), raw_dtype=kind)
        else:
            writer.add_tensor(prefix + name, numbers.astype(np.float16) if weight.ndim == 2 else numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class PeakMemory:
    """The most bytes held since it was made: by torch on cuda, else by the process, above what it held then. Linux only."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the high water mark
        self.before = 0 if device.type == "cuda" else _resident("VmHWM")

    def bytes(self) -> int:
        """So far."""
        highest = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _resident("VmHWM")
        return highest - self.before


def _resident(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def timed(device: torch.device, work: Callable[[], Any]) -> float:
    """Seconds that it takes; of the processor's time on the CPU, which others may be using too."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    work()
    return clock() - start


def measure_edit(model: Path, args: argparse.Namespace, settings: dict[str, Any], picture: Path) -> Figures:
    """Edits several times in this process."""
    placement = make_placement(args.device, args.dtype, **settings)
    editor = Editor(ModelDirectory.resolve(model), placement, Geometry(max_pixels=args.size**2))
    request = EditRequest("make it blue", [example(args.size)], steps=args.steps, cfg_scale=1.0, sampler="flow")
    memory = PeakMemory(placement.device)
    result = editor.edit(request)[0]
    seconds = min(timed(placement.device, lambda: editor.edit(request)) for _ in range(args.repeat))
    highest = memory.bytes()
    np.save(picture, np.asarray(result.image))
    with editor.components.denoiser() as denoiser:
        found = [*denoiser.dit.parameters(), *denoiser.dit.buffers()]
    memories = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in found if t.device == placement.device}
    here = sum(memory.nbytes() for memory in memories.values())  # blocks that wait elsewhere share theirs
    return Figures(sum(tensor.nbytes for tensor in found), here, highest, seconds, str(picture))


def measure_vae(model: Path, args: argparse.Namespace, tiled: bool, picture: Path) -> Figures:
    """Encodes and decodes one picture in this process, twice."""
    placement = make_placement(args.device, args.dtype)
    plain = load_vae(ModelDirectory.resolve(model), placement.device, placement.dtype)
    vae = PlacedVAE(plain, placement.device, tiled)
    pixels = torch.from_numpy(np.asarray(example(args.vae_size))).permute(2, 0, 1)[None] / 127.5 - 1
    memory = PeakMemory(placement.device)
    with torch.no_grad():
        decoded = vae.decode(vae.encode(pixels)).cpu()
        seconds = timed(placement.device, lambda: vae.decode(vae.encode(pixels)).cpu())
    np.save(picture, ((decoded[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy())
    return Figures(0, 0, memory.bytes(), seconds, str(picture))


def example(size: int) -> Image.Image:
    """A photograph, as a square."""
    from scripts.photographs import TRAIN, load

    photograph = load(TRAIN[0])
    side = min(photograph.size)
    return photograph.crop((0, 0, side, side)).resize((size, size))


def alone(model: Path, args: argparse.Namespace, name: str, settings: dict[str, Any], folder: Path) -> Figures:
    """Measures in a process of its own, whose memory nobody else has touched."""
    task = {"name": name, "settings": {key: str(value) for key, value in settings.items()}, "model": str(model)}
    task["picture"] = str(folder / f"{name.replace(' ', '_')}.npy")
    command = [sys.executable, __file__, *sys.argv[1:], "--task", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"measuring {name} failed: {done.stderr.strip().splitlines()[-1]}")
    return Figures(**json.loads(done.stdout.strip().splitlines()[-1]))


def run_task(args: argparse.Namespace) -> None:
    """What the process of `alone` does."""
    task = json.loads(args.task)
    model, picture = Path(task["model"]), Path(task["picture"])
    settings = task["settings"]
    if "tiled" in settings:
        figures = measure_vae(model, args, settings["tiled"] == "True", picture)
    else:
        if "gguf" in settings:
            settings["gguf"] = Path(settings["gguf"])
        figures = measure_edit(model, args, settings, picture)
    print(json.dumps(asdict(figures)))


def psnr(one: str, other: str) -> str:
    """Peak signal-to-noise ratio of two pictures in dB."""
    error = np.square(np.load(one).astype(float) - np.load(other).astype(float)).mean()
    return "same" if error == 0 else f"{10 * np.log10(255**2 / error):.1f} dB"


def report(found: Mapping[str, Figures]) -> None:
    """A table, each row against the first."""
    first = next(iter(found.values()))
    print("| option | transformer's weights | on the device between edits | peak | seconds per edit | picture |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, figures in found.items():
        row = [f"{size / MIB:.1f} MiB" if size else "" for size in (figures.stored, figures.on_device, figures.peak)]
        time_taken = f"{figures.seconds:.2f} ({figures.seconds / first.seconds:.2f}x)"
        print(f"| {name} | {' | '.join(row)} | {time_taken} | {psnr(figures.picture, first.picture)} |", flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/tiny", help="Model: a folder or a hub id.")
    parser.add_argument(
        "--grow",
        type=int,
        default=0,
        metavar="BLOCKS",
        help="Measure a random transformer with this many blocks instead.",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--size", type=int, default=256, help="Side of the edited image in pixels.")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=2, help="Number of edits after the first. The fastest counts.")
    parser.add_argument("--vae-size", type=int, default=1024, help="Side of the image for the VAE in pixels.")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measures and prints."""
    args = parse()
    if args.task:
        run_task(args)
        return
    model = ModelDirectory.resolve(args.model).path
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.grow:
            model = grow(model, args.grow, folder / "grown")
        q8 = folder / "q8.gguf"
        write_gguf(dict(ModelDirectory(model).tensors("transformer")), q8)
        report({key: alone(model, args, key, value, folder) for key, value in options(args.device, q8).items()})
        print()
        tiles = {"VAE, whole": False, "VAE, tiles": True}
        report({key: alone(model, args, key, {"tiled": value}, folder) for key, value in tiles.items()})


if __name__ == "__main__":
    with exit_codes():
        main()
