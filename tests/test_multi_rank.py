"""Phase 1 on two processes, through accelerate launch on CPU."""

import json
import subprocess
import sys

import pytest
import torch

from data_prep.records import CacheReader
from tests.commands import ROOT


def launch(*arguments: str) -> subprocess.CompletedProcess:
    """`accelerate launch` with two processes; --cpu would start one."""
    options = [
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--main_process_port",
        "29631",
    ]  # on CPU too
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "train/run.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_cache_what_one_does(tiny_model_dir, tiny_pairs, tiny_cache, tmp_path):
    """The same records in the same order, each encoded once; only VAE batches are cut differently."""
    data = [f"data.dataset={tiny_pairs}/train.json", f"data.validation={tiny_pairs}/validation.json"]
    paths = [f"model.path={tiny_model_dir}", f"cache.dir={tmp_path}/cache", f"run_dir={tmp_path}/run"]
    done = launch("+exp=tiny_lbm", *data, *paths, "phases=[cache]", "cache.shard_size=2")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("12 rows cached (12 encoded now)") == 1
    one, two = CacheReader(tiny_cache / "train"), CacheReader(tmp_path / "cache" / "train")
    assert one.keys == two.keys
    for a, b in zip(one, two, strict=True):
        # bf16 values of float32 latents that may differ in the last bits
        assert torch.allclose(a.target_latents.float(), b.target_latents.float(), atol=0.05)
        assert torch.equal(a.prompt_emb, b.prompt_emb)
    rows = sum(len(json.loads(line)) > 0 for line in (tmp_path / "run" / "rejected.jsonl").read_text().splitlines())
    assert rows == 0


@pytest.mark.slow
@pytest.mark.distributed
def test_training_on_two_processes_is_refused_in_words(tiny_model_dir, tiny_pairs, tiny_cache, tmp_path):
    data = [f"data.dataset={tiny_pairs}/train.json", f"data.validation={tiny_pairs}/validation.json"]
    paths = [f"model.path={tiny_model_dir}", f"cache.dir={tiny_cache}", f"run_dir={tmp_path}/run"]
    done = launch("+exp=tiny_lbm", *data, *paths)
    assert done.returncode != 0
    assert "parallel=single trains on one process, but 2 were launched" in done.stderr
