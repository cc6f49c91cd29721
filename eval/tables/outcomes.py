"""What a run of jobs leaves beside its pictures: `results.csv`, `failed.csv`, and how long each edit took."""

import csv
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.files import atomic_file
from data_prep.rows.rows import RejectedRow
from eval.request.request import EditResult
from eval.tables.job_files import KeyedJob

RESULTS, FAILED = "results.csv", "failed.csv"
RESULT_COLUMNS = ("row", "id", "image", "prompt", "seed", "output", "seconds", "key")
FAILED_COLUMNS = ("row", "id", "path", "reason")
SECONDS = ".seconds-{}.jsonl"
"""Of one rank: each line the key of a job and the seconds of its pictures, and of those the ones before the first step, for a
run that takes up the work."""


@dataclass(frozen=True)
class Summary:
    """What became of the rows."""

    num_rows: int
    num_edited: int
    """In this run; the others were done before, or failed, or repeat a row."""
    failures: list[RejectedRow]
    bugs: int = 0
    """Failures that are the program's fault."""
    done: Sequence[KeyedJob] = ()
    """All whose pictures are there."""


def say_failure(row: RejectedRow) -> None:
    """A line on stderr, when it happens."""
    print(row, file=sys.stderr, flush=True)


def add_seconds(out: Path, rank: int, key: str, results: Sequence[EditResult]) -> None:
    """Remembers how long a job's pictures took."""
    entry = {"key": key, **{name: [getattr(each, name) for each in results] for name in ("seconds", "encoding")}}
    with open(out / SECONDS.format(rank), "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def write_reports(out: Path, done: Sequence[KeyedJob], failures: Sequence[RejectedRow]) -> None:
    """Writes both tables, in the order of the input. A picture's file name is relative to the tables' folder."""
    seconds = {key: entry["seconds"] for key, entry in read_seconds(out).items()}
    _write(out / RESULTS, RESULT_COLUMNS, (line for keyed in done for line in _lines(keyed, seconds)))
    _write(out / FAILED, FAILED_COLUMNS, ([row.number, row.id, row.path, row.reason] for row in failures))


def _lines(keyed: KeyedJob, seconds: dict[str, list[float]]) -> Iterable[list[Any]]:
    """One for each picture."""
    job, known = keyed.job, seconds.get(keyed.key, [])
    for number, name in enumerate(keyed.outputs):
        took = f"{known[number]:.3f}" if number < len(known) else ""
        seed = job.knobs.get("seed", 0) + number
        yield [job.number, job.id, job.shown, job.knobs.get("prompt", ""), seed, name, took, keyed.key]


def read_seconds(out: Path) -> dict[str, dict[str, list[float]]]:
    """`seconds` and `encoding` of each job's pictures by its key, of this run and of earlier ones. A line that a killed process
    wrote half is left out."""
    known = {}
    for path in sorted(out.glob(SECONDS.format("*"))):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            known[entry["key"]] = entry
    return known


def _write(path: Path, columns: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    with (
        atomic_file(path) as temporary,
        open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(lines)
