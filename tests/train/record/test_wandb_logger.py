"""W&B without a network: what its transaction log really holds, which is what `wandb sync` uploads."""

import json
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import wandb
from PIL import Image
from safetensors.torch import save_file

from data_prep.errors import InputError
from tests import children
from tests.wandb_log import Written
from tests.wandb_server import WandBServer
from train.record.loggers import Loggers, Picture
from train.record.wandb_logger import WandB, artifact_name

CONFIG = {"train": {"num_steps": 8}, "optim": {"lr": 1e-4}}
RECORD = {"git": {"commit": "0123456789abcdef", "dirty": True}, "data": "fingerprint", "versions": {"torch": "2"}}


@pytest.fixture(autouse=True)
def no_account(tmp_path, monkeypatch):
    """No key, and a home of its own."""
    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_NAME", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield
    wandb.teardown()


@pytest.fixture
def server(monkeypatch):
    """A server on this machine."""
    with WandBServer() as running:
        monkeypatch.setenv("WANDB_BASE_URL", running.url)
        yield running
        wandb.teardown()


def start(tmp_path: Path, **keywords) -> WandB:
    """The logger as a run makes it."""
    return WandB(tmp_path, "my run", CONFIG, RECORD, **keywords)


def folders(tmp_path: Path) -> list[Path]:
    """Of every time that the run was started, oldest first."""
    return sorted((tmp_path / "wandb").glob("offline-run-*"))


def only(tmp_path: Path) -> Written:
    """Of a run that was started once."""
    (folder,) = folders(tmp_path)
    return Written(folder)


def test_config_record_and_commit(tmp_path):
    start(tmp_path).close()
    written = only(tmp_path)
    assert {name: value for name, value in written.config().items() if name != "_wandb"} == {**CONFIG, "record": RECORD}
    assert written.of("environment")[0].git.commit == "0123456789abcdef"
    assert (written.of("run")[0].project, written.of("run")[0].display_name) == ("qwen-image", "my run")


def test_a_step_is_one_row_with_its_pictures_and_captions(tmp_path):
    logger = start(tmp_path)
    Image.new("RGB", (8, 6), "red").save(tmp_path / "red.png")
    for step in range(1, 5):
        logger.log(step, {"loss": 1 / step, "loss/main": 2 / step, "seconds/step": 0.5})
        if step % 2 == 0:
            logger.log(step, {"validation/steps_4/psnr": 20.0 + step})
            overview, row = Picture(tmp_path / "red.png"), Picture(tmp_path / "red.png", f"make it red · {step} dB")
            logger.images(step, {"validation/grid": overview, "validation/row-3": row})
    logger.close()
    rows = only(tmp_path).history()
    assert [row["step"] for row in rows] == [row["_step"] for row in rows] == [1, 2, 3, 4]
    assert [row["loss"] for row in rows] == [1, 1 / 2, 1 / 3, 1 / 4]
    assert [row.get("validation/steps_4/psnr") for row in rows] == [None, 22, None, 24]
    assert [row.get("validation/row-3/caption") for row in rows] == [
        None,
        "make it red · 2 dB",
        None,
        "make it red · 4 dB",
    ]
    assert "validation/grid/caption" not in rows[1]
    for row in rows[1::2]:
        for name in ("validation/grid", "validation/row-3"):
            with Image.open(folders(tmp_path)[0] / "files" / row[f"{name}/path"]) as picture:
                assert picture.size == (8, 6)


def test_charts_are_drawn_over_the_training_step(tmp_path):
    start(tmp_path).close()
    metrics = only(tmp_path).of("metric")
    assert [metric.step_metric for metric in metrics if metric.glob_name == "*"] == ["step"]
    assert [metric.options.hidden for metric in metrics if metric.name == "step"] == [True]


def test_continues_the_same_run_and_loses_no_row(tmp_path):
    """Killed after step 7, continued from the checkpoint of step 5."""
    first = start(tmp_path)
    state = json.loads(json.dumps(first.state()))
    for step in range(1, 8):
        first.log(step, {"loss": 1 / step})
    first.close(1)
    second = start(tmp_path, resumed_step=5, state=state)
    assert second.state() == state
    for step in range(6, 9):
        second.log(step, {"loss": 1 / step})
    second.close()
    before, after = (Written(folder) for folder in folders(tmp_path))
    assert before.of("run")[0].run_id == after.of("run")[0].run_id == state["id"]
    assert (before.of("run")[0].resume, after.of("run")[0].resume) == (False, True)
    assert [row["step"] for row in before.history()] == [1, 2, 3, 4, 5, 6, 7]
    assert [(row["step"], row["loss"]) for row in after.history()] == [(6, 1 / 6), (7, 1 / 7), (8, 1 / 8)]


def test_a_run_without_a_checkpoint_is_a_new_one(tmp_path):
    for _ in range(2):
        start(tmp_path, state={}).close()
    assert len({Written(folder).of("run")[0].run_id for folder in folders(tmp_path)}) == 2


