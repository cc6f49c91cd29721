"""The loggers: what they leave on disk, through the real command and alone."""

import io
import json
import math
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.commands import run_script
from tests.wandb_log import Written
from train.record.loggers import JsonLines, Logger, Loggers, Picture, TensorBoard, Terminal
from train.record.run_summary import summarise

pytestmark = pytest.mark.slow


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
    assert [line.split()[1] for line in lines] == ["1/4", "2/4", "4/4"]  # the first at once
    assert lines[1].startswith("training 2/4  loss 0.5  lr 0.0001  samples_per_s 8")
    assert lines[1].endswith("left")


def test_a_line_at_least_every_minute(capsys, monkeypatch):
    terminal = Terminal(num_steps=1000, log_every=500)
    for step in (1, 2, 3):
        monkeypatch.setattr("time.monotonic", lambda step=step: 1e6 + 61 * (step // 3))
        terminal.log(step, {"loss": 0.5})
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["1/1000", "3/1000"]


def test_the_terminal_names_the_overview_and_the_best_checkpoint(capsys):
    terminal = Terminal(num_steps=4, log_every=2)
    terminal.images(
        2, {"validation/grid": Picture(Path("grid.png")), "validation/row-1": Picture(Path("row.png"), "p")}
    )
    terminal.summary(
        {"final/loss": 0.1, "best/validation/steps_4/psnr": 25.345, "best/validation/steps_4/psnr_step": 2}
    )
    terminal.close()
    expected = ["validation/grid: grid.png", "best validation/steps_4/psnr: 25.34 dB at step 2"]
    assert capsys.readouterr().err.splitlines() == expected


def texts(events: EventAccumulator, tag: str) -> list[tuple[int, str]]:
    """Step and text of everything under a tag."""
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors(f"{tag}/text_summary")]


def test_tensorboard_holds_numbers_pictures_captions_settings_and_summary(tmp_path):
    config, record = {"optim": {"lr": 1e-4}}, {"git": {"commit": "0123", "dirty": False}, "instruction": "冬天"}
    Image.new("RGB", (8, 6), "red").save(tmp_path / "red.png")
    logger = TensorBoard(tmp_path, config, record, name="n", state={})
    logger.log(1, {"loss": 0.5, "validation/steps_4/psnr": 20.0})
    logger.images(1, {"validation/row-3": Picture(tmp_path / "red.png", "make it red · steps_4: 20.0 dB")})
    logger.summary({"final/loss": 0.25})
    logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5)]
    (picture,) = events.Images("validation/row-3")
    with Image.open(io.BytesIO(picture.encoded_image_string)) as shown:
        assert shown.size == (8, 6)
        assert shown.getpixel((0, 0)) == (255, 0, 0)
    assert texts(events, "validation/row-3/caption") == [(1, "make it red · steps_4: 20.0 dB")]
    for name, values in {"config": config, "record": record}.items():
        ((step, text),) = texts(events, name)
        assert (step, json.loads(text)) == (0, values)
        assert all(line.startswith("    ") for line in text.splitlines())  # a code block in Markdown
    assert "| final/loss | 0.25 |" in texts(events, "summary")[0][1]


def test_tensorboard_forgets_what_was_after_the_checkpoint(tmp_path):
    first = TensorBoard(tmp_path, {}, {})
    for step in range(1, 8):
        first.log(step, {"loss": 1.0})
    first.close()
    second = TensorBoard(tmp_path, {}, {}, resumed_step=5)
    for step in range(6, 9):
        second.log(step, {"loss": 2.0})
    second.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("loss")]
    assert shown == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (6, 2), (7, 2), (8, 2)]


def write_metrics(path: Path, num_steps: int, first_step: int = 1) -> None:
    """A run with global batch 8, validated every 50 steps; PSNR has its best in the middle, SSIM at the end."""
    logger = JsonLines(path, first_step - 1)
    for step in range(first_step, num_steps + 1):
        loss = {"loss": 1.0 if step <= 100 else 0.5, "loss/main": 0.25}
        logger.log(step, loss | {"seconds/step": 0.3, "samples_per_s": 8 / 0.3, "lr": 1e-4})
        if step % 50 == 0:
            scores = {"steps_4/psnr": 25 - abs(step - 100) / 50, "steps_4/ssim": step / 1000, "source/psnr": 12.0}
            logger.log(step, {f"validation/{name}": value for name, value in scores.items()})
    logger.close()


def test_summary_of_a_run(tmp_path):
    write_metrics(tmp_path / "metrics.jsonl", 200)
    assert summarise(tmp_path / "metrics.jsonl") == pytest.approx(
        {
            "final/step": 200,
            "final/samples": 1600,
            "final/training_hours": 200 * 0.3 / 3600,
            "final/loss": 0.5,
            "final/loss/main": 0.25,
            "final/validation/steps_4/psnr": 23,
            "final/validation/steps_4/ssim": 0.2,
            "final/validation/source/psnr": 12,
            "best/validation/steps_4/psnr": 25,
            "best/validation/steps_4/psnr_step": 100,
            "best/validation/steps_4/ssim": 0.2,
            "best/validation/steps_4/ssim_step": 200,
        }
    )


def test_the_summary_of_a_continued_run_is_that_of_an_uninterrupted_one(tmp_path):
    write_metrics(tmp_path / "a.jsonl", 200)
    write_metrics(tmp_path / "b.jsonl", 130)
    write_metrics(tmp_path / "b.jsonl", 200, first_step=101)
    assert summarise(tmp_path / "a.jsonl") == summarise(tmp_path / "b.jsonl")


