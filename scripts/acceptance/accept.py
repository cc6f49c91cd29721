"""Checks on real weights what the tests check on the tiny model, and writes one page.

    bash scripts/accept.sh                                              Qwen/Qwen-Image-Edit-2511
    bash scripts/accept.sh models/Qwen-Image-Edit-2509 --out runs/accept-2509 --lightning lightning.safetensors
    bash scripts/accept.sh --only velocity --only vae
    bash scripts/accept.sh --again edits

Parts that have passed are not run again, unless the model or an option has changed. Each part is its own process, so a part
that fails does not stop the others. Its output is in OUT/logs. The table and OUT/accept.html are renewed after each part.
The exit code is 0 if every requested part has passed. docs/acceptance.md says what each part does, and explains its bounds.
"""

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import platform
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asks for a GPU without waking it, so that parts can be forked

import torch

from data_prep.errors import InputError, exit_codes
from data_prep.model.directory import COMPONENTS, ModelDirectory
from scripts.acceptance.findings import Findings, Options, read, table, write_page
from train.record.provenance import versions

PARTS = {
    **dict.fromkeys(("files", "velocity", "prompts", "vae"), "fidelity"),
    **dict.fromkeys(("cache", "lbm", "sft", "resume"), "training"),
    **dict.fromkeys(("edits", "speed"), "using"),
}
"""Name -> the module whose function `check_NAME` it is, imported in the part's own process: some of what it needs wakes a GPU."""
OF_EDITS = {"lightning", "base_steps"}
"""Options that no other part depends on."""
LAST_LINES = 6
"""Of the log of a command that failed, on the page."""
SHORT = {"2511": "Qwen/Qwen-Image-Edit-2511", "2509": "Qwen/Qwen-Image-Edit-2509"}
PACKAGES = ("torch", "diffsynth", "diffusers", "transformers", "peft")


def main(arguments: argparse.Namespace) -> bool:
    """Does the parts that are due. True if all that were asked for have passed.

    Raises:
        InputError: there is no such model.
    """
    options, wanted = options_of(arguments), arguments.only or list(PARTS)
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("NPROC", "1")
    results: list[Findings] = []
    for part in wanted:
        before, key = read(options.out, part), key_of(options, part)
        if before and before.passed and before.key == key and part not in arguments.again:
            print(f"{part}: passed before", flush=True)
            results.append(before)
        else:
            print(f"{part}: {options.out}/logs/{part}.log", flush=True)
            results.append(in_a_process(part, options, key))
        shown = [found for each in PARTS if (found := read(options.out, each))]
        page = write_page(options.out, f"Acceptance of {options.name}", facts(options, shown), shown)
    print(table(results))
    print(page)
    return all(result.passed for result in results)


def in_a_process(part: str, options: Options, key: str) -> Findings:
    """What the part finds. It is forked, before this process has touched a GPU."""
    assert not torch.cuda.is_initialized()
    (options.out / "logs").mkdir(exist_ok=True)
    Findings(part, key, error="it was ended from outside before it was done").save(options.out)
    process = multiprocessing.get_context("fork").Process(target=work, args=(part, options, key))
    sys.stdout.flush()
    process.start()
    process.join()
    found = read(options.out, part)
    assert found
    if process.exitcode and not found.error:
        found.error = f"its process ended with {process.exitcode}"
        found.save(options.out)
    return found


