"""Checks a dataset file: reads every row and decodes every image, as caching will, and lists what it would refuse.

python data_prep/run.py check --dataset pairs.json [--root photos] [--out rejected.jsonl]
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
from collections import Counter

from data_prep.encode import ahead, prepare_row
from data_prep.errors import InputError, exit_codes
from data_prep.files import write_text
from data_prep.geometry import Geometry, Size
from data_prep.images import RejectedImage
from data_prep.progress import progress
from data_prep.rows import RejectedRow, Row, read_rows

WORKERS = 8


def check_row(row: Row | RejectedRow, geometry: Geometry) -> str | RejectedRow:
    """The row's bucket, as height x width, or why it cannot be used."""
    if isinstance(row, RejectedRow):
        return row
    try:
        return str(Size.of(prepare_row("", row, geometry).target))
    except RejectedImage as error:
        return RejectedRow(row.number, row.id, str(error.path), error.reason)


def check(arguments: argparse.Namespace) -> None:
    """Prints the buckets and every refused row.

    Raises:
        InputError: there is a row that cannot be used, or none that can.
    """
    geometry = Geometry(arguments.max_pixels)
    rows = list(read_rows(arguments.dataset, arguments.root))
    buckets: Counter[str] = Counter()
    rejected: list[RejectedRow] = []
    with progress("checking", len(rows)) as advance:
        for answer in ahead(lambda row: check_row(row, geometry), rows, WORKERS, depth=4 * WORKERS):
            if isinstance(answer, RejectedRow):
                rejected.append(answer)
            else:
                buckets[answer] += 1
            advance(1)
    for bucket, count in buckets.most_common():
        print(f"{count:6} rows of {bucket} pixels")
    for row in rejected:
        print(row)
    if arguments.out:
        lines = ({"row": row.number, "id": row.id, "path": row.path, "reason": row.reason} for row in rejected)
        write_text(arguments.out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    if rejected or not rows:
        raise InputError(
            f"{len(rejected)} of {len(rows)} rows cannot be used: mend them, or cache with data.on_error=skip"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python data_prep/run.py", description=__doc__.splitlines()[0] if __doc__ else None
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "check", help="read every row and decode every image", description="Exit code 2 if any row is refused."
    )
    command.add_argument("--dataset", required=True, help="JSON, JSONL, CSV, Parquet, or a Hugging Face dataset")
    command.add_argument("--root", help="folder that the rows' paths are relative to (default: the dataset's own)")
    command.add_argument("--max-pixels", type=int, default=1024 * 1024, help="as data.max_pixels")
    command.add_argument("--out", type=Path, help="also write the refused rows here, one JSON object a line")
    command.set_defaults(run=check)
    arguments = parser.parse_args()
    with exit_codes():
        arguments.run(arguments)


if __name__ == "__main__":
    main()
