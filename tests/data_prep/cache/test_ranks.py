"""Phase 1 on two processes, through accelerate launch on CPU."""

import json

import pytest
import torch

from tests.caching import cached
from tests.commands import launch


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_cache_what_one_does(tiny_model_dir, tiny_pairs, tiny_cache, tmp_path):
    """The same records in the same order, each encoded once; only VAE batches are cut differently.

    `parallel=zero3` is of phase 2: the encoders are loaded and run without it.
    """
    data = [f"data.dataset={tiny_pairs}/train.json", f"data.validation={tiny_pairs}/validation.json"]
    paths = [f"model.path={tiny_model_dir}", f"cache.dir={tmp_path}/cache", f"run_dir={tmp_path}/run"]
    settings = ["phases=[cache]", "cache.shard_size=2", "parallel=zero3"]
    done = launch(2, "train/run.py", "+exp=tiny_lbm", *data, *paths, *settings)
    assert done.stderr.count("12 rows cached (12 encoded now)") == 1
    one, two = (cached(folder, tiny_pairs / "train.json") for folder in (tiny_cache, tmp_path / "cache"))
    assert one.keys == two.keys
    for a, b in zip(one, two, strict=True):
        # bf16 values of float32 latents that may differ in the last bits
        assert torch.allclose(a.target_latents.float(), b.target_latents.float(), atol=0.05)
        assert torch.equal(a.prompt_emb, b.prompt_emb)
    rows = sum(len(json.loads(line)) > 0 for line in (tmp_path / "run" / "rejected.jsonl").read_text().splitlines())
    assert rows == 0
