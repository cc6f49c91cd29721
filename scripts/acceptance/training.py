"""The recipes on four rows, by the real launcher: cached, trained, killed and continued."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from data_prep.cache.reader import CacheReader
from data_prep.errors import InputError
from data_prep.model.directory import ModelDirectory
from scripts.acceptance.findings import ROOT, Findings, Options
from train.config import compose
from train.phases import dataset_digests, plan_run
from train.plan.plan import Plan
from train.plan.planner import GIB

NUM_ROWS = 4
RECIPES = {"lbm": "lbm_2511", "sft": "sft_2511"}
KILLED = "killed"
"""The run that is killed and continued; the same as `lbm` otherwise."""
SAME = 5e-3
"""Relative, of a loss after a resume on a GPU: attention's backward pass adds up in any order, in bfloat16. On a CPU: 0."""
MEMORY = (0.8, 1.1)
"""Measured over planned."""


def write_data(options: Options) -> Path:
    """Four rows to train on and four held out, of photographs that ship with libraries. Returns the folder."""
    folder = options.out / "data"
    if not (folder / "validation.json").exists():
        sizes = ["--train", NUM_ROWS // 2, "--validation", NUM_ROWS // 2, "--size", options.side]
        run([sys.executable, ROOT / "scripts/make_demo_data.py", "--out", folder, *sizes])
    return folder


def run(command: Sequence[Any]) -> None:
    """Runs it to its end; what it prints goes to this part's log.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    subprocess.run([str(word) for word in command], cwd=ROOT, check=True)


def overrides(options: Options, recipe: str, name: str, *more: str) -> list[str]:
    """Overrides of the run `name`: the recipe, on this model, data and length."""
    data = write_data(options)
    return [
        f"+exp={RECIPES[recipe]}",
        f"name={name}",
        f"run_dir={options.out}/runs/{name}",
        f"cache.dir={options.out}/cache",
        f"data.dataset={data}/train.json",
        f"data.max_pixels={options.side**2}",
        f"data.vision_pixels={options.vision_pixels}",
        f"model.path={options.model}",
        f"model.dtype={options.dtype}",
        "model.zero_cond_t=null",  # as the model itself says
        f"adapter.rank={options.rank}",
        f"train.num_steps={options.train_steps}",
        f"train.global_batch_size={NUM_ROWS}",
        f"train.save_every={save_every(options)}",
        "train.keep_last=2",
        "train.log_every=1",
        f"train.device={'cpu' if options.device == 'cpu' else 'null'}",
        "logger=none",
        "validate=none",
        *more,
    ]


def save_every(options: Options) -> int:
    """Steps between checkpoints: the killed run has one or two behind it."""
    return max(1, options.train_steps // 3)


def launch(arguments: Sequence[str]) -> list[str]:
    """The launcher's command line."""
    return ["bash", str(ROOT / "scripts/launch.sh"), *arguments]


def run_dir(options: Options, name: str) -> Path:
    """Where a run writes."""
    return options.out / "runs" / name


def clear(options: Options, name: str) -> None:
    """Removes what an earlier run of this name has left."""
    if run_dir(options, name).exists():
        shutil.rmtree(run_dir(options, name))


def history(folder: Path) -> list[dict[str, float]]:
    """Its whole lines of metrics.jsonl so far."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [numbers for numbers in map(json.loads, lines) if "loss" in numbers]


def adapter_of(options: Options, name: str) -> Path:
    """The last checkpoint of a run."""
    return run_dir(options, name) / f"checkpoints/step-{options.train_steps:06d}"


def train(options: Options, recipe: str, name: str) -> Path:
    """Trains, or continues, or finds that there is nothing to do. Returns the checkpoint."""
    run(launch(overrides(options, recipe, name)))
    return adapter_of(options, name)


def check_cache(options: Options, findings: Findings) -> None:
    """Phase 1: every row is a record of the planned size."""
    start = time.perf_counter()
    run(launch(overrides(options, "lbm", "lbm", "phases=[cache]")))
    seconds = time.perf_counter() - start
    folder = options.out / "cache"
    records = list(CacheReader(folder, dataset_digests(compose(overrides(options, "lbm", "lbm")))[0]))
    findings.holds("rows cached", len(records) == NUM_ROWS, len(records), f"= {NUM_ROWS}")
    finite = all(
        bool(torch.isfinite(t).all()) for r in records for t in (r.target_latents, r.source_latents, r.prompt_emb)
    )
    findings.holds("every number is finite", finite)
    side = options.side // 8
    shapes = {tuple(record.target_latents.shape) for record in records}
    findings.holds("latents have the pictures' size", shapes == {(16, side, side)}, str(sorted(shapes)))
    plan = planned(options, "lbm")
    findings.figure("MB of a record", size_of(folder) / len(records) / 1e6, plan.cache_bytes / NUM_ROWS / 1e6)
    findings.figure("seconds, with starting and loading", seconds)
    if options.device == "cuda":
        findings.figure("GiB on the GPU, planned", plan.cache_phase.total / GIB)


def size_of(folder: Path) -> int:
    """Bytes of its files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def planned(options: Options, recipe: str) -> Plan:
    """What the planner says of the run on this machine."""
    config = compose(overrides(options, recipe, recipe))
    return plan_run(config, ModelDirectory.resolve(options.model), int(os.environ["NPROC"]))


def check_lbm(options: Options, findings: Findings) -> None:
    """Latent Bridge Matching."""
    check_recipe(options, findings, "lbm")


def check_sft(options: Options, findings: Findings) -> None:
    """Flow matching."""
    check_recipe(options, findings, "sft")


def check_recipe(options: Options, findings: Findings, recipe: str) -> None:
    """All steps have finite losses and leave an adapter that has learned something; memory and time beside the plan's."""
    clear(options, recipe)
    checkpoint = train(options, recipe, recipe)
    steps, plan = history(run_dir(options, recipe)), planned(options, recipe)
    findings.holds("steps", len(steps) == options.train_steps, len(steps), f"= {options.train_steps}")
    losses = [step["loss"] for step in steps]
    findings.holds("losses are finite", all(map(math.isfinite, losses)), f"{losses[0]:.4g} … {losses[-1]:.4g}")
    tensors = load_file(checkpoint / "adapter_model.safetensors")
    learned = {name: float(tensor.norm()) for name, tensor in tensors.items() if "lora_B" in name}
    findings.holds("modules with LoRA", len(learned) == plan.num_modules, len(learned), f"plan {plan.num_modules}")
    still = [name for name, norm in learned.items() if not 0 < norm < math.inf]
    findings.holds("every module has learned", not still, still[0] if still else "")
    later = sorted(step["seconds/step"] for step in steps[1:] or steps)
    on_gpu = options.device == "cuda"  # which is what is planned for
    findings.figure("seconds of a step, median", later[len(later) // 2], plan.seconds_per_step if on_gpu else None)
    findings.figure("seconds of the first step", steps[0]["seconds/step"])
    if on_gpu:
        peak, total, (low, high) = max(step["memory_peak_gib"] for step in steps), plan.memory.total / GIB, MEMORY
        findings.figure("GiB on the GPU, at most", peak, total)
        findings.holds("measured over planned memory", low < peak / total < high, peak / total, f"{low} to {high}")
    findings.figure("MB of the adapter", (checkpoint / "adapter_model.safetensors").stat().st_size / 1e6)


def check_resume(options: Options, findings: Findings) -> None:
    """A run that is killed without warning and started again is the run that was not."""
    if options.train_steps < 4:
        raise InputError(f"a run of {options.train_steps} steps cannot be killed half-way: --train-steps 4 or more")
    train(options, "lbm", "lbm")
    whole, folder, arguments = (
        history(run_dir(options, "lbm")),
        run_dir(options, KILLED),
        overrides(options, "lbm", KILLED),
    )
    clear(options, KILLED)
    kill_after(launch(arguments), folder, save_every(options) + 1)
    reached = len(history(folder))
    findings.holds(
        "killed before its end", reached < options.train_steps, f"after step {reached}", f"< {options.train_steps}"
    )
    saved = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    findings.holds("a checkpoint was there", bool(saved), saved[-1] if saved else "none")
    run(launch(arguments))
    again = history(folder)
    findings.holds("steps after it was continued", len(again) == len(whole), len(again), f"= {len(whole)}")
    pairs = [(mine["loss"], theirs["loss"]) for mine, theirs in zip(again, whole, strict=False)]
    worst = max(abs(mine - theirs) / abs(theirs) for mine, theirs in pairs)
    findings.at_most("losses, largest relative difference", worst, 0.0 if options.device == "cpu" else SAME)
    names = "adapter_model.safetensors"
    mine, theirs = (load_file(adapter_of(options, name) / names) for name in (KILLED, "lbm"))
    difference = sum(float((mine[key] - theirs[key]).square().sum()) for key in theirs) ** 0.5
    total = sum(float(tensor.square().sum()) for tensor in theirs.values()) ** 0.5
    if options.device == "cpu":
        findings.at_most("adapter, relative difference", difference / total, 0.0)
    else:
        findings.figure("adapter, relative difference", difference / total)


def kill_after(command: Sequence[str], folder: Path, steps: int) -> None:
    """Kills the command and all that it started, without warning, once its history has so many steps.

    Raises:
        RuntimeError: it ended before.
    """
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    while len(history(folder)) < steps:
        if process.poll() is not None:
            raise RuntimeError(f"the training ended by itself with {process.returncode}, before step {steps}")
        time.sleep(0.005)
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            each.send_signal(signal.SIGKILL)
    process.wait()
