"""Measures the seconds of an edit, part by part: a bridge in a few steps, compared with flow matching with guidance.

    python scripts/bench/edit.py --model Qwen/Qwen-Image-Edit-2511 --device cuda --json edit.json
    python scripts/bench/edit.py --random --device cuda --json edit.json
    python scripts/bench/edit.py --tiny

Each edit has a different image and instruction, so nothing is kept from the last one (except in `the next seed`). Times are
the median of `--repeat` edits after one that is not counted. `speed` is the time of 40 steps with guidance divided by the row's.
Adapters are random, with rank `--rank` on the default modules of training: times do not depend on their numbers.
It also measures the adapter's share of a step (none, fused, and beside the weights as with quantised weights), a change of
adapters, a table in which each part is moved once per window, and the time from the start of `eval/edit.py` to its result.
`--random` draws random weights of Qwen-Image-Edit-2511's sizes on the device, so that no model is needed (`start`, which
reads files, is then left out). `--tiny` makes the tiny model.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import torch
from PIL import Image
from safetensors.torch import save_file

from data_prep.errors import InputError, exit_codes
from data_prep.model.directory import ModelDirectory
from data_prep.model.geometry import Geometry
from eval.qwen.editor import Editor
from eval.qwen.weights.adapters import added_up, put_beside, remove_adapters
from eval.request.knobs import AdapterUse
from eval.request.lookup import find_model
from eval.request.options import OffloadName
from eval.request.placement import make_placement
from eval.request.request import EditRequest
from losses.batch import Condition
from scripts.bench.report import Report, environment
from scripts.gpu_smoke import RandomModel, write_model
from train.config import DEFAULT_TARGETS
from train.model.adapter import PREFIX, match_modules
from train.model.adapter_files import WEIGHTS_FILE
from train.model.denoiser import Denoiser, build_dit

PARTS = ("edits", "step", "switch", "table", "start")
COLUMNS = {"what": -40, "encode s": 10, "sample s": 10, "decode s": 10, "s": 10, "speed": 8}
ROWS = 16
"""Of the table."""


class Bench:
    """The model, two adapters of each kind, and what is measured with them."""

    def __init__(self, options: argparse.Namespace, model: ModelDirectory, folder: Path):
        self.options, self.model, self.folder = options, model, folder
        self.device = make_placement(options.device, options.dtype).device
        self.geometry = Geometry(max_pixels=options.size**2)
        kinds = {"a": "lbm", "b": "lbm", "flow": "flow"}
        self.adapters = {name: write_adapter(model, folder / name, kind, options.rank) for name, kind in kinds.items()}
        self.editor: Editor | None = None
        self.asked = 0

    def open(self, offload: OffloadName = "none") -> Editor:
        """An editor that has loaded nothing, in place of the one before: a card has room for one."""
        self.close()
        options = self.options
        placement = make_placement(options.device, options.dtype, offload=offload, compile=options.compile)
        self.editor = Editor(self.model, placement, self.geometry)
        return self.editor

    def close(self) -> None:
        """Frees what the last editor has loaded. Nobody else may refer to it any more."""
        if self.editor:
            self.editor.components.free()
        self.editor = None

    def request(self, adapter: str, steps: int) -> EditRequest:
        """One of a picture and with an instruction that were not there before."""
        self.asked += 1
        use = (AdapterUse(self.adapters[adapter]),)
        return EditRequest(f"make it blue {self.asked}", [self.picture()], adapters=use, steps=steps, seed=self.asked)

    def picture(self) -> Image.Image:
        """Noise, another each time."""
        return Image.effect_noise((self.options.size, self.options.size), 64).convert("RGB")

    def edits(self, report: Report) -> None:
        """Flow matching in 40 steps with guidance first, which the others are divided by."""
        slowest, editor = None, self.open()
        for name, adapter, steps in [
            (f"flow matching, {self.options.steps} steps, guidance", "flow", self.options.steps),
            ("bridge, 4 steps", "a", 4),
            ("bridge, 1 step", "a", 1),
        ]:
            editor.edit(self.request(adapter, min(steps, 4)))
            found = []
            for _ in range(self.options.repeat):
                editor.edit(self.request(adapter, steps))
                found.append(dict(editor.spent))
            row = {f"{part} s": statistics.median(each[part] for each in found) for part in found[0]}
            row["s"] = statistics.median(sum(each.values()) for each in found)
            slowest = slowest or row["s"]
            report.add(name, row | {"speed": slowest / row["s"]})
        again = self.request("a", 4)
        editor.edit(again)
        seconds = timed(self.device, lambda: editor.edit(again))
        report.add("bridge, 4 steps, the next seed", {"s": seconds, "speed": slowest and slowest / seconds})

    def step(self, report: Report) -> None:
        """A call of the denoiser with an adapter inside the weights, without, and with one beside them."""
        use, components = [AdapterUse(self.adapters["a"])], self.open().components
        with components.denoiser(use) as denoiser:
            report.add("a step, adapter fused", {"s": self.call(denoiser)})
        with components.denoiser() as denoiser:
            report.add("a step, no adapter", {"s": self.call(denoiser)})
            put_beside(denoiser, added_up(denoiser.dit, use))
            report.add("a step, adapter beside the weights", {"s": self.call(denoiser)})
            remove_adapters(denoiser)

    @torch.no_grad()
    def call(self, denoiser: Denoiser) -> float:
        """Seconds of a forward pass with one reference and 250 tokens of text."""
        side, device = self.options.size // 8, self.device
        latents = torch.randn(1, 16, side, side, device=device)
        text = torch.randn(1, 250, denoiser.dit.txt_in.in_features, device=device)
        condition = Condition(text, torch.ones(1, 250, dtype=torch.bool, device=device), [latents])
        sigma = torch.tensor([0.7], device=device)
        return median(self.options.repeat, device, lambda: denoiser(latents, sigma, condition))

    def switch(self, report: Report) -> None:
        """From one adapter to the other, and back."""
        components, device = self.open().components, self.device

        def take(name: str) -> float:
            def change() -> None:
                with components.denoiser([AdapterUse(self.adapters[name])]):
                    pass

            return timed(device, change)

        with components.denoiser():
            pass
        report.add("first adapter, read and fused", {"s": take("a")})
        report.add("second adapter, read and fused", {"s": take("b")})
        report.add("a change between the two", {"s": statistics.median(take(name) for name in "abab")})

    def table(self, report: Report) -> None:
        """A row of a table, with all parts on the device, and with each moved once for all rows."""
        each: tuple[OffloadName, ...] = "none", "model"
        for offload in each:
            editor = self.open(offload)
            editor.edit(self.request("a", 4))
            groups = [[self.request("a", 4)] for _ in range(ROWS)]
            seconds = timed(self.device, lambda editor=editor, groups=groups: editor.edit_groups(groups))
            report.add(f"a row of {ROWS}, --offload {offload}", {"s": seconds / ROWS})

    def start(self, report: Report) -> None:
        """Of a process of its own; one that is not timed runs before."""
        self.picture().save(self.folder / "image.png")
        words = ["--model", self.model.path, "--adapter", self.adapters["a"], "--image", self.folder / "image.png"]
        words += ["--prompt", "x", "--device", self.options.device, "--dtype", self.options.dtype]
        command = [sys.executable, "eval/edit.py", *map(str, words), "--out", str(self.folder / "result.png")]

        def run() -> None:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode:
                raise InputError(f"eval/edit.py failed: {done.stderr.strip().splitlines()[-1]}")

        report.add("eval/edit.py, from start to picture", {"s": median(1, torch.device("cpu"), run)})


def write_adapter(model: ModelDirectory, folder: Path, objective: str, rank: int) -> Path:
    """Random numbers of an adapter on all modules that training takes by default; of the model only the sizes are read."""
    with torch.device("meta"):
        dit = build_dit(model.config("transformer"))
    generator, tensors = torch.Generator().manual_seed(len(folder.name)), {}
    for name in match_modules(dit, DEFAULT_TARGETS):
        module: Any = dit.get_submodule(name)
        down = torch.randn(rank, module.in_features, generator=generator) * module.in_features**-0.5
        up = 1e-3 * torch.randn(module.out_features, rank, generator=generator)
        tensors |= {f"{PREFIX}{name}.lora_A.weight": down.bfloat16(), f"{PREFIX}{name}.lora_B.weight": up.bfloat16()}
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS_FILE, {"objective": objective, "loss": "{}"})
    return folder


def timed(device: torch.device, work: Callable[[], Any]) -> float:
    """Seconds, the device's work included."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def median(repeat: int, device: torch.device, work: Callable[[], Any]) -> float:
    """Median seconds of this many runs, after one that is not counted."""
    timed(device, work)
    return statistics.median(timed(device, work) for _ in range(repeat))


