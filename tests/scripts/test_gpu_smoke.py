"""The check at the real size, run at the tiny one."""

import json
import math

import pytest
import torch

from data_prep.errors import InputError
from scripts import gpu_smoke
from tests.commands import launch, run_script

pytestmark = pytest.mark.slow

SMOKE = "scripts/gpu_smoke.py"
TINY = ["--size", "tiny", "--out"]


def test_tiny_smoke(tmp_path):
    """The production recipe, LBM with Prodigy under ZeRO-3, on random weights that were never on a disk."""
    arguments = [*TINY, tmp_path, "train.num_steps=4"]
    done = launch(1, SMOKE, *arguments)
    (figures,) = json.loads((tmp_path / "smoke.json").read_text())
    assert figures["steps"] == 4
    assert figures["parallel"] == "zero3"
    assert math.isfinite(figures["first loss"])
    assert math.isfinite(figures["last loss"])
    assert "memory per GPU" in done.stderr
    assert "planned GiB" in done.stdout
    again = launch(1, SMOKE, *arguments, check=False)
    assert "name another --out" in again.stderr


def test_every_combination_is_a_run(tmp_path):
    """And finds nothing of the runs before it but tables of the rotary embedding: each of these models has 7 MB."""
    names = ["single", "zero2", "zero3", "zero3_offload"]
    checkpointing = "train.gradient_checkpointing=full,off"
    vary = ["--vary", f"parallel={','.join(names)}", "--vary", checkpointing, "--vary", "train.num_steps=3"]
    done = run_script(SMOKE, *TINY, tmp_path, *vary)
    runs = json.loads((tmp_path / "smoke.json").read_text())
    found = [(figures["parallel"], figures["checkpointing"], figures["steps"]) for figures in runs]
    assert found == [(name, kept, 3) for name in names for kept in ("full", "off")]
    for figures in runs:
        assert sum(figures[part] for part in gpu_smoke.PARTS) == pytest.approx(figures["s/step"], rel=0.3)
        assert figures["varied"] in done.stdout.splitlines()[-len(runs) :][runs.index(figures)]
    assert max(figures["GiB before"] for figures in runs) < 0.005
    assert not list((tmp_path / "runs").glob("*/checkpoints"))


def test_a_combination_that_fails_leaves_the_others(tmp_path):
    """A target that no module has is found when the plan is made."""
    targets = "adapter.target_modules.0=nowhere,to_q"
    done = run_script(SMOKE, *TINY, tmp_path, "parallel=single", "train.num_steps=2", "--vary", targets, check=False)
    assert done.returncode == 1
    failed, fine = json.loads((tmp_path / "smoke.json").read_text())
    assert "nowhere" in failed["failed"]
    assert "failed" not in fine
    assert "nowhere" in done.stdout.splitlines()[-2]


def test_every_combination_of_values():
    assert gpu_smoke.variations([]) == [[]]
    assert gpu_smoke.variations(["a=1,2", "b=x"]) == [["a=1", "b=x"], ["a=2", "b=x"]]
    with pytest.raises(InputError, match="key=value"):
        gpu_smoke.variations(["a="])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU of 96 GB")
def test_full_size_on_a_gpu(tmp_path):
    launch(1, SMOKE, "--out", tmp_path)
    (figures,) = json.loads((tmp_path / "smoke.json").read_text())
    assert math.isfinite(figures["last loss"])
    assert 0.9 < figures["measured / planned"] < 1.1