def work(part: str, options: Options, key: str) -> None:
    """The part, in its own process: what it and its children print goes to its log, and what it has found to its file."""
    file = options.out / "logs" / f"{part}.log"
    with file.open("w", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        torch.backends.cudnn.allow_tf32 = False  # float32 is float32
        findings, start = Findings(part, key), time.perf_counter()
        try:
            module = importlib.import_module(f"scripts.acceptance.{PARTS[part]}")
            getattr(module, f"check_{part}")(options, findings)
        except subprocess.CalledProcessError as error:
            last = file.read_text(errors="replace").splitlines()[-LAST_LINES:]
            findings.error = "\n".join([f"{shlex.join(error.cmd)} ended with {error.returncode}", *last])
        except Exception as error:  # the page says what it was
            traceback.print_exc()
            findings.error = f"{type(error).__name__}: {error}"
        findings.seconds = time.perf_counter() - start
        findings.device = device_name(options)  # last: it takes some of the card's memory
        findings.save(options.out)


def options_of(arguments: argparse.Namespace) -> Options:
    """From the command line, with the model's folder found, or downloaded."""
    name = SHORT.get(arguments.model, arguments.model)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda needs a GPU, and torch finds none here: use --device cpu")
    if arguments.side % 32:
        raise InputError(f"--side must be a multiple of 32, got {arguments.side}")
    if arguments.lightning and not arguments.lightning.exists():
        raise InputError(f"no adapter at {arguments.lightning}")
    for part in (*(arguments.only or ()), *arguments.again):
        if part not in PARTS:
            raise InputError(f"there is no part {part}: they are {', '.join(PARTS)}")
    model = ModelDirectory.resolve(name)
    return Options(
        str(model.path.resolve()),  # parts start commands in another folder
        name,
        arguments.out.resolve(),
        arguments.device,
        arguments.dtype,
        arguments.side,
        arguments.rank,
        arguments.train_steps,
        arguments.base_steps,
        arguments.lightning and arguments.lightning.resolve(),
        arguments.tiny,
    )


def key_of(options: Options, part: str) -> str:
    """Key of the model's contents and the options that the part's results depend on."""
    left_out = {"out", "model", "name"} | (OF_EDITS if part != "edits" else set())
    values = {name: str(value) for name, value in asdict(options).items() if name not in left_out}
    values["fingerprint"] = ModelDirectory(Path(options.model)).fingerprint(*COMPONENTS)
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()


def device_name(options: Options) -> str:
    """The card, which is only asked for in a part's own process."""
    return torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU"


def facts(options: Options, results: Sequence[Findings]) -> list[tuple[str, Any]]:
    """What holds for the whole page."""
    card = " and ".join(dict.fromkeys(result.device for result in results if result.device))
    shown = [("date", date.today().isoformat()), ("device", card), ("numbers", options.dtype), ("side", options.side)]
    return [*shown, ("rank", options.rank), *versions(*PACKAGES).items()]


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="bash scripts/accept.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument(
        "model", nargs="?", default="2511", help="Model to check: 2511, 2509, a folder or a hub id (default 2511)."
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/accept"), help="Folder for all results (default runs/accept)."
    )
    parser.add_argument(
        "--only", action="append", metavar="PART", help=f"Run only this part: {', '.join(PARTS)}. Repeatable."
    )
    parser.add_argument(
        "--again",
        action="append",
        default=[],
        metavar="PART",
        help="Run this part again although it passed before. Repeatable.",
    )
    parser.add_argument("--lightning", type=Path, metavar="FILE", help="Lightning LoRA to edit with in 4 steps.")
    parser.add_argument("--side", type=int, default=1024, help="Side of the images in pixels (default 1024).")
    parser.add_argument("--rank", type=int, default=64, help="Rank of the LoRA (default 64).")
    parser.add_argument("--train-steps", type=int, default=20, help="Steps of each training (default 20).")
    parser.add_argument(
        "--base-steps", type=int, default=40, help="Sampling steps of the base model's edit (default 40)."
    )
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        default="bfloat16",
        help="Data type of the weights (default bfloat16).",
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if cuda else "cpu")
    parser.add_argument(
        "--tiny", action="store_true", help="Compare the speed with DiffSynth's at the tiny model's sizes."
    )
    return parser.parse_args(words)


if __name__ == "__main__":
    with exit_codes():
        sys.exit(0 if main(parse_arguments()) else 1)
