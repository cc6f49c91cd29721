"""Where a run's numbers and pictures go. metrics.jsonl is always written; the others come from the configuration."""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from train.record.run_summary import summarise

Numbers = Mapping[str, float]
STOPPED = 255
"""The exit code that loggers are told of a run that was asked to stop: it is neither complete nor failed."""


@dataclass
class Picture:
    """A picture that the run has written."""

    path: Path
    caption: str = ""


Pictures = Mapping[str, Picture]
"""By name: `validation/grid`, then `validation/row-7`. The first one is the overview of the others."""


class Logger(Protocol):
    """One place to log to. By default pictures and checkpoints, being files of the run already, go nowhere else."""

    def log(self, step: int, numbers: Numbers) -> None:
        """Numbers of an optimizer step; steps count from 1."""
        ...

    def images(self, step: int, images: Pictures) -> None:
        """Pictures of an optimizer step."""

    def artifact(self, step: int, folder: Path) -> None:
        """A checkpoint was written."""

    def state(self) -> dict[str, Any]:
        """JSON values, kept in every checkpoint and given back to the logger that continues from it."""
        return {}

    def summary(self, numbers: Numbers) -> None:
        """What the whole run came to, as `train.record.run_summary.summarise` says. Comes last, before `close`."""

    def close(self, exit_code: int = 0) -> None:
        """Nothing follows. `exit_code` is 0 for a run that did what it should, STOPPED for one that was stopped."""
        ...


class JsonLines(Logger):
    """`metrics.jsonl`: one object a line, `step` and every number. What is after `resumed_step` is dropped on opening."""

    def __init__(self, path: Path, resumed_step: int = 0):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _complete_lines(path) if json.loads(line)["step"] <= resumed_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(path)
        self.file = path.open("a", buffering=1)

    def log(self, step: int, numbers: Numbers) -> None:
        """Appends a line."""
        self.file.write(json.dumps({"step": step, **numbers}) + "\n")

    def close(self, exit_code: int = 0) -> None:
        """Closes the file."""
        self.file.close()


