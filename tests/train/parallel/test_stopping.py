"""Training that is asked to stop saves its last complete step, and the same command continues exactly."""

import json
import os
import random
import signal
import sys
from pathlib import Path

import psutil
import pytest

from tests.children import runs, started, wait_until
from tests.commands import ROOT, launch, launcher, run_script, warm_programs
from tests.scripts.test_launchers import SCONTROL, program
from tests.train.test_run import adapter_bytes, metrics
from train.parallel.stopping import FOLDER, StopRequest

STEPS = 40


@pytest.fixture(scope="module")
def settings(tiny_model_dir, tiny_pairs, tiny_cache) -> list[str]:
    """A run that saves only at its end."""
    data = [f"data.dataset={tiny_pairs}/train.json", f"model.path={tiny_model_dir}", f"cache.dir={tiny_cache}"]
    small = ["adapter.rank=4", "train.micro_batch_size=1", f"train.num_steps={STEPS}", "train.save_every=1000"]
    return ["train/run.py", "+exp=tiny_lbm", *data, *small, "train.global_batch_size=4", "validate=none"]


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory) -> Path:
    """The run that nobody stops."""
    folder = tmp_path_factory.mktemp("whole")
    run_script(*settings, f"run_dir={folder}")
    return folder


def steps(run_dir: Path) -> int:
    """Steps done."""
    file = run_dir / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def trainers(parent: int) -> list[psutil.Process]:
    """The processes that train, below this one."""
    found = psutil.Process(parent).children(recursive=True)
    return [each for each in found if runs(each) and "train/run.py" in " ".join(each.cmdline())]


def assert_stopped_and_continued(settings: list[str], run_dir: Path, whole: Path) -> None:
    """The last complete step is saved, and the rest gives what the uninterrupted run gave."""
    done = steps(run_dir)
    assert 0 < done < STEPS
    assert [path.name for path in (run_dir / "checkpoints").glob("step-*")] == [f"step-{done:06d}"]
    again = run_script(*settings, f"run_dir={run_dir}")
    assert f"resuming from {run_dir}/checkpoints/step-{done:06d}" in again.stderr
    assert metrics(run_dir) == metrics(whole)
    assert adapter_bytes(run_dir, STEPS) == adapter_bytes(whole, STEPS)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_are_wishes_while_training_and_themselves_again_after(number):
    before = signal.getsignal(number)
    with StopRequest() as request:
        assert request.reason == ""
        os.kill(os.getpid(), number)
        assert request.reason == number.name
        assert request.exit_code == 128 + number
        os.kill(os.getpid(), number)  # the same key press, through the launcher
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_is_meant(monkeypatch):
    monkeypatch.setattr("train.parallel.stopping.IMPATIENCE", -1.0)
    with StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_launcher_asks_through_a_file_and_knows_who_trains(monkeypatch, tmp_path):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    with StopRequest() as request:
        assert [path.name for path in tmp_path.iterdir()] == [f"pid-{os.getpid()}"]
        assert request.reason == ""
        (tmp_path / "stop").touch()
        assert (request.reason, request.exit_code) == ("the launcher", 0)
    assert [path.name for path in tmp_path.iterdir()] == ["stop"]