def make_tiny_model(folder: Path) -> str:
    """The tiny model's directory."""
    command = [sys.executable, "scripts/make_tiny_model.py", "--out", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return str(folder)


def random_model(folder: Path, device: str, tiny: bool = False) -> RandomModel:
    """The real sizes, or the tiny ones, in a tiny model's folder, whose tokenizer is the real one."""
    write_model(folder, "tiny" if tiny else "full")
    return RandomModel(folder, device)


def main(options: argparse.Namespace) -> None:
    """Prints a row for each measurement."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.tiny or options.random:
            options.model = make_tiny_model(folder / "model")
        model = ModelDirectory.resolve(find_model(options.model))
        if options.random:
            model = random_model(model.path, options.device, tiny=options.tiny)
        report = Report(COLUMNS, options.json, environment(options.device))
        bench = Bench(options, model, folder)
        for part in options.only:
            getattr(bench, part)(report)
            bench.close()


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--model", help="Model: a folder or a hub id.")
    parser.add_argument(
        "--only", default=",".join(PARTS), help=f"Parts to run, out of {', '.join(PARTS)} (default all)."
    )
    parser.add_argument("--size", type=int, default=1024, help="Side of the image in pixels (default 1024).")
    parser.add_argument("--steps", type=int, default=40, help="Sampling steps of flow matching (default 40).")
    parser.add_argument("--rank", type=int, default=64, help="Rank of the adapters (default 64).")
    parser.add_argument("--repeat", type=int, default=3, help="Number of timed edits (default 3).")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument("--compile", action="store_true", help="Compile the transformer's block.")
    parser.add_argument("--random", action="store_true", help="Use random weights of Qwen-Image-Edit-2511's sizes.")
    parser.add_argument("--tiny", action="store_true", help="Use the tiny model, small images and small adapters.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="JSON file to write the results to, after every row.")
    options = parser.parse_args(words)
    if options.tiny:
        options.size, options.rank = 64, 4
    options.only = [part for part in options.only.split(",") if part != "start" or not options.random]
    if unknown := set(options.only) - set(PARTS):
        raise InputError(f"--only knows {', '.join(PARTS)}, got {unknown.pop()}")
    if not (options.tiny or options.random or options.model):
        raise InputError("--model is missing: name the base model's folder or hub id, or give --random or --tiny")
    return options


if __name__ == "__main__":
    with exit_codes():
        main(parse_arguments())
