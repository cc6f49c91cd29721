"""Measures how fast `pairs` and `check` are, and whether their memory stays the same when a dataset grows.

    python scripts/bench/data_prep.py
    python scripts/bench/data_prep.py --pairs 500 --rows 10000,100000 --only memory

Speed: rows per second of both commands, including their start, on synthetic pairs (pieces of photographs, JPEG of
quality 90), for each number of processes. Memory: the peak of a process after reading dataset files of two lengths,
and after `check` has stored as many measured rows and searched them for duplicates. It prints tables. The exit code is 1
if anything but a .json file (which is read whole) takes more than --limit bytes per row. Linux only (/proc/self/status).
"""

import argparse
import csv
import json
import multiprocessing
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import numpy as np
import pyarrow as pa
from PIL import ImageEnhance
from pyarrow import parquet

from data_prep.errors import InputError, exit_codes
from data_prep.jobs.items import Done, Item
from data_prep.rows.rows import Row, read_rows

QUALITY = 90


def make_pairs(folder: Path, number: int, size: int) -> None:
    """`source/` and `target/` of pieces of photographs; in the target a square has another colour and brightness."""
    from scripts.photographs import (
        TRAIN,
        load,
        random_crop,
    )  # not at the top: it would be in the memory that is measured

    rng, photographs = random.Random(0), [load(path) for path in TRAIN]
    for side in ("source", "target"):
        (folder / side).mkdir(parents=True)
    for index in range(number):
        source = random_crop(photographs[index % len(photographs)], size, rng)
        left, top, side = rng.randrange(size // 2), rng.randrange(size // 2), size // 4
        box = left, top, left + side, top + side
        target = source.copy()
        target.paste(ImageEnhance.Color(ImageEnhance.Brightness(source.crop(box)).enhance(1.5)).enhance(0.3), box)
        for name, image in (("source", source), ("target", target)):
            image.save(folder / name / f"{index:06d}.jpg", quality=QUALITY)


def measure_speed(folder: Path, number: int, size: int, processes: list[int]) -> Iterator[tuple[str, int, float]]:
    """Runs both commands from nothing. Yields the command, the number of processes, and rows per second."""
    make_pairs(folder / "pairs", number, size)
    for count in processes:
        dataset, report = folder / f"dataset-{count}", folder / f"check-{count}"
        pairs = ["pairs", "--folder", folder / "pairs", "--out", dataset, "--prompt", "Turn the square grey"]
        check = ["check", "--dataset", dataset / "dataset.jsonl", "--out", report]
        for command in (pairs, check):
            yield command[0], count, number / _seconds([*command, "--processes", count])


def _seconds(arguments: list[Any]) -> float:
    command = [sys.executable, "data_prep/run.py", *map(str, arguments)]
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{' '.join(command)} ended with code {done.returncode}: {done.stderr.strip()}")
    return time.monotonic() - start


def write_tables(folder: Path, number: int) -> dict[str, Path]:
    """One dataset of made-up rows in each format. The pictures that it names need not be there."""
    paths = {suffix: folder / f"{number}.{suffix}" for suffix in ("jsonl", "csv", "parquet", "json")}
    names = list(_made_up_row(0))
    with (
        open(paths["jsonl"], "w") as lines,
        open(paths["json"], "w") as whole,
        open(paths["csv"], "w", newline="") as cells,
        parquet.ParquetWriter(paths["parquet"], pa.schema([(name, pa.string()) for name in names])) as table,
    ):
        writer = csv.DictWriter(cells, names)
        writer.writeheader()
        for start in range(0, number, 10_000):
            rows = [_made_up_row(index) for index in range(start, min(start + 10_000, number))]
            texts = [json.dumps(row) for row in rows]
            lines.write("\n".join(texts) + "\n")
            whole.write((",\n" if start else "[") + ",\n".join(texts))
            writer.writerows(rows)
            table.write_table(pa.Table.from_pylist(rows, table.schema))
        whole.write("]")
    return paths


def _made_up_row(index: int) -> dict[str, str]:
    name = f"{index % 1000:04d}/{index:08d}"
    prompt = f"Put the lamp number {index} on the table, and leave everything else as it is"
    return {"id": name, "prompt": prompt, "image": f"target/{name}.jpg", "edit_image": f"source/{name}.jpg"}


def peak_of_reading(path: Path) -> int:
    """Bytes that this process held at most, once all rows were read."""
    for _ in read_rows(path):
        pass
    return _peak()


def peak_of_checking(path: Path) -> int:
    """Bytes that this process held at most, once `check` has taken in all rows, each with two pictures like no other."""
    from data_prep.check.findings import Limits  # torch, which the others shall not hold
    from data_prep.check.survey import Survey
    from data_prep.model.geometry import Geometry

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        survey = Survey(Path(folder), Limits(Geometry(max_pixels=1024 * 1024)))
        for row in read_rows(path):
            assert isinstance(row, Row)
            survey.add(row, Done(Item(row.number, row.id), _made_up_measurement(rng)))
        survey.finish()
    return _peak()


def _made_up_measurement(rng: np.random.Generator) -> dict[str, Any]:
    """As `data_prep.check.measures.measurement` gives it."""
    from data_prep.rows.duplicates import HASH_BYTES

    return {
        "sizes": [[1024, 1024]] * 2,
        "tokens": 20,
        "conversions": [],
        "alike": None,
        "turn": None,
        "drift": [0.0, 0.0, 0.0],
        "mask": None,
        "hashes": [rng.bytes(HASH_BYTES).hex() for _ in range(2)],
        "digest": rng.bytes(8).hex(),
    }


def _peak() -> int:
    """The kernel's own count: `getrusage` would begin with what the parent held."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def measure_memory(folder: Path, rows: tuple[int, int]) -> Iterator[tuple[str, int, int]]:
    """Yields what was read and the peaks with few and many rows, each of a process of its own."""
    paths = [write_tables(folder, number) for number in rows]
    kinds: list[tuple[str, Callable[[Path], int], str]] = [
        *((f"read .{suffix}", peak_of_reading, suffix) for suffix in paths[0]),
        ("check, index and duplicates", peak_of_checking, "jsonl"),
    ]
    for title, function, suffix in kinds:
        few, many = (_in_new_process(function, of_length[suffix]) for of_length in paths)
        yield title, few, many


def _in_new_process(function: Callable[[Path], int], path: Path) -> int:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, path).result()


def print_memory(folder: Path, rows: tuple[int, int], limit: float) -> bool:
    """Prints the table. Returns whether all stays within the limit."""
    few_rows, many_rows = rows
    print(f"{'memory':28} {few_rows:>9} rows {many_rows:>9} rows  bytes a row")
    within = True
    for title, few, many in measure_memory(folder, rows):
        growth = (many - few) / (many_rows - few_rows)
        exempt, over = title == "read .json", growth > limit
        remark = "  held whole" if exempt else "  TOO MUCH" if over else ""
        print(f"{title:28} {few / 2**20:11.0f} MB {many / 2**20:11.0f} MB {growth:12.0f}{remark}", flush=True)
        within &= exempt or not over
    return within


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise ValueError
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5000, help="Number of pairs to build and to check (default 5000).")
    parser.add_argument("--size", type=int, default=512, help="Side of the pairs' images, in pixels (default 512).")
    parser.add_argument(
        "--processes",
        type=_numbers,
        default=[1, 2],
        help="Numbers of processes to time, separated by commas (default 1,2).",
    )
    parser.add_argument(
        "--rows",
        type=_numbers,
        default=[10_000, 1_000_000],
        help="Rows of the small and the large dataset file (default 10000,1000000).",
    )
    parser.add_argument("--limit", type=float, default=200, help="Bytes per row that memory may grow by (default 200).")
    parser.add_argument("--only", choices=("speed", "memory"), help="Measure only one of the two (default both).")
    parser.add_argument(
        "--work", type=Path, help="Folder for the files, several GB with a million rows (default a temporary folder)."
    )
    arguments = parser.parse_args()
    if len(arguments.rows) != 2 or arguments.rows[0] >= arguments.rows[1]:
        parser.error("--rows must be two numbers, the smaller one first")
    within = True
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        if arguments.only != "memory":
            print(f"{'speed':8} {'processes':>10} {'rows/s':>8}")
            for name, count, rate in measure_speed(Path(folder), arguments.pairs, arguments.size, arguments.processes):
                print(f"{name:8} {count:10} {rate:8.1f}", flush=True)
        if arguments.only != "speed":
            within = print_memory(Path(folder), tuple(arguments.rows), arguments.limit)
    sys.exit(0 if within else 1)


if __name__ == "__main__":
    with exit_codes():
        main()
