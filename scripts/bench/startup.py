"""Measures the seconds until a command answers, and until the first training step is done.

    python scripts/bench/startup.py --json startup.json
    python scripts/bench/startup.py --tiny --only help --commands train/run.py,data_prep/run.py

Each measurement is a new process that imports its libraries: the median and the fastest of `--repeat`. `--help`
is only the command line, `import` the module that does the command's work. The first step is that of `train/run.py
+exp=tiny_sft` on a tiny model and a few images, from the start of the process to the first line of metrics.jsonl: with
caching, and with a finished cache. A process that is not timed runs first, so that files are in memory.
"""

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from data_prep.errors import InputError, exit_codes
from scripts.bench.report import Report, environment

COMMANDS = {
    "train/run.py": "train.phases",
    "data_prep/run.py": "data_prep.check.check",
    "eval/edit.py": "eval.qwen.editor",
    "eval/run.py": "eval.scores.recorder",
    "eval/app.py": "eval.page.server",
    "eval/export.py": "eval.exports.merging",
}
"""Command -> what it imports to do its work."""
PARTS = ("help", "import", "first-step")
COLUMNS = {"what": -44, "median s": 10, "fastest s": 11, "runs": 6}
SIZE = 64
"""Side of the images, in pixels."""


def seconds(*words: str) -> float:
    """Seconds of a process, which must succeed."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"{' '.join(words)} failed: {done.stderr.strip().splitlines()[-1]}")
    return time.perf_counter() - start


def until_first_step(folder: Path, run: Path, cache: Path) -> float:
    """Seconds until training has done its first step."""
    metrics = run / "metrics.jsonl"
    data = [f"model.path={folder}/model", f"data.dataset={folder}/data/train.json", f"data.root={folder}/data"]
    small = ["train.num_steps=1", "train.micro_batch_size=1", "adapter.rank=4", "validate=none", "logger=none"]
    command = [sys.executable, "train/run.py", "+exp=tiny_sft", *data, *small, f"run_dir={run}", f"cache.dir={cache}"]
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None and not (metrics.exists() and metrics.read_text().endswith("\n")):
            time.sleep(0.005)
        taken = time.perf_counter() - start
        if process.wait():
            errors.seek(0)
            raise InputError(f"training failed: {errors.read().strip().splitlines()[-1]}")
    return taken


def measure(report: Report, name: str, once: Callable[[], float], repeat: int) -> None:
    """A row."""
    once()
    taken = [once() for _ in range(repeat)]
    report.add(name, {"median s": statistics.median(taken), "fastest s": min(taken), "runs": repeat})


def main(options: argparse.Namespace) -> None:
    """Prints a row for each command and part."""
    report = Report(COLUMNS, options.json, environment("cpu"))
    for command in options.commands:
        if "help" in options.only:
            measure(report, f"{command} --help", lambda words=command: seconds(words, "--help"), options.repeat)
    for command in options.commands:
        if "import" in options.only:
            module = COMMANDS[command]
            measure(report, f"import {module}", lambda module=module: seconds("-c", f"import {module}"), options.repeat)
    if "first-step" in options.only:
        with tempfile.TemporaryDirectory() as name:
            folder, numbers = Path(name), itertools.count()
            seconds("scripts/make_tiny_model.py", "--out", f"{folder}/model")
            rows = ["--train", "4", "--validation", "1", "--size", str(SIZE)]
            seconds("scripts/make_demo_data.py", "--out", f"{folder}/data", *rows)

            def first(cache: str | None = None) -> float:
                number = str(next(numbers))
                return until_first_step(folder, folder / "runs" / number, folder / "caches" / (cache or number))

            measure(report, "first step, with caching", first, options.repeat)
            measure(report, "first step, cached", lambda: first("shared"), options.repeat)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default=",".join(PARTS), help=f"Parts to run, out of {', '.join(PARTS)} (default all)."
    )
    parser.add_argument(
        "--commands", default=",".join(COMMANDS), help="Commands to time, separated by commas (default all)."
    )
    parser.add_argument("--repeat", type=int, default=5, help="Number of timed processes per measurement (default 5).")
    parser.add_argument("--tiny", action="store_true", help="Time only one process per measurement.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="JSON file to write the results to, after every row.")
    options = parser.parse_args()
    options.repeat = 1 if options.tiny else options.repeat
    options.only, options.commands = options.only.split(","), options.commands.split(",")
    if unknown := [*(set(options.only) - set(PARTS)), *(set(options.commands) - COMMANDS.keys())]:
        raise InputError(f"--only knows {', '.join(PARTS)} and --commands {', '.join(COMMANDS)}, got {unknown[0]}")
    return options


if __name__ == "__main__":
    with exit_codes():
        main(parse_arguments())
