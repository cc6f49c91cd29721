"""Sweeps by the real command: jobs that are runs like any other, checked before the first one starts."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st

from tests.children import PATIENCE, descendants, started, wait_until
from tests.commands import ROOT, run_script, warm_programs, warm_python
from train.sweep import LONGEST_NAME, Sweep, job_name, quoted

SMALL = [
    *("+exp=tiny_lbm", "validate=none", "train.num_steps=1", "train.micro_batch_size=1"),
    *("data.max_pixels=4096", "cache.shard_size=4"),
]


def sweep_command(*overrides: str) -> list[str]:
    """The arguments of a small sweep."""
    return [str(ROOT / "train/run.py"), *SMALL, "-m", *overrides]


def run_sweep(folder: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs it from a folder."""
    return run_script(*sweep_command(*overrides), cwd=folder, env=os.environ | environment, check=False)


@pytest.fixture
def workspace(tiny_model_dir, tiny_pairs, tmp_path, tmp_path_factory, monkeypatch) -> Path:
    """A user's folder: paths in it are relative, and one has a space."""
    for name, value in warm_programs(tmp_path_factory.mktemp("programs")).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "my pairs").symlink_to(tiny_pairs)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/tiny").symlink_to(tiny_model_dir)
    return tmp_path


@given(st.text(st.characters(blacklist_categories=["Cc", "Cs"])))
def test_what_is_quoted_is_read_back(text):
    assert OverridesParser.create().parse_override(f"name={quoted(text)}").value() == text


@given(st.text())
@example(".")
@example("..")
def test_a_jobs_folder_is_one_folder_and_its_own(swept):
    name = job_name(swept)
    assert "/" not in name
    assert name not in ("", ".", "..")
    assert len(name) <= LONGEST_NAME + 7
    assert name != job_name(f"{swept}/") != job_name(f"{swept}_")


def test_jobs_are_the_combinations():
    swept = ["adapter.rank=4,8", "optim=adamw,prodigy", "seed=range(0,2)", "+optim.lr=interval(0.1,0.2)"]
    parsed = Sweep.parse([*SMALL, *swept, "hydra/launcher=submitit_slurm", "adapter.target_modules=[to_q,to_k]"])
    assert parsed.launcher == "submitit_slurm"
    jobs = parsed.jobs()
    assert len(jobs) == len({tuple(job) for job in jobs}) == 8
    assert all(job[: len(SMALL) + 1] == [*SMALL, "adapter.target_modules=[to_q,to_k]"] for job in jobs)
    assert jobs[-1][-4:] == ["adapter.rank=8", "optim=prodigy", "seed=1", "+optim.lr=0.1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapter.rnk=4,8"], "unknown key adapter.rnk: did you mean adapter.rank?"),
        (["adapter.rank=4,8,0"], "adapter.rank must be positive, got 0"),
        (["loss=lbm,fow"], "there is no configs/loss/fow.yaml: did you mean loss=flow?"),
        (["adapter.rank=4,["], "adapter.rank must be a whole number, got '4,['"),
        (["run_dir=a,b"], "run_dir cannot be swept over: the sweep gives every job its own folder"),
        (["adapter.rank=4,8", "adapter.rank=4"], "adapter.rank is given twice: once with the values"),
        (["hydra/launcher=submitt"], "there is no configs/hydra/launcher/submitt.yaml"),
        (["hydra.sweeep.dir=a"], "unknown key hydra.sweeep.dir"),
    ],
)
def test_one_wrong_job_starts_none(overrides, message, tmp_path):
    done = run_sweep(tmp_path, "data.dataset=pairs.json", *overrides)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_sweep_inside_a_launch_is_refused(tmp_path):
    done = run_sweep(tmp_path, "data.dataset=pairs.json", WORLD_SIZE="2")
    assert (done.returncode, "start a sweep with python" in done.stderr) == (2, True)


@pytest.mark.skipif(
    importlib.util.find_spec("hydra_plugins") is not None, reason="hydra-submitit-launcher is installed"
)
def test_a_missing_plugin_is_named(tmp_path):
    done = run_sweep(tmp_path, "data.dataset=pairs.json", "adapter.rank=4,8", "hydra/launcher=submitit_slurm")
    assert (done.returncode, done.stderr) == (
        2,
        "error: hydra/launcher=submitit_slurm needs a plugin: uv pip install hydra-submitit-launcher\n",
    )


