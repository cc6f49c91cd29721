"""What edits the rows of a table: an editor, and as many processes as were launched."""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import typer

from data_prep.builders.overlay.typography import DEFAULT_FONT
from data_prep.cli import OnErrorName
from data_prep.errors import InputError
from eval.bases.auto import open_model
from eval.request.base import BaseEditor
from eval.request.metadata import stored_digest
from eval.request.options import ModelOptions, PlaceOptions
from eval.request.placement import Placement
from eval.request.sizes import SizeLimits
from eval.tables.job_files import JobFiles
from eval.tables.outcomes import FAILED, RESULTS, Summary
from eval.tables.runner import Entry, run_jobs
from train.parallel.processes import Processes


@dataclass(frozen=True)
class Engine:
    """An editor, and the processes that share its work out: all of them call the same methods."""

    editor: BaseEditor
    placement: Placement
    limits: SizeLimits
    processes: Processes | None
    window: int
    """Rows that are handed to the editor at a time."""

    @classmethod
    def start(cls, model: ModelOptions, place: PlaceOptions, window: int) -> "Engine":
        """Joins the other processes, if there are any, each on a device of its own; loads nothing.

        Raises:
            InputError: the model or its placement is wrong.
        """
        processes, device, limits = None, place.device, model.limits
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            if device and torch.device(device).index is not None:
                raise InputError(
                    f"each of several processes gets its own device: use --device {torch.device(device).type}"
                )
            processes = Processes.start(device)
            device = str(processes.device)
        placement = place.place(device)
        editor = open_model(model, placement)
        together = window if placement.offload == "model" else 1  # else nothing is moved for a row
        return cls(editor, placement, limits, processes, together)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that reports."""
        return self.processes is None or self.processes.is_main

    def edit(self, jobs: Sequence[Entry], out: Path, batch_size: int, fonts: tuple[Path, ...] = ()) -> Summary | None:
        """Does what is not done yet, says how it went, and leaves the other processes. None on all but the first of them."""
        numbers = common(self.limits, self.placement)
        editor = self.editor
        files = JobFiles(
            lambda request: numbers | editor.identity(request) | editor.revised(request), fonts or (DEFAULT_FONT,)
        )
        summary = run_jobs(jobs, files, editor, out, batch_size, self.processes, self.window)
        if self.processes:
            self.processes.stop()
        if not self.is_main:
            return None
        done = summary.num_rows - len(summary.failures)
        print(f"{out / RESULTS}: {done} of {summary.num_rows} rows, {summary.num_edited} edited now")
        return summary


def check_done(summary: Summary, out: Path, on_error: OnErrorName) -> None:
    """Ends a command some of whose rows have failed.

    Raises:
        InputError: they were wrong, and that is no reason to go on.
        typer.Exit: with code 1, the program was.
    """
    failed = f"{len(summary.failures)} of {summary.num_rows} rows failed, {out / FAILED} says why"
    if summary.bugs:
        print(f"{failed}; {summary.bugs} of them because of an error in the program, shown above", file=sys.stderr)
        raise typer.Exit(1)
    if summary.failures and on_error == "raise":
        raise InputError(f"{failed}: run the same command again to retry only those")


def common(limits: SizeLimits, placement: Placement) -> dict[str, Any]:
    """What all pictures of a table depend on besides rows and models. Where parts of a model wait changes none."""
    return {
        "limits": asdict(limits),
        "dtype": str(placement.dtype),
        "weights": placement.weights,
        "gguf": placement.gguf and stored_digest(placement.gguf),
        "vae_tiling": placement.vae_tiling,
        **({"compile": True} if placement.compile else {}),
    }
