"""What a complete run tells its user."""

import os
import shlex
from pathlib import Path

from data_prep.rows.rows import Row, read_rows
from train.config import Config
from train.config.training_rows import configured_rows, validation_rows
from train.record.run_summary import best_checkpoint


def what_next(config: Config, checkpoints: Path, step: int, held_out: bool) -> str:
    """Where a complete run's adapter is, and the commands that use it, with a picture and an instruction of its own data.

    Args:
        checkpoints: the run's folder of them.
        step: number of the last step.
        held_out: whether there are rows to score on.
    """
    best = best_checkpoint(checkpoints)
    chosen = checkpoints / f"step-{best['step'] if best else step:06d}"
    judged = f", the best by {best['name']} ({best['value']:.4g}); the last is step-{step:06d}" if best else ""
    words = ["--model", str(config.model.path), "--adapter", str(chosen)]
    lines = [f"the adapter is {chosen}{judged}. Next:"]
    rows = validation_rows(config) if config.data.validation else configured_rows(config)
    wanted = "validation" if held_out and not config.data.validation else None
    example = next(
        (row for row in rows if isinstance(row, Row) and row.edit_image and wanted in (None, row.split)), None
    )
    if example:
        images = [word for path in example.edit_image for word in ("--image", os.path.relpath(path))]
        edit = [*words, *images, "--prompt", example.prompt, "--out", "result.png"]
        lines.append(f"  python eval/edit.py {shlex.join(edit)}")
    if held_out:
        data, root = (config.data.validation, config.data.root) if config.data.validation else _with_held_out(config)
        score = [
            *words,
            "--dataset",
            str(data),
            *(["--root", root] if root else []),
            "--out",
            f"{config.run_dir}/scores",
        ]
        lines.append(f"  python eval/run.py {shlex.join(score)}")
    lines.append(f"  python eval/app.py {shlex.join(words[:2])}")
    return "\n".join(lines)


def _with_held_out(config: Config) -> tuple[str, str | None]:
    """The first dataset that has held-out rows, and its root."""
    for each in config.data.datasets:
        rows = read_rows(each.dataset, each.root, text_to_image=True)
        if any(isinstance(row, Row) and row.split == "validation" and row.edit_image for row in rows):
            return each.dataset, each.root
    raise AssertionError("no dataset has held-out rows")
