"""Measures a training step of the real size, ours and DiffSynth's by turns, so that both run at the same clock speeds.

    python scripts/bench/train_step.py --json train_step.json
    python scripts/bench/train_step.py --rows theirs,full,auto --profile full
    python scripts/bench/train_step.py --rows fp8,int8,nf4,offload
    python scripts/bench/train_step.py --layers 2 --side 128 --text 20 --device cpu --rows theirs,full-eager,mb4
    python scripts/bench/train_step.py --tiny

It uses random weights of Qwen-Image-Edit's size, one reference, and LoRA on all modules of `adapter=lora`. Both sides compute
with the same frozen tensors, so that they fit on one GPU. "Theirs" is DiffSynth's own loss, model function and modules, with full
gradient checkpointing (`use_gradient_checkpointing`) and LoRA by PEFT in bfloat16. "Ours" is the training loop's step, with LoRA
in float32. Rows with other frozen weights (`fp8`, `int8`, `nf4`, and `offload`, with a third of the blocks in CPU memory) use a
second model beside the shared one.

A row warms up (which compiles), then takes turns with the row in `against`, with `--steps` steps each, `--rounds` times.
`samples/s` and `s/step` are medians; `ratio` compares samples/s with the other's in the same row; `compile` is the additional
time of the first step; `GiB` is the peak of the allocated memory, without what only the other side needs; `TFLOP/s` counts the
model's own operations, not the recomputed ones. `adamw` and `prodigy` measure only the optimizer's part of a step. Rows that
would begin after --seconds are left out.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch.profiler import ProfilerActivity, profile

from data_prep.cache.sizes import Bucket, DatasetSizes, RowSize
from data_prep.errors import InputError, exit_codes
from data_prep.model.geometry import Size
from scripts.bench.report import Report, environment, lines
from scripts.bench.trainers import DTYPE, Ours, Seconds, Theirs, make_batch, share
from scripts.gpu_smoke import RandomModel, write_model
from train.builders import build
from train.config import DEFAULT_TARGETS, compose
from train.loop import Stopwatch
from train.model.adapter import attach_lora
from train.model.denoiser import load_denoiser
from train.model.execution import Execution
from train.model.quantize import Weights
from train.optim import AdamW, Optimizer, Prodigy
from train.parallel.processes import Processes
from train.plan.gpus import find_gpu
from train.plan.memory import LoraSizes, Transformer
from train.plan.planner import GIB, Planner


@dataclass(frozen=True)
class Row:
    """One way of ours."""

    checkpointing: str
    """`train.gradient_checkpointing`; `attention`: the number of all blocks."""
    compiled: bool = True
    micro_batch: int = 1
    mixed: bool = False
    """Texts of different lengths."""
    against: str = "theirs"
    weights: Weights = "bf16"
    """`model.weights`."""
    waiting: int = 0
    """One of so many blocks waits in CPU memory."""

    @property
    def shares(self) -> bool:
        """Whether it computes with the frozen tensors of `theirs`."""
        return self.weights == "bf16" and not self.waiting

    def lengths(self, text: int) -> list[int]:
        """Length of each sample's text, the longest first."""
        shorter = text - max(1, text * 37 // 250) if self.mixed else text
        return [text, *[shorter] * (self.micro_batch - 1)]


ROWS = {
    "full-eager": Row("full", compiled=False),
    "full": Row("full"),
    "attention": Row("attention"),
    "selective": Row("selective"),
    "auto": Row("auto"),
    "off": Row("off"),
    "mb2": Row("full", micro_batch=2),
    "mb2-mixed": Row("full", micro_batch=2, mixed=True, against="mb2"),
    "mb4": Row("full", micro_batch=4),
    "fp8": Row("full", weights="fp8"),
    "int8": Row("full", weights="int8"),
    "nf4": Row("full", weights="nf4"),
    "offload": Row("full", waiting=3),
}
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"adamw": AdamW, "prodigy": Prodigy}
DEFAULT_ROWS = "theirs,full-eager,full,selective,auto,mb2,mb2-mixed,adamw,prodigy"
COLUMNS = {
    **{"row": -12, "samples/s": 10, "ratio": 8, "against": 9, "s/step": 9, "min": 9, "other": 9},
    **{"forward": 9, "backward": 9, "optimizer": 10, "compile": 8, "GiB": 8, "TFLOP/s": 8, "kept": 28},
}
WARM_UP, TIMED = 2, 5
"""Steps of an optimizer alone."""
KINDS = {
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "addmm", "::mm", "::bmm"),
    "compiled pointwise": ("triton",),
}
"""Words in the names of kernels; the first kind counts."""