def test_continues_in_the_project_that_it_began_in(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_NAME", "named")
    first = start(tmp_path)
    first.close()
    monkeypatch.delenv("WANDB_PROJECT")
    start(tmp_path, resumed_step=1, state=first.state()).close()
    before, after = (Written(folder).of("run")[0] for folder in folders(tmp_path))
    assert (before.project, before.display_name) == ("mine", "named")
    assert after.project == "mine"


@pytest.mark.parametrize(("error", "code"), [(None, 0), (RuntimeError, 1), (KeyboardInterrupt, 255)])
def test_a_failed_run_is_marked_as_failed(tmp_path, error, code):
    with pytest.raises(error) if error else nullcontext(), Loggers({"wandb": start(tmp_path)}):
        if error:
            raise error
    assert [each.exit_code for each in only(tmp_path).of("exit")] == [code]


def test_summary(tmp_path):
    logger = start(tmp_path)
    logger.log(1, {"loss": 0.5})
    logger.summary({"final/loss": 0.5, "best/validation/steps_4/psnr": 25.0})
    logger.close()
    summary = only(tmp_path).summary()
    assert (summary["loss"], summary["final/loss"], summary["best/validation/steps_4/psnr"]) == (0.5, 0.5, 25.0)


def test_the_printed_command_names_every_part_that_is_not_uploaded(tmp_path, capsys):
    first = start(tmp_path)
    first.close()
    start(tmp_path, resumed_step=1, state=first.state()).close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    words = shlex.split(lines[1].partition(": ")[2])
    assert words == ["wandb", "sync", *map(str, folders(tmp_path))]


def test_disabled(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    logger = start(tmp_path)
    logger.log(1, {"loss": 0.5})
    assert logger.state() == {}
    logger.close()
    assert capsys.readouterr().err == ""
    assert not folders(tmp_path)


@pytest.mark.parametrize("wanted", [False, True])
def test_adapter_as_an_artifact(tmp_path, wanted):
    checkpoint = tmp_path / "checkpoints" / "step-000500"
    checkpoint.mkdir(parents=True)
    save_file({"lora_A": torch.ones(2, 3)}, checkpoint / "adapter_model.safetensors", {"objective": "bridge"})
    for name in ("adapter_config.json", "config.yaml", "optimizer.safetensors"):
        (checkpoint / name).write_text("{}")
    logger = start(tmp_path, artifact=wanted)
    logger.artifact(500, checkpoint)
    logger.close()
    artifacts = only(tmp_path).of("artifact")
    if not wanted:
        assert not artifacts
        return
    (artifact,) = artifacts
    assert (artifact.name, artifact.type, set(artifact.aliases)) == (
        "my-run-adapter",
        "adapter",
        {"latest", "step-500"},
    )
    assert json.loads(artifact.metadata) == {"objective": "bridge", "step": 500}
    files = {entry.path for entry in artifact.manifest.contents}
    assert files == {"adapter_model.safetensors", "adapter_config.json", "config.yaml"}


@pytest.mark.parametrize("name", ["my run/2", "配方", "..", "x" * 300, "a&b=c"])
def test_artifact_names_are_legal(name):
    legal = artifact_name(name)
    assert wandb.Artifact(legal, type="adapter").name == legal


def test_a_kill_costs_a_second(tmp_path):
    """The process is gone between one instruction and the next; W&B's own notices and ends as well."""
    code = (
        "import os, sys, time; from pathlib import Path; sys.path.insert(0, os.getcwd());"
        "from train.record.wandb_logger import WandB; logger = WandB(Path(sys.argv[1]), 'n', {});"
        "[logger.log(step, {'loss': 1.0}) for step in range(1, 9)]; time.sleep(3); os.kill(os.getpid(), 9)"
    )
    done = children.run([sys.executable, "-c", code, tmp_path])
    assert done.returncode == -9
    assert [row["step"] for row in only(tmp_path).history()] == [1, 2, 3, 4, 5, 6, 7]  # the eighth may still grow


def interrupted_and_continued(tmp_path: Path) -> None:
    """Killed after step 7, continued from the checkpoint of step 5; finished with step 9."""
    first = start(tmp_path)
    for step in range(1, 8):
        first.log(step, {"loss": 1 / step})
    first.close(1)
    second = start(tmp_path, resumed_step=5, state=first.state())
    for step in range(6, 10):
        second.log(step, {"loss": 1 / step})
    second.summary({"final/loss": 1 / 9})
    second.close()


def check_uploaded(server: WandBServer) -> None:
    """Every row has arrived, in rows that only go forward, and the run has ended well."""
    rows = server.history()
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 6, 7, 8, 9]
    assert [row["_step"] for row in rows] == list(range(1, 12))
    assert all(row["loss"] == 1 / row["step"] for row in rows)
    assert server.exit_codes == [1, 0]
    assert server.summary()["final/loss"] == 1 / 9
    assert server.config["optim"] == {"value": CONFIG["optim"]}


def test_online_the_continued_run_is_the_same_run(tmp_path, server, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    interrupted_and_continued(tmp_path)
    check_uploaded(server)
    lines = capfd.readouterr().err.splitlines()
    assert not [line for line in lines if "WARNING" in line]
    assert len([line for line in lines if line.startswith(f"W&B: {server.url}/")]) == 2


def test_offline_and_uploaded_later_it_is_the_same_run(tmp_path, server, monkeypatch, capsys):
    """With the command that was printed."""
    interrupted_and_continued(tmp_path)
    assert server.history() == []
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    words = shlex.split(capsys.readouterr().err.splitlines()[-1].partition(": ")[2])
    assert words[0] == "wandb"
    done = children.run([sys.executable, "-m", *words], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    check_uploaded(server)


def test_a_server_that_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "3")
    with pytest.raises(InputError, match="WANDB_MODE=offline"):
        start(tmp_path)
