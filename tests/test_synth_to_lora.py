"""A folder of photographs becomes a trained tiny LoRA with three commands."""

import json
import math
import shutil

import pytest

from data_prep.rows.rows import read_rows
from scripts.photographs import SKIMAGE_DATA, SKLEARN_DATA
from tests.commands import run_script
from tests.test_readme import QUICK

PHOTOGRAPHS = [
    SKIMAGE_DATA / "coffee.png",
    SKIMAGE_DATA / "chelsea.png",
    *(SKLEARN_DATA / f"{x}.jpg" for x in ("china", "flower")),
]


@pytest.mark.slow
def test_photographs_become_a_lora(tiny_model_dir, tmp_path):
    photos, pairs, run = (tmp_path / name for name in ("photos", "pairs", "run"))
    photos.mkdir()
    for path in PHOTOGRAPHS:
        shutil.copy(path, photos)
    dataset = pairs / "dataset.jsonl"

    making = ("--recipes", "remove,insert,remove+relight,outpaint", "--per-image", 4, "--size", 64, "--validation", 1)
    run_script("data_prep/run.py", "synth", "--images", photos, "--out", pairs, *making, "--processes", 1)
    checked = run_script("data_prep/run.py", "check", "--dataset", dataset, "--out", tmp_path / "check", check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    paths = [f"run_dir={run}", f"cache.dir={tmp_path}/cache", f"model.path={tiny_model_dir}"]
    training = [f"data.dataset={dataset}", *paths, *QUICK.split()]
    lengths = ["train.num_steps=3", "train.save_every=3", "train.validate_every=3", "train.log_every=1"]
    run_script("train/run.py", "+exp=tiny_lbm", *training, *lengths)

    assert (run / "checkpoints" / "step-000003" / "adapter_model.safetensors").stat().st_size > 1000
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [value for line in lines for name, value in line.items() if "loss" in name and "val" not in name]
    assert len(losses) >= 3
    assert all(math.isfinite(loss) for loss in losses)
    held_out = {row.id for row in read_rows(dataset) if row.split == "validation"}
    metrics = json.loads((run / "validation" / "step-000003" / "metrics.json").read_text())
    assert len(held_out) == 4
    assert metrics["num_rows"] == len(held_out)
