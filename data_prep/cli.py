"""What the command lines share: options that mean the same everywhere, and mistakes answered in one sentence."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from data_prep.errors import InputError, Interrupted, exit_codes
from data_prep.jobs import EngineName

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
"""Cores that this process may use."""

CTRL_C = 130
"""Exit code of a command that was interrupted."""

OnErrorName = Literal["raise", "skip"]

Out = Annotated[Path, typer.Option(help="Output folder for dataset.jsonl, rejected.jsonl and new images.")]
Processes = Annotated[int, typer.Option(help="Number of worker processes.", min=1, show_default="all cores")]
Engine = Annotated[EngineName, typer.Option(help="Where the work runs: on this machine or on a Ray cluster.")]
OnError = Annotated[OnErrorName, typer.Option(help="Exit code if some input cannot be used: 2 (raise) or 0 (skip).")]
Seed = Annotated[int, typer.Option(help="Random seed. The same seed makes the same dataset.")]


def run_app(app: typer.Typer, interrupted: str = "the same command continues where it was") -> None:
    """Runs the command line that was given. A wrong one is answered in a sentence, with code 2.

    Args:
        interrupted: what Ctrl-C leaves.
    """
    with exit_codes():
        try:
            code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        except typer.TyperException as error:
            message = getattr(error, "format_message", error.__str__)()
            raise InputError(f"{message.rstrip('.')}; --help says more") from None
        except Interrupted as interruption:
            print(f"interrupted: {interruption}", file=sys.stderr)
            raise SystemExit(CTRL_C) from None
    if code == CTRL_C:  # typer's answer to it
        print(f"interrupted: {interrupted}", file=sys.stderr)
    raise SystemExit(code or 0)


def run_command(command: Callable[..., None]) -> None:
    """Runs a command line that has this one command."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    run_app(app)