@pytest.mark.slow
@pytest.mark.distributed
def test_sigterm_to_accelerate_loses_nothing(settings, whole, tmp_path):
    """accelerate dies of it and passes nothing on; its process saves, and is not left training."""
    after = random.SystemRandom().randrange(2, STEPS - 15)
    command = [sys.executable, *launcher(1), *settings, f"run_dir={tmp_path}/run"]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    with (tmp_path / "errors").open("w") as errors, started(command, stderr=errors, env=alone) as process:
        wait_until(lambda: steps(tmp_path / "run") >= after, process)
        (trainer,) = trainers(process.pid)
        process.terminate()
        process.wait()
        wait_until(lambda: not runs(trainer))
    said = (tmp_path / "errors").read_text()
    assert f"stopped by the end of its launcher after step {steps(tmp_path / 'run')}: the same command resumes" in said
    assert_stopped_and_continued(settings, tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_launcher_passes_the_wish_on_and_waits(settings, whole, tmp_path, number):
    environment = os.environ | warm_programs(tmp_path / "programs") | {"NPROC": "1", "OMP_NUM_THREADS": "1"}
    command = ["bash", ROOT / "scripts/launch.sh", *settings[1:], f"run_dir={tmp_path}/run"]
    with (tmp_path / "errors").open("w") as errors, started(command, stderr=errors, env=environment) as process:
        wait_until(lambda: steps(tmp_path / "run") >= 3, process)
        process.send_signal(number)
        assert process.wait() == 128 + number
        assert trainers(os.getpid()) == []
    lines = (tmp_path / "errors").read_text().splitlines()
    assert lines[-1].startswith(
        f"stopped by the launcher after step {steps(tmp_path / 'run')}: the same command resumes"
    )
    assert_stopped_and_continued(settings, tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_agree_on_the_step(settings, tmp_path):
    """One of two is asked; both drop the same unfinished step."""
    options = [*settings, "parallel=ddp", f"run_dir={tmp_path}/run"]
    whole, broken = ([*settings, "parallel=ddp", f"run_dir={tmp_path / name}"] for name in ("whole", "run"))
    launch(2, *whole)
    with started([sys.executable, *launcher(2), *options], env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        wait_until(lambda: steps(tmp_path / "run") >= 3, process)
        second = next(each for each in trainers(process.pid) if each.environ().get("RANK") == "1")
        second.send_signal(signal.SIGUSR1)
        process.wait()
    done = steps(tmp_path / "run")
    assert 0 < done < STEPS
    assert (tmp_path / f"run/checkpoints/step-{done:06d}/optimizer.safetensors").exists()
    launch(2, *broken)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.distributed
def test_slurm_requeues_with_progress(settings, whole, tmp_path):
    """The time limit comes before the first regular checkpoint: the job goes back into the queue with what was trained."""
    scancel = 'for file in "$STEPS_OF"/*; do kill -USR1 "$(cat "$file")"; done'
    program(tmp_path / "slurm/scontrol", SCONTROL)
    program(tmp_path / "slurm/scancel", scancel)
    program(tmp_path / "slurm/srun", 'while [[ "$1" == --* ]]; do shift; done; echo $$ >"$STEPS_OF/0"; exec "$@"')
    (tmp_path / "steps").mkdir()
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "1"}
    job |= {"SUBMITTED": str(ROOT / "scripts/slurm_multinode.sh"), "STEPS_OF": str(tmp_path / "steps")}
    environment = os.environ | warm_programs(tmp_path / "programs") | job | {"OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{tmp_path}/slurm:{environment['PATH']}"
    command = ["bash", ROOT / "scripts/slurm_multinode.sh", *settings[1:], f"run_dir={tmp_path}/run"]
    file = tmp_path / "output"
    with file.open("w") as output, started(command, stdout=output, stderr=output, env=environment) as process:
        wait_until(lambda: steps(tmp_path / "run") >= 3, process)
        process.send_signal(signal.SIGUSR1)
        assert process.wait() == 128 + signal.SIGUSR1
    assert file.read_text().splitlines()[-1] == "scontrol requeue 4711"
    assert_stopped_and_continued(settings, tmp_path / "run", whole)


def test_two_trainings_never_share_a_folder(settings, whole, tmp_path):
    """The second one says who is there."""
    from train.record.lock import locked

    with locked(tmp_path):
        done = run_script(*settings, f"run_dir={tmp_path}", check=False)
    assert done.returncode == 2
    assert f"{tmp_path} is in use by process {os.getpid()} on " in done.stderr
    assert json.loads((tmp_path / ".owner.json").read_text())["pid"] == os.getpid()
