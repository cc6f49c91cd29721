"""The demo's table: the scores of its evaluation, and on the same rows those of a fill and of a round trip without training.

python scripts/demo_table.py --evaluation runs/demo/evaluation --model models/tiny
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from scipy.sparse import coo_array, diags_array
from scipy.sparse.linalg import splu
from torch import Tensor

from data_prep.errors import InputError, exit_codes
from data_prep.model.directory import ModelDirectory
from data_prep.model.encoders import load_vae
from data_prep.model.geometry import to_pixels
from data_prep.rows.images import open_image, open_mask
from data_prep.rows.rows import Row, read_rows
from eval.scores.metrics.metric import Example, Scores
from eval.scores.metrics.pixels import Pixels

COLUMNS = {"psnr": "PSNR, dB", "psnr_edited": "in the removed sticker, dB", "psnr_background": "background, dB"}
NAMES = {
    "source": "source unchanged",
    "base": "base model without LoRA",
    "lbm": "**LBM**",
    "flow": "flow matching",
}
SHOWN = {"base": (4, 20), "lbm": (1, 2, 4), "flow": (1, 4, 20)}
"""Step counts of each model, in the order of the table."""
EXACT = 90
"""dB; more than pictures of 8 bits can differ by."""


def harmonic_fill(picture: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Fills a hole so that each of its pixels is the mean of its neighbours: Laplace's equation, with what is kept around it.

    Args:
        picture: (H, W, C), floating point.
        hole: (H, W), True where the picture is not known; some of it must be.

    Returns:
        The picture with the hole filled; at the picture's own border a pixel has fewer neighbours.
    """
    number = np.full(hole.shape, -1)
    number[hole] = np.arange(hole.sum())
    y, x = hole.nonzero()
    degree, known = np.zeros(len(y)), np.zeros((len(y), picture.shape[2]))
    rows, columns = [], []
    for down, right in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        exists = (y + down >= 0) & (y + down < hole.shape[0]) & (x + right >= 0) & (x + right < hole.shape[1])
        there = y[exists] + down, x[exists] + right
        degree += exists
        places, unknown = exists.nonzero()[0], hole[there]
        known[places[~unknown]] += picture[there][~unknown]
        rows.append(places[unknown])
        columns.append(number[there][unknown])
    row, column = np.concatenate(rows), np.concatenate(columns)
    neighbours = coo_array((np.ones(len(row)), (row, column)), shape=(len(y), len(y)))
    filled = picture.copy()
    filled[hole] = splu((diags_array(degree) - neighbours).tocsc()).solve(known)
    return filled


def read_examples(dataset: str) -> Iterator[Example]:
    """The held-out rows, each with its source as the prediction.

    Raises:
        InputError: a row is unusable.
    """
    for row in read_rows(dataset):
        if not isinstance(row, Row):
            raise InputError(f"{dataset}: {row}")
        source, target = (
            (to_pixels(open_image(path)) + 1) / 2 for path in (row.edit_image[row.bridge_image], row.image)
        )
        kept = torch.from_numpy(np.array(open_mask(row.back_mask)) >= 128) if row.back_mask else None
        yield Example(row.id, row.prompt, "source", source, target, source, kept)


def score_fills(examples: Sequence[Example]) -> Scores:
    """Scores of the harmonic fill of the known masks: means over the rows that have one."""
    measured = []
    for example in examples:
        if example.background is not None:
            hole = ~example.background.numpy()
            filled = harmonic_fill(example.source.permute(1, 2, 0).double().numpy(), hole)
            measured.append(score(example, torch.from_numpy(filled).permute(2, 0, 1).float()))
    return means(measured)


def score_round_trips(examples: Sequence[Example], model: str) -> Scores:
    """Scores of the targets through the VAE and back: what no edit that ends in its decoder can be expected to exceed."""
    vae = load_vae(ModelDirectory.resolve(model), dtype=torch.float32)
    with torch.no_grad():
        trips = [vae.decode(vae.encode(example.target[None] * 2 - 1))[0] for example in examples]
    return means([score(example, (trip + 1) / 2) for example, trip in zip(examples, trips, strict=True)])


def score(example: Example, prediction: Tensor) -> Scores:
    """Scores of a prediction for an example, (3, H, W) in about [0, 1]."""
    return Pixels()(replace(example, prediction=prediction.clamp(0, 1)))


def means(measured: Sequence[Scores]) -> Scores:
    """Means of each column, over the rows that have it."""
    return {name: fmean(each[name] for each in measured if name in each) for name in COLUMNS}


def table(report: dict, fill: Scores, trip: Scores) -> list[str]:
    """The lines of a Markdown table. With several seeds, every cell has the value of each.

    Args:
        report: content of an evaluation's `report.json`, whose adapters are called `lbm`, `flow`, `lbm-1`, `flow-1` and so on.
        fill: scores of the harmonic fill.
        trip: scores of the VAE's round trip.

    Raises:
        InputError: the evaluation lacks one of the lines.
    """
    found: dict[tuple[str, int], list[dict]] = defaultdict(list)
    for method in report["methods"]:
        if method["kind"] == "edit":
            found[method["adapter"].partition("-")[0], method["steps"]].append(method)
    source = next(method for method in report["methods"] if method["kind"] == "source")
    lines = [f"| | {' | '.join(COLUMNS.values())} | s per edit |", "|---" * (len(COLUMNS) + 2) + "|"]
    lines.append(_line(NAMES["source"], [_scores(source)], None))
    for name, counts in SHOWN.items():
        for steps in counts:
            seeds = found[name, steps]
            if not seeds:
                raise InputError(f"the evaluation has no {name} at {steps} steps: make it with scripts/demo.sh")
            label = f"{NAMES[name]}, {steps} step{'s' * (steps > 1)}"
            lines.append(_line(label, [_scores(seed) for seed in seeds], fmean(s["seconds_per_edit"] for s in seeds)))
    without_whole = {name: value for name, value in fill.items() if name != "psnr"}  # it has the rows with a mask alone
    lines.append(_line("harmonic fill of the known mask, no model", [without_whole], None))
    lines.append(_line("the target through the tiny VAE and back", [trip], None))
    return lines


def _scores(method: dict) -> Scores:
    return {name: value["mean"] for name, value in method["scores"].items()}


def _line(label: str, seeds: Sequence[Scores], seconds: float | None) -> str:
    cells = [" / ".join(_cell(scores.get(name)) for scores in seeds) for name in COLUMNS]
    return f"| {label} | {' | '.join(cells)} | {'–' if seconds is None else f'{seconds:.2f}'} |"


def _cell(value: float | None) -> str:
    if value is None:
        return "–"
    return "equal" if value > EXACT else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--evaluation", type=Path, default=Path("runs/demo/evaluation"), help="Folder that eval/run.py wrote."
    )
    parser.add_argument("--model", default="models/tiny", help="Model folder whose VAE is used.")
    args = parser.parse_args()
    report = json.loads((args.evaluation / "report.json").read_text(encoding="utf-8"))
    examples = list(read_examples(report["settings"]["dataset"]))
    print("\n".join(table(report, score_fills(examples), score_round_trips(examples, args.model))))


if __name__ == "__main__":
    with exit_codes():
        main()
