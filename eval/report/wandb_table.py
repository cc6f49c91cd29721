"""An evaluation on Weights & Biases: a table of all rows with their pictures, and the means as summary."""

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from data_prep.errors import InputError
from eval.report.evaluation_page import PictureFile
from eval.report.summary import Report, main_methods
from eval.scores.row_results import SOURCE, TARGET

TABLE = "evaluation/rows"


def log_wandb(project: str, report: Report, picture: PictureFile, folder: Path) -> None:
    """Logs a run of its own, offline if there is no API key (`wandb sync` uploads it later).

    Args:
        project: W&B's project.
        report: the content of `report.json`.
        picture: finds a row's pictures.
        folder: where the folder `wandb` is made.

    Raises:
        InputError: W&B cannot be reached with the key that there is.
    """
    import wandb
    from wandb.errors import CommError

    chosen = "WANDB_MODE" in os.environ
    try:
        has_key = not chosen and wandb.login(prompt=False, verify=False)
        run = wandb.init(
            project=project,
            name=report["title"],
            job_type="evaluation",
            dir=str(folder),
            config=report["settings"] | {"record": report["environment"]},
            mode=None if chosen or has_key else "offline",
            settings=wandb.Settings(console="off", silent=True),
        )
    except CommError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{reason}: check the key and the network, or set WANDB_MODE=offline") from error
    columns, rows = table_rows(report)
    table = wandb.Table(columns=[*columns, SOURCE, "edit", TARGET])
    for values in rows:
        row, method = values[0], values[2]
        table.add_data(*values, *(wandb.Image(str(picture(name, row))) for name in (SOURCE, method, TARGET)))
    run.log({TABLE: table})
    run.summary.update(summary(report))
    run.finish()
    if run.offline and not run.disabled:
        print(f"W&B was offline. To upload the run: wandb sync {shlex.join([run.settings.sync_dir])}", file=sys.stderr)


def table_rows(report: Report) -> tuple[list[str], list[list[Any]]]:
    """Columns, and a line for every row and method: id, instruction, method, and a number or None for every metric."""
    names = list(report["metrics"])
    lines = []
    for row in report["per_row"]:
        for method in main_methods(report):
            if scores := row["scores"].get(method["name"]):
                lines.append([row["id"], row["prompt"], method["name"], *(scores.get(name) for name in names)])
    return ["id", "prompt", "method", *names], lines


def summary(report: Report) -> dict[str, float]:
    """`lbm/steps_4/psnr` and `lbm/steps_4/seconds_per_edit`: the means."""
    numbers = {}
    for method in report["methods"]:
        numbers |= {f"{method['name']}/{name}": score["mean"] for name, score in method["scores"].items()}
        if method["seconds_per_edit"] is not None:
            numbers[f"{method['name']}/seconds_per_edit"] = method["seconds_per_edit"]
    return numbers
