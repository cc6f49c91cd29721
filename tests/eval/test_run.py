"""What the evaluation command refuses before it loads or computes anything."""

import sys
from pathlib import Path

import pytest

from data_prep.cli import run_command
from data_prep.errors import InputError
from eval import run
from eval.request.knobs import AdapterUse


@pytest.mark.parametrize(
    ("way", "given", "named"),
    [
        ("runs", {"wandb": "p", "dataset": "d.json", "rank_by": "ssim"}, "--dataset, --rank-by, --wandb"),
        ("runs", {"push_to": "me/mine", "publish_card": True, "seed": 3}, "--publish-card, --push, --seed"),
        ("runs", {"steps": [4], "cfg_scale": 1.0, "device": "cpu"}, "--steps, --cfg-scale, --device"),
        ("pictures", {"steps": [4], "base": True, "batch_size": 2}, "--base, --steps, --batch-size"),
        ("pictures", {"strength": 0.0, "max_pixels": 4096}, "--strength, --max-pixels"),
        ("pictures", {"adapter": [AdapterUse(Path("a"))], "publish_card": True}, "--adapter, --publish-card"),
        ("pictures", {"weights": "int8", "title": "t", "wandb": "p", "device": "cpu"}, "--weights"),
    ],
)
def test_options_of_another_way_are_refused_by_name(tmp_path, way, given, named):
    with pytest.raises(InputError, match=f"^--{way} .*: leave out {named}$"):
        run.score(**{way: [tmp_path]}, **given, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give the ground truth with --dataset, or with the two folders --sources"),
        ({"sources": Path("s")}, "give the ground truth with --dataset, or with the two folders --sources"),
        ({"dataset": "nothing.json"}, "nothing.json"),
        (
            {"sources": Path("s"), "targets": Path("t"), "split": "all", "root": "r"},
            "^--root, --split is only for --dataset",
        ),
        (
            {"dataset": "d.json", "license": "mit", "private": True},
            "--license, --private",
        ),
    ],
)
@pytest.mark.parametrize("way", ["pictures", "model"])
def test_the_ground_truth_is_looked_at_before_metrics_are_loaded(
    tiny_model_dir, tmp_path, monkeypatch, way, given, message
):
    monkeypatch.setattr(run.MetricOptions, "battery", lambda *_: pytest.fail("metrics were loaded"))
    of = {"pictures": [tmp_path]} if way == "pictures" else {"model": str(tiny_model_dir)}
    with pytest.raises(InputError, match=message):
        run.score(**of, **given, device="cpu", out=tmp_path / "out")


def test_a_seed_below_0_is_refused_by_name(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval/run.py", "--pictures", "p", "--dataset", "d", "--seed", "-1", "--out", "o"])
    with pytest.raises(SystemExit) as ended:
        run_command(run.score)
    assert ended.value.code == 2
    assert "'--seed': Input should be greater than or equal to 0" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["pictures", "runs"])
def test_one_process_measures_pictures_and_compares_runs(tmp_path, monkeypatch, way):
    """Under `accelerate launch` every process would write the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    ground = {"dataset": "nothing.json"} if way == "pictures" else {}
    with pytest.raises(InputError, match=f"--{way} runs in one process: launch several processes only with --model"):
        run.score(**{way: [tmp_path]}, **ground, out=tmp_path / "out")
