"""The loggers: what they leave on disk, through the real command and alone."""

import json
import os

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.commands import run_script
from train.loggers import JsonLines, Terminal


def test_json_lines_forget_what_was_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "loss": 1}\n{"step": 4, "lo')
    logger = JsonLines(path, resumed_step=2)
    logger.log(3, {"loss": 5.0})
    logger.close()
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [3, 2, 5.0]


def test_lines_in_a_file(capsys):
    terminal = Terminal(num_steps=4, log_every=2)
    for step in range(1, 5):
        terminal.log(step, {"loss": 0.5, "lr": 1e-4, "samples_per_s": 8.0})
    terminal.log(4, {"validation/steps_1/psnr": 20.0})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("training 2/4  loss 0.5  lr 0.0001  samples_per_s 8")
    assert lines[0].endswith("left")


@pytest.mark.slow
def test_tensorboard_and_wandb_offline(tiny_model_dir, tiny_pairs, tiny_cache, tmp_path, monkeypatch):
    """Without a key W&B asks nothing and works offline; both have the numbers and the picture."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # no key in a .netrc either
    monkeypatch.setenv("WANDB_NAME", "named")
    data = [f"data.dataset={tiny_pairs}/train.json", f"data.validation={tiny_pairs}/validation.json"]
    paths = [f"model.path={tiny_model_dir}", f"cache.dir={tiny_cache}", f"run_dir={tmp_path}/run"]
    small = ["adapter.rank=4", "train.micro_batch_size=2", "train.num_steps=2", "validate.num_rows=2", "logger=all"]
    run_script("train/run.py", "+exp=tiny_lbm", *data, *paths, *small, env=dict(os.environ), timeout=300)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    assert events.Tags()["images"] == ["validation/grid"]
    offline = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(offline) == 1
    assert list(offline[0].glob("run-*.wandb"))
    assert list(offline[0].rglob("*.png"))