@pytest.mark.slow
def test_a_sweep_runs_every_job_and_continues(workspace):
    """Two jobs and the cache that all runs share; the third job, added later, is all that the same command then has to do."""
    arguments = ["data.dataset=my pairs/train.json", "seed=3", "run_dir=runs/my sweep"]
    names = {"WANDB_NAME": "first"}
    done = run_sweep(workspace, *arguments, "adapter.rank=2,4", **names)
    assert done.returncode == 0, done.stderr
    folder = workspace / "runs/my sweep"
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter.rank=2",
        "adapter.rank=4",
        "multirun.yaml",
    ]
    assert "12 rows cached (12 encoded now)" in done.stderr
    assert "12 rows cached (0 encoded now)" in done.stderr
    assert len(list((workspace / "cache/indexes").iterdir())) == 1
    for rank in (2, 4):
        job = folder / f"adapter.rank={rank}"
        config = (job / "config.yaml").read_text()
        assert f"name: tiny_lbm-adapter.rank={rank}\n" in config
        assert f"  rank: {rank}\n" in config
        assert json.loads((job / "metrics.jsonl").read_text())["step"] == 1
    done = run_sweep(workspace, *arguments, "adapter.rank=2,4,6", **names)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("already has all 1 steps: nothing is left to train") == 2
    head, *table = done.stdout.splitlines()[-4:]
    assert head.split() == ["run", "steps", "loss", "best", "adapter"]
    for rank, line in zip((2, 4, 6), table, strict=True):
        name, steps, _, path = line.split(maxsplit=3)
        assert (name, steps) == (f"adapter.rank={rank}", "1")
        assert (workspace / path / "adapter_model.safetensors").is_file()
    assert (folder / "adapter.rank=6/checkpoints/step-000001").is_dir()


@pytest.mark.slow
def test_a_job_that_fails_leaves_the_others_alone(workspace):
    """The exit code tells."""
    done = run_sweep(workspace, "data.dataset=missing.json,'my pairs/train.json'", "adapter.rank=2")
    assert done.returncode == 1
    assert "error: there is no dataset at missing.json" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: the job data.dataset=missing.json ended with code 1")
    trained = list((workspace / "runs/sweeps/tiny_lbm").glob("data.dataset=_my_pairs_train.json_-*/metrics.jsonl"))
    assert len(trained) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_sweep_that_is_stopped_takes_its_job_along(number, workspace):
    python = [sys.executable] if number == signal.SIGINT else warm_python()
    arguments = ["data.dataset=my pairs/train.json", "train.num_steps=100000", "adapter.rank=2,4"]
    metrics = workspace / "runs/sweeps/tiny_lbm/adapter.rank=2/metrics.jsonl"
    with started([*python, *sweep_command(*arguments)], cwd=workspace, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: metrics.exists() and metrics.stat().st_size, process)
        process.send_signal(number)
        assert process.wait(PATIENCE) != 0
    wait_until(lambda: not running_in(workspace))  # 100,000 steps take hours
    assert not (workspace / "runs/sweeps/tiny_lbm/adapter.rank=4").exists()


def running_in(folder: Path) -> list[psutil.Process]:
    """Processes that were started from the folder."""
    return [process for process in descendants() if process.as_dict(["cwd"])["cwd"] == str(folder)]


@pytest.mark.slow
@pytest.mark.distributed
def test_jobs_of_a_queue_build_the_cache_once(workspace):
    """Two jobs at the same time, of two processes each."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    arguments = [
        "data.dataset=my pairs/train.json",
        "adapter.rank=2,4",
        "parallel=ddp",
        "hydra/launcher=submitit_local",
    ]
    done = run_sweep(workspace, *arguments, NPROC="2")
    assert done.returncode == 0, done.stderr
    folder = workspace / "runs/sweeps/tiny_lbm"
    logs = [path.read_text() for path in folder.glob(".submitit/*/*_log.err")]
    assert len(logs) == 3
    assert sum("12 rows cached" in log for log in logs) == 1
    assert all((folder / f"adapter.rank={rank}/checkpoints/step-000001").is_dir() for rank in (2, 4))


@pytest.mark.slow
def test_help_and_configuration_are_as_before(tmp_path):
    """Overrides may stand before and after a flag; -m and --cfg exclude each other."""
    done = run_script("train/run.py", "+exp=tiny_lbm", "--cfg", "data.dataset=a.json", "adapter.rank=3")
    assert "rank: 3" in done.stdout
    done = run_script("train/run.py", "+exp=tiny_lbm", "--cfg", "-m", check=False)
    assert (done.returncode, "not allowed with argument" in done.stderr) == (2, True)
