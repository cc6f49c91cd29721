"""Where a run's numbers and pictures go. metrics.jsonl is always written; the others come from the configuration."""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Numbers = Mapping[str, float]


class Logger(Protocol):
    """One place to log to."""

    def log(self, step: int, numbers: Numbers) -> None:
        """Numbers of an optimizer step; steps count from 1."""
        ...

    def images(self, step: int, images: Mapping[str, Path]) -> None:
        """Pictures by name."""
        ...

    def close(self) -> None:
        """Nothing follows."""
        ...


class JsonLines:
    """`metrics.jsonl`: one object a line, `step` and every number. What is after `resumed_step` is dropped on opening."""

    def __init__(self, path: Path, resumed_step: int = 0):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _complete_lines(path) if json.loads(line)["step"] <= resumed_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(path)
        self.file = path.open("a", buffering=1)

    def log(self, step: int, numbers: Numbers) -> None:
        """Appends a line."""
        self.file.write(json.dumps({"step": step, **numbers}) + "\n")

    def images(self, step: int, images: Mapping[str, Path]) -> None:
        """Pictures are files of the run already."""

    def close(self) -> None:
        """Closes the file."""
        self.file.close()


def _complete_lines(path: Path) -> list[str]:
    """The file's lines, without one that a kill cut short."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]


class TensorBoard:
    """Event files for `tensorboard --logdir runs`."""

    def __init__(self, run_dir: Path, resumed_step: int = 0, **_: Any):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resumed_step + 1 if resumed_step else None)

    def log(self, step: int, numbers: Numbers) -> None:
        """Adds scalars."""
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def images(self, step: int, images: Mapping[str, Path]) -> None:
        """Adds pictures."""
        for name, path in images.items():
            self.writer.add_image(name, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Flushes."""
        self.writer.close()


class WandB:
    """Weights & Biases: project `WANDB_PROJECT` (default `qwen-image`), run `WANDB_NAME` (default the run's name).

    Without an API key it works offline, without a question; `wandb sync` uploads the folder later.
    """

    def __init__(self, run_dir: Path, name: str, config: dict[str, Any], resumed_step: int = 0):
        import wandb

        has_key = bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
        self.wandb = wandb
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "qwen-image"),
            name=os.environ.get("WANDB_NAME", name),
            dir=str(run_dir),
            config=config,
            mode=None if has_key or "WANDB_MODE" in os.environ else "offline",
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, step: int, numbers: Numbers) -> None:
        """Logs scalars."""
        self.run.log(dict(numbers), step=step)

    def images(self, step: int, images: Mapping[str, Path]) -> None:
        """Logs pictures."""
        self.run.log({name: self.wandb.Image(str(path)) for name, path in images.items()}, step=step)

    def close(self) -> None:
        """Finishes the run."""
        self.run.finish()


class Terminal:
    """A live line on a terminal; in a file, a line every `log_every` steps."""

    SHOWN = ("loss", "lr", "samples_per_s")

    def __init__(self, num_steps: int, log_every: int, resumed_step: int = 0):
        self.num_steps, self.log_every, self.start, self.first = num_steps, log_every, time.monotonic(), resumed_step
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
        elif step % self.log_every == 0 or step == self.num_steps:
            left = (time.monotonic() - self.start) / (step - self.first) * (self.num_steps - step)
            clock = time.strftime("%H:%M:%S", time.gmtime(left))
            print(f"training {step}/{self.num_steps}  {text}  {clock} left", file=sys.stderr, flush=True)

    def images(self, step: int, images: Mapping[str, Path]) -> None:
        """Says where they are."""
        for name, path in images.items():
            self._print(f"{name}: {path}")

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self.bar:
            self.bar.stop()

    def _print(self, text: str) -> None:
        if self.bar:
            self.bar.console.print(text)
        else:
            print(text, file=sys.stderr, flush=True)


class Loggers:
    """All of a run's loggers as one."""

    def __init__(self, loggers: list[Logger]):
        self.loggers = loggers

    def log(self, step: int, numbers: Numbers) -> None:
        """To every logger."""
        for logger in self.loggers:
            logger.log(step, numbers)

    def images(self, step: int, images: Mapping[str, Path]) -> None:
        """To every logger."""
        for logger in self.loggers:
            logger.images(step, images)

    def close(self) -> None:
        """Every logger."""
        for logger in self.loggers:
            logger.close()