@dataclass
class Contender:
    """What takes its turn."""

    prepare: Callable[[], Any]
    step: Callable[[int], Seconds]
    samples: int
    kept: str = ""
    """What the backward pass does not compute again."""
    others: Callable[[], int] = int
    """Bytes that are allocated for somebody else."""
    first: float = 0.0
    """Seconds of the first step, which compiles."""
    said: list[str] = field(default_factory=list)
    """Messages of its compilation."""

    def warm_up(self) -> None:
        """Two steps, once."""
        if not self.first:
            self.prepare()
            self.first = self.step(0)["step"]
            self.step(1)


class Race:
    """Both trainers at one size, and whatever takes turns on them.

    Args:
        options: options of the command line.
        folder: for the model's `config.json` files.
    """

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.options, self.text = options, options.text
        self.processes = Processes.start("cpu" if options.device == "cpu" else None)
        device = self.processes.device
        write_model(folder, "tiny" if options.tiny else "full", options.layers)
        self.model = RandomModel(folder, device)
        self.config = self.model.config("transformer")
        torch.manual_seed(0)
        denoiser = load_denoiser(self.model, device, DTYPE)
        theirs = share(denoiser.dit, self.config)
        adapter = attach_lora(denoiser, options.rank, options.rank, DEFAULT_TARGETS)
        self.ours = Ours(denoiser, adapter, self.processes)
        self.theirs = Theirs(theirs, adapter, denoiser.zero_cond_t, device)
        self.contenders: dict[str, Contender] = {}
        size = Size(options.side, options.side)
        self.bucket, self.lora = Bucket(size, (size,), self.text, 1.0), LoraSizes(options.rank, tuple(DEFAULT_TARGETS))
        transformer = Transformer(self.config, DTYPE, denoiser.zero_cond_t)
        self.flops = transformer.flops(self.bucket, self.lora, Execution()).total

    def contender(self, name: str) -> Contender:
        """The one of this name, made when it is first asked for."""
        if name not in self.contenders:
            self.contenders[name] = self._theirs() if name == "theirs" else self._ours(ROWS[name])
        return self.contenders[name]

    def _theirs(self) -> Contender:
        batch = make_batch([self.text], self.options.side, self.config["joint_attention_dim"])
        step = partial(self.theirs.step, batch)
        return Contender(lambda: None, step, 1, "nothing", lambda: self.ours.held)

    def _ours(self, row: Row) -> Contender:
        said: list[str] = []
        settings = {"auto": self.planned, "attention": lambda: self.config["num_layers"]}
        setting = settings.get(row.checkpointing, lambda: row.checkpointing)()
        options = {"compiled": row.compiled and self.options.compile, "say": said.append}
        execution, ours = Execution.of(setting, **options), self.ours if row.shares else self._own(row)
        runs, kept = ours.execute(execution), execution.kept(self.config["num_layers"])
        lengths = row.lengths(self.text)
        batch = make_batch(lengths, self.options.side, self.config["joint_attention_dim"])
        step = partial(ours.step, batch)

        def held() -> int:
            return self.theirs.held + (0 if row.shares else self.theirs.frozen + self.ours.held)

        return Contender(partial(ours.switch, runs), step, len(lengths), kept_words(kept), held, said=said)

    def _own(self, row: Row) -> Ours:
        """A trainer whose frozen weights are nobody else's."""
        count = -(-self.config["num_layers"] // row.waiting) if row.waiting else 0
        device, weights = self.processes.device, row.weights
        denoiser = load_denoiser(self.model, device, DTYPE, weights=weights, offload_blocks=count)
        adapter = attach_lora(denoiser, self.options.rank, self.options.rank, DEFAULT_TARGETS)
        return Ours(denoiser, adapter, self.processes)

    def finish(self, name: str) -> None:
        """After the row: a model of its own makes room for the next."""
        if name in ROWS and not ROWS[name].shares:
            self.contenders.pop(name, None)

    def planned(self) -> str | int:
        """What the planner makes of `auto` on this GPU, less what theirs needs on it."""
        overrides = ["+exp=sft_2511", "adapter=lora", "optim=adamw", "parallel=single", "validate=none", "logger=none"]
        paths = [f"model.path={self.model.path}", "data.dataset=none.json"]
        sizes = [f"data.max_pixels={self.options.side**2}", f"adapter.rank={self.options.rank}"]
        config = compose([*overrides, *paths, *sizes])
        size = self.bucket.target
        data = DatasetSizes((RowSize(size, (size,), self.text),), 1, "the benchmark")
        planner = Planner(config, self.model, data, lambda node, params: build(node, "optim", params, num_steps=1))
        gpu = find_gpu()
        spare = replace(gpu, memory_gib=gpu.memory_gib - self.theirs.held / GIB)
        return planner.decide(config, 1, spare)["train.gradient_checkpointing"]

    def measure(self, name: str) -> dict[str, Any]:
        """The row's numbers."""
        if name in OPTIMIZERS:
            return self.optimizer(OPTIMIZERS[name])
        own, against = self.contender(name), "theirs" if name == "theirs" else ROWS[name].against
        rivals = [] if self.options.alone or name == "theirs" else [self.contender(against)]
        for each in (*rivals, own):
            each.warm_up()
        times: dict[int, list[Seconds]] = {id(each): [] for each in (*rivals, own)}
        peak = 0
        for _ in range(self.options.rounds):
            for each in (*rivals, own):
                each.prepare()
                if self.options.device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                times[id(each)] += [each.step(2 + number) for number in range(self.options.steps)]
            if self.options.device == "cuda":
                peak = max(peak, torch.cuda.max_memory_allocated())
        numbers = self.numbers(own, times[id(own)])
        if peak:
            numbers["GiB"] = (peak - own.others()) / GIB
        for rival in rivals:
            theirs = self.numbers(rival, times[id(rival)])
            numbers |= {"ratio": numbers["samples/s"] / theirs["samples/s"], "against": against}
            numbers |= {"other": theirs["s/step"], "other min": theirs["min"]}
        return numbers

    def numbers(self, contender: Contender, times: list[Seconds]) -> dict[str, Any]:
        """Numbers of timed steps."""
        steps = [seconds["step"] for seconds in times]
        step = statistics.median(steps)
        numbers: dict[str, Any] = {
            part: statistics.median(s[part] for s in times) for part in times[0] if part != "step"
        }
        numbers |= {"samples/s": contender.samples / step, "s/step": step, "min": min(steps), "steps": steps}
        numbers |= {"TFLOP/s": self.flops * contender.samples / step / 1e12, "kept": contender.kept}
        if contender.said:
            numbers |= {"compile": contender.first - step}
        if failures := [line for line in contender.said if "without torch.compile" in line]:
            numbers |= {"note": failures[0]}
        return numbers

    def optimizer(self, build_optimizer: Callable[..., Optimizer]) -> dict[str, Any]:
        """The optimizer's part of a step on random gradients."""
        optimizer = build_optimizer(self.ours.parameters)
        seconds = []
        for number in range(WARM_UP + TIMED):
            for parameter in self.ours.parameters:
                parameter.grad = torch.randn_like(parameter).mul_(1e-4)
            watch = Stopwatch()
            self.ours.update(optimizer, watch, number, [])
            seconds.append(watch.read()["optimizer"])
        timed = seconds[WARM_UP:]
        return {"optimizer": statistics.median(timed), "min": min(timed), "steps": timed}

    def profile(self, name: str) -> dict[str, Any]:
        """Kernels of one more step of a row, in ms."""
        contender = self.contender(name)
        contender.warm_up()
        contender.prepare()
        cuda = self.options.device == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with profile(activities=activities) as profiler:
            contender.step(100)
        kernels = [
            (event.key, (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3, event.count)
            for event in profiler.key_averages()
        ]
        kernels = sorted((kernel for kernel in kernels if kernel[1] > 0), key=lambda kernel: -kernel[1])
        kinds: dict[str, float] = {}
        for key, milliseconds, _ in kernels:
            kinds[kind_of(key)] = kinds.get(kind_of(key), 0.0) + milliseconds
        total, launches = sum(kernel[1] for kernel in kernels), sum(kernel[2] for kernel in kernels)
        return {"ms": total, "launches": launches, "kinds": kinds, "top": kernels[: self.options.top]}


def kept_words(kept: list[str]) -> str:
    """What blocks keep: `products`, or `20 attention, 40 products`."""
    counts = {keep: kept.count(keep) for keep in kept}
    return ", ".join(keep if len(counts) == 1 else f"{count} {keep}" for keep, count in counts.items())


def kind_of(kernel: str) -> str:
    """Attention, matrix products, pointwise."""
    name = kernel.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other")


def product_speed() -> float:
    """TFLOP/s of a bfloat16 product of 8192 x 8192 x 8192: what this card does today."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=DTYPE) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize()
    return 20 * 2 * 8192**3 / (time.perf_counter() - start) / 1e12


def free() -> None:
    """Gives back what nothing refers to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The numbers, or why there are none: the next row is another question."""
    try:
        return work()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}


def main(options: argparse.Namespace) -> bool:
    """Prints a row after the other. True if all were measured."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        race = Race(options, Path(folder))
        header: dict[str, Any] = environment(options.device)
        header |= {"layers": race.config["num_layers"], "side": options.side, "text tokens": options.text}
        header |= {"rank": options.rank, "modules with LoRA": len(race.ours.adapter.layers)}
        header["TFLOP of a sample"] = race.flops / 1e12
        if options.device == "cuda":
            header["TFLOP/s of a product of 8192^3"] = product_speed()
        header["seconds to set up"] = time.monotonic() - start
        report = Report(COLUMNS, options.json, header)
        for name in options.rows:
            free()
            if time.monotonic() - start > options.seconds:
                report.add(name, {"failed": f"not begun: {options.seconds:.0f} s were over (--seconds)"})
                continue
            row = attempt(lambda name=name: race.measure(name))
            for parameter in (*race.ours.parameters, *race.theirs.parameters):  # of a step that failed
                parameter.grad = None
            report.add(name, row)
            if name in options.profile:
                report.numbers["rows"][name]["profile"] = found = attempt(lambda name=name: race.profile(name))
                report.save()
                print_profile(name, found)
            race.finish(name)
        report.numbers["seconds"] = time.monotonic() - start
        report.save()
        print(f"{report.numbers['seconds']:.0f} s in all")
        race.processes.stop()
    return not any("failed" in row for row in report.numbers["rows"].values())


def print_profile(name: str, found: dict[str, Any]) -> None:
    """A table of kernels."""
    if "failed" in found:
        print(f"profile of {name}: {found['failed']}", flush=True)
        return
    kinds = ", ".join(f"{kind} {ms:.0f}" for kind, ms in sorted(found["kinds"].items(), key=lambda item: -item[1]))
    print(f"profile of {name}: {found['ms']:.0f} ms in {found['launches']} launches ({kinds})")
    print(lines([(f"    {key[:110]}", ms, count) for key, ms, count in found["top"]], (-116, 10, 8)), flush=True)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ["theirs", *ROWS, *OPTIMIZERS]
    parser.add_argument(
        "--rows", default=DEFAULT_ROWS, help=f"Rows to measure, out of {', '.join(known)} (default {DEFAULT_ROWS})."
    )
    parser.add_argument("--layers", type=int, help="Number of the transformer's blocks (default the model's 60).")
    parser.add_argument(
        "--side", type=int, default=1024, help="Side of target and reference, in pixels (default 1024)."
    )
    parser.add_argument("--text", type=int, default=250, help="Tokens of the instruction and the images (default 250).")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument(
        "--steps", type=int, default=2, help="Training steps of each side before the other's turn (default 2)."
    )
    parser.add_argument("--rounds", type=int, default=2, help="Number of turns of each side (default 2).")
    parser.add_argument(
        "--seconds", type=float, default=220, help="Seconds after which no new row is started (default 220)."
    )
    parser.add_argument(
        "--alone", action="store_true", help="Leave out the other side, which is faster but gives no ratio."
    )
    parser.add_argument(
        "--compile",
        choices=["auto", "on", "off"],
        default="auto",
        help="Compile the transformer's block. auto compiles it on CUDA.",
    )
    parser.add_argument("--profile", default="", metavar="ROWS", help="Rows for which one more step is profiled.")
    parser.add_argument("--top", type=int, default=25, help="Number of kernels to list in a profile (default 25).")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="Use the tiny model's sizes.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="JSON file to write the results to, after every row.")
    options = parser.parse_args()
    if options.tiny:
        options.side, options.text, options.rank = min(options.side, 64), min(options.text, 12), min(options.rank, 4)
    options.compile = options.compile == "on" or (options.compile == "auto" and options.device == "cuda")
    options.rows, options.profile = options.rows.split(","), [name for name in options.profile.split(",") if name]
    if unknown := [name for name in (*options.rows, *options.profile) if name not in known]:
        raise InputError(f"--rows and --profile know {', '.join(known)}, got {', '.join(unknown)}")
    if missing := [name for name in options.profile if name not in options.rows or name in OPTIMIZERS]:
        raise InputError(f"--profile takes rows of --rows that have a forward pass, got {', '.join(missing)}")
    return options


if __name__ == "__main__":
    with exit_codes():
        sys.exit(0 if main(parse_arguments()) else 1)
