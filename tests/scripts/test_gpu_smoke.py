"""The check at the real size, run at the tiny one."""

import json
import math

import pytest
import torch

from tests.commands import launch


@pytest.mark.slow
def test_tiny_smoke(tmp_path):
    """The production recipe, LBM with Prodigy under ZeRO-3, on random weights that were never on a disk."""
    arguments = ["--size", "tiny", "--out", tmp_path, "train.num_steps=4"]
    done = launch(1, "scripts/gpu_smoke.py", *arguments)
    figures = json.loads((tmp_path / "smoke.json").read_text())
    assert figures["steps"] == 4
    assert figures["parallel"] == "zero3"
    assert math.isfinite(figures["first loss"])
    assert math.isfinite(figures["last loss"])
    assert "memory per GPU" in done.stderr
    assert "planned GiB" in done.stdout
    again = launch(1, "scripts/gpu_smoke.py", *arguments, check=False)
    assert "name another --out" in again.stderr


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU of 96 GB")
def test_full_size_on_a_gpu(tmp_path):
    launch(1, "scripts/gpu_smoke.py", "--out", tmp_path)
    figures = json.loads((tmp_path / "smoke.json").read_text())
    assert math.isfinite(figures["last loss"])
    assert 0.9 < figures["measured / planned"] < 1.1