def test_the_summary_takes_any_validation(tmp_path):
    logger = JsonLines(tmp_path / "metrics.jsonl")
    logger.log(
        3, {"validation/liked": 0.7, "validation/steps_4/psnr_edited": 20.0, "validation/steps_4/psnr": math.nan}
    )
    logger.close()
    summary = summarise(logger.path)
    assert summary["final/validation/liked"] == 0.7
    best = {name: value for name, value in summary.items() if name.startswith("best/")}
    assert best == {"best/validation/steps_4/psnr_edited": 20, "best/validation/steps_4/psnr_edited_step": 3}


def test_the_summary_of_a_run_that_failed_before_its_first_step(tmp_path):
    JsonLines(tmp_path / "metrics.jsonl").close()
    assert summarise(tmp_path / "metrics.jsonl") == {}


class Remembering(Logger):
    """What it was told last."""

    def log(self, step, numbers):
        """Nothing."""

    def state(self):
        return {"id": "a"}

    def summary(self, numbers):
        self.numbers = numbers

    def close(self, exit_code=0):
        self.exit_code = exit_code


@pytest.mark.parametrize(("error", "code"), [(None, 0), (RuntimeError, 1), (KeyboardInterrupt, 255)])
def test_loggers_end_with_a_summary_and_know_whether_the_run_failed(tmp_path, error, code):
    metrics, logger = JsonLines(tmp_path / "metrics.jsonl"), Remembering()
    with (
        pytest.raises(error) if error else nullcontext(),
        Loggers({"metrics": metrics, "mine": logger}, metrics.path) as loggers,
    ):
        loggers.log(1, {"loss": 0.5})
        assert loggers.state() == {"mine": {"id": "a"}}
        if error:
            raise error
    assert logger.exit_code == code
    assert logger.numbers == {"final/step": 1, "final/loss": 0.5}


class Failing(Remembering):
    """A place that cannot be reached."""

    def log(self, step, numbers):
        raise ConnectionError("no route")


def test_a_logger_that_fails_is_shown_once_and_costs_nothing(capsys):
    remembering = Remembering()
    with Loggers({"far": Failing(), "near": remembering}) as loggers:
        loggers.log(1, {"loss": 0.5})
        loggers.log(2, {"loss": 0.5})
    assert loggers.problems == ["the logger far failed: ConnectionError: no route"]
    assert capsys.readouterr().err == "warning: the logger far failed: ConnectionError: no route; the run goes on\n"
    assert remembering.exit_code == 0


def test_tensorboard_and_wandb_of_a_run_that_is_continued(
    tiny_model_dir, tiny_pairs, tiny_cache, tmp_path, monkeypatch
):
    """Without a key W&B asks nothing and works offline; both have all numbers, the picture, and what the run depended on."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # no key in a .netrc either
    monkeypatch.setenv("WANDB_NAME", "named")
    data = [f"data.dataset={tiny_pairs}/train.json", f"data.validation={tiny_pairs}/validation.json"]
    paths = [f"model.path={tiny_model_dir}", f"cache.dir={tiny_cache}", f"run_dir={tmp_path}/run"]
    small = ["adapter.rank=4", "train.micro_batch_size=2", "validate.num_rows=2", "logger=all"]
    artifact = "logger.wandb.artifact=true"
    for num_steps in (2, 4):
        steps = [f"train.num_steps={num_steps}", "optim.schedule_steps=4"]
        arguments = ["+exp=tiny_lbm", *data, *paths, *small, artifact, *steps]
        done = run_script("train/run.py", *arguments, env=dict(os.environ))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert "validation/grid" in events.Tags()["images"]
    before, after = (Written(folder) for folder in sorted((tmp_path / "run" / "wandb").glob("offline-run-*")))
    assert before.of("run")[0].run_id == after.of("run")[0].run_id
    assert [row["step"] for row in before.history() + after.history()] == [0, 1, 2, 3, 4]
    assert after.history()[-1]["validation/grid/path"]
    record = after.config()["record"]
    assert record["world_size"] == 1
    assert "train/run.py" in record["command"]
    assert record["data"]
    assert after.summary()["final/step"] == 4
    assert [artifact.type for artifact in after.of("artifact")] == ["adapter"]
    assert f"wandb sync {tmp_path}/run/wandb/offline-run-" in done.stderr


def test_a_run_that_begins_from_another_runs_checkpoint_is_a_run_of_its_own(
    tiny_model_dir, tiny_pairs, tiny_cache, tmp_path, monkeypatch
):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    data = [f"data.dataset={tiny_pairs}/train.json", "validate=none", "logger=wandb"]
    paths = [f"model.path={tiny_model_dir}", f"cache.dir={tiny_cache}"]
    small = ["adapter.rank=4", "train.micro_batch_size=2", "optim.schedule_steps=2"]
    first, second = tmp_path / "a", tmp_path / "b"
    run_script("train/run.py", "+exp=tiny_lbm", *data, *paths, *small, f"run_dir={first}", "train.num_steps=1")
    resume = [f"run_dir={second}", f"resume={first}/checkpoints/step-000001", "train.num_steps=2"]
    run_script("train/run.py", "+exp=tiny_lbm", *data, *paths, *small, *resume)
    ids = [Written(next(run.glob("wandb/offline-run-*"))).of("run")[0].run_id for run in (first, second)]
    assert ids[0] != ids[1]
