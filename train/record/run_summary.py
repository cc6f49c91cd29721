"""What a whole run came to, from its `metrics.jsonl`: also of a run that was stopped and continued many times."""

import json
from collections import defaultdict, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from train.record.run_files import BEST, CHECKPOINTS, LATEST, METRICS

RECENT = 100
"""Steps that a final loss is the mean of: a single step's is mostly the noise of its sigmas."""

HIGHER_IS_BETTER = ("psnr", "ssim")


def summarise(metrics: Path) -> dict[str, float]:
    """The numbers to compare runs by.

    Returns:
        - `final/step`, `final/samples` (seen in training), `final/training_hours` (steps alone, without validation)
        - `final/loss` and every `final/loss/…`: the mean of the last RECENT steps that have it
        - `final/validation/…`: the last validation
        - `best/validation/…` and `best/validation/…_step`: of PSNR and SSIM, the first of equals, once training has begun
    """
    totals: dict[str, float] = {}
    recent: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))
    last: dict[str, float] = {}
    best: dict[str, float] = {}
    with metrics.open() as lines:
        for line in lines:
            if not line.endswith("\n"):  # the last of a run that was killed
                break
            numbers = json.loads(line)
            step = numbers.pop("step")
            totals["final/step"] = step
            if "seconds/step" in numbers:
                seconds = numbers["seconds/step"]
                _add(totals, "final/training_hours", seconds / 3600)
                _add(totals, "final/samples", round(numbers["samples_per_s"] * seconds))
            for name, value in numbers.items():
                if name == "loss" or name.startswith("loss/"):
                    recent[f"final/{name}"].append(value)
                elif name.startswith("validation/"):
                    last[f"final/{name}"] = value
                    if step and _has_best(name) and value > best.get(f"best/{name}", float("-inf")):
                        best |= {f"best/{name}": value, f"best/{name}_step": step}
    means = {name: sum(values) / len(values) for name, values in recent.items()}
    return totals | means | last | best


def as_table(run_dirs: Sequence[Path]) -> Table:
    """Runs below each other: steps, final loss, and the best checkpoint with its number; the best run first.

    Args:
        run_dirs: those that have trained nothing are left out.
    """
    table = Table("run", "steps", "loss", "best", "adapter", box=None, pad_edge=False, header_style=None)
    found = [(folder, summarise(folder / METRICS)) for folder in run_dirs if (folder / METRICS).is_file()]
    judged = {folder: best_checkpoint(folder / CHECKPOINTS) for folder, _ in found}

    def place(run: tuple[Path, dict[str, float]]) -> tuple[str, float]:
        best = judged[run[0]]
        return (best["name"], -best["value"] if _rises(best["name"]) else best["value"]) if best else ("~", 0)

    for folder, numbers in sorted(found, key=place):
        best, steps = judged[folder], f"{numbers.get('final/step', 0):.0f}"
        shown = f"{best['value']:.4g} {best['name']} at step {best['step']}" if best else ""
        newest = f"step-{best['step']:06d}" if best else _newest(folder / CHECKPOINTS)
        loss = f"{numbers['final/loss']:.4g}" if "final/loss" in numbers else ""
        table.add_row(folder.name, steps, loss, shown, f"{folder / CHECKPOINTS}/{newest}" if newest else "")
    return table


def _newest(checkpoints: Path) -> str:
    """The name of the newest checkpoint; empty if there is none."""
    return (checkpoints / LATEST).read_text(encoding="utf-8").strip() if (checkpoints / LATEST).exists() else ""


def best_checkpoint(checkpoints: Path) -> dict[str, Any] | None:
    """`step`, `name` and `value` of the checkpoint that validated best, from a run's folder of checkpoints."""
    return json.loads((checkpoints / BEST).read_text()) if (checkpoints / BEST).exists() else None


def _add(totals: dict[str, float], name: str, value: float) -> None:
    totals[name] = totals.get(name, 0) + value


def _has_best(name: str) -> bool:
    """`validation/steps_4/psnr_edited`: yes; `validation/source/psnr`, the untrained baseline: no."""
    return not name.startswith("validation/source/") and _rises(name)


def is_better(name: str, value: float, other: float) -> bool:
    """Whether a number of this name speaks for its model: PSNR and SSIM if it is higher, distances if it is lower."""
    return value > other if _rises(name) else value < other


def _rises(name: str) -> bool:
    return name.rpartition("/")[2].split("_")[0] in HIGHER_IS_BETTER
