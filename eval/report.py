"""A page that compares runs: quality by step count beside the source unchanged, seconds per edit, curves, pictures.

    python eval/report.py --title "LBM beside flow matching" --out runs/report.html runs/lbm runs/flow

One file with everything inside. The numbers are those of each run's last validation.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
__import__("data_prep")  # without the environment, it says how to enter it

from typing import Annotated

import typer

from data_prep.cli import run_command
from eval.reports.runs_report import print_table, read_run, write_report


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR…", help="Folders written by train/run.py.")],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")],
    title: Annotated[str, typer.Option(help="Of the page.")] = "Validation",
) -> None:
    """Compares the last validations of runs on one self-contained page."""
    summaries = [read_run(folder) for folder in runs]
    write_report(out, title, summaries)
    print_table(summaries)
    print(out)


if __name__ == "__main__":
    run_command(report)