def _complete_lines(path: Path) -> list[str]:
    """The file's lines, without one that a kill cut short."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]


class TensorBoard(Logger):
    """Event files for `tensorboard --logdir runs`: scalars, pictures, and as text captions, configuration and summary."""

    def __init__(
        self,
        run_dir: Path,
        config: dict[str, Any],
        record: dict[str, Any] | None = None,
        resumed_step: int = 0,
        **_: Any,
    ):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resumed_step + 1 if resumed_step else None)
        for name, values in {"config": config, "record": record or {}}.items():
            self.writer.add_text(name, _as_code(json.dumps(values, indent=2, ensure_ascii=False)), resumed_step)
        self.last_step = resumed_step

    def log(self, step: int, numbers: Numbers) -> None:
        """Adds scalars."""
        self.last_step = step
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def images(self, step: int, images: Pictures) -> None:
        """Adds pictures; a caption is a text of the same step, since a tag here is either a picture or a text."""
        for name, picture in images.items():
            pixels = np.asarray(Image.open(picture.path).convert("RGB"))
            self.writer.add_image(name, pixels, step, dataformats="HWC")
            if picture.caption:
                self.writer.add_text(f"{name}/caption", picture.caption, step)
        self.writer.flush()

    def summary(self, numbers: Numbers) -> None:
        """Adds a table."""
        rows = "".join(f"\n| {name} | {value:.6g} |" for name, value in numbers.items())
        self.writer.add_text("summary", f"| | |\n|---|---|{rows}", self.last_step)

    def close(self, exit_code: int = 0) -> None:
        """Flushes."""
        self.writer.close()


def _as_code(text: str) -> str:
    """Markdown that shows the text as it is."""
    return "".join(f"    {line}\n" for line in text.splitlines())


class Terminal(Logger):
    """A live line on a terminal; in a file, a line of the first step and then every `log_every` steps, or every minute."""

    SHOWN = ("loss", "lr", "samples_per_s")
    QUIET = 60.0
    """Seconds without a line."""

    def __init__(self, num_steps: int, log_every: int, resumed_step: int = 0):
        self.num_steps, self.log_every, self.start, self.first = num_steps, log_every, time.monotonic(), resumed_step
        self.last_line = -math.inf
        self.bar = None
        if Console(stderr=True).is_terminal:
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
            self.bar = Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True))
            self.task = self.bar.add_task("training", total=num_steps, completed=resumed_step, text="")
            self.bar.start()

    def log(self, step: int, numbers: Numbers) -> None:
        """Shows loss, learning rate and speed."""
        if "loss" not in numbers:
            return
        text = "  ".join(f"{name} {numbers[name]:.4g}" for name in self.SHOWN if name in numbers)
        if self.bar:
            self.bar.update(self.task, completed=step, text=text)
        elif step % self.log_every == 0 or step == self.num_steps or time.monotonic() - self.last_line > self.QUIET:
            self.last_line = time.monotonic()
            left = (self.last_line - self.start) / (step - self.first) * (self.num_steps - step)
            clock = time.strftime("%H:%M:%S", time.gmtime(left))
            print(f"training {step}/{self.num_steps}  {text}  {clock} left", file=sys.stderr, flush=True)

    def images(self, step: int, images: Pictures) -> None:
        """Says where the overview is."""
        for name, picture in list(images.items())[:1]:
            self._print(f"{name}: {picture.path}")

    def summary(self, numbers: Numbers) -> None:
        """Says how well it went, and which checkpoint is the best."""
        for name, value in numbers.items():
            if name.startswith("best/") and name.endswith("/psnr"):
                self._print(f"best {name.removeprefix('best/')}: {value:.2f} dB at step {numbers[f'{name}_step']:.0f}")

    def close(self, exit_code: int = 0) -> None:
        """Leaves the bar as it is."""
        if self.bar:
            self.bar.stop()

    def _print(self, text: str) -> None:
        if self.bar:
            self.bar.console.print(text)
        else:
            print(text, file=sys.stderr, flush=True)


class Loggers:
    """All of a run's loggers as one; a context that closes them and tells them whether the run failed.

    A logger that fails costs no training: that is shown, and kept in `problems`.

    Args:
        loggers: by name.
        metrics: the `metrics.jsonl` that the summary is made of, or None for no summary.
    """

    def __init__(self, loggers: Mapping[str, Logger], metrics: Path | None = None):
        self.loggers = loggers
        self.metrics = metrics
        self.problems: list[str] = []
        self.exit_code = 0

    def log(self, step: int, numbers: Numbers) -> None:
        """To every logger."""
        self._each(lambda logger: logger.log(step, numbers))

    def images(self, step: int, images: Pictures) -> None:
        """To every logger."""
        self._each(lambda logger: logger.images(step, images))

    def artifact(self, step: int, folder: Path) -> None:
        """To every logger."""
        self._each(lambda logger: logger.artifact(step, folder))

    def state(self) -> dict[str, Any]:
        """The state of every logger that has one, by name."""
        return {name: state for name, state in self._each(lambda logger: logger.state()).items() if state}

    def problem(self, text: str) -> None:
        """Shows what went wrong beside the training, once."""
        if text not in self.problems:
            self.problems.append(text)
            print(f"warning: {text}; the run goes on", file=sys.stderr, flush=True)

    def close(self, exit_code: int = 0) -> None:
        """Sums the run up and closes every logger."""
        numbers = summarise(self.metrics) if self.metrics else {}
        self._each(lambda logger: logger.summary(numbers))
        self._each(lambda logger: logger.close(exit_code))

    def _each(self, call: Callable[[Logger], Any]) -> dict[str, Any]:
        """What each logger returns, by name, without those that fail."""
        results = {}
        for name, logger in self.loggers.items():
            try:
                results[name] = call(logger)
            except Exception as error:
                self.problem(f"the logger {name} failed: {type(error).__name__}: {error}")
        return results

    def __enter__(self) -> "Loggers":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is not None:  # before closing, which may take its time over a network
            print(f"training stopped: {kind.__name__}: {error}", file=sys.stderr, flush=True)
        stopped = kind is not None and issubclass(kind, KeyboardInterrupt)
        self.close(self.exit_code if kind is None else STOPPED if stopped else 1)
