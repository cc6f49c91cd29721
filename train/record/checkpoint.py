"""Checkpoints: written whole or not at all, and enough to continue bit for bit.

`run_dir/checkpoints/step-000500/` holds the exported adapter (averaged weights), the LoRA and optimizer state that
training continues from, the step and the configuration; nothing frozen, and no pickle. Randomness needs no state: it
belongs to the sample number. `checkpoints/latest` is a file with the newest checkpoint's name, `checkpoints/best.json` says
which one validated best. Older checkpoints that stay are reduced to the adapter, which is a fraction of their size.
"""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_prep.errors import InputError
from data_prep.files import sync, write_text
from train.model.adapter import Adapter
from train.optim import Optimizer, optimizer_state, restore_optimizer_state
from train.record.run_files import BEST, LATEST
from train.record.run_summary import best_checkpoint, is_better

LORA, OPTIMIZER = "training_lora.safetensors", "optimizer.safetensors"
STATE, CONFIG = "state.json", "config.yaml"


@dataclass
class Checkpoint:
    """A checkpoint that was read back and is complete."""

    path: Path
    step: int
    lora: dict[str, Tensor]
    optimizer_tensors: dict[str, Tensor]
    optimizer_values: dict[str, Any]
    run: dict[str, Any]
    config: str
    """Text of the configuration that it was trained with."""

    def restore(self, adapter: Adapter, optimizer: Optimizer) -> None:
        """Puts LoRA and optimizer where they were.

        Raises:
            InputError: the adapter or the optimizer is configured differently now.
        """
        adapter.load_state_dict(self.lora)
        kind = type(optimizer.torch_optimizer).__name__
        if self.run["optimizer"] != kind:
            raise InputError(
                f"{self.path} was trained with {self.run['optimizer']}, not {kind}: set optim as it was, or choose a new run_dir"
            )
        restore_optimizer_state(optimizer.torch_optimizer, self.optimizer_tensors, self.optimizer_values)


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: `run_dir/checkpoints`.
        keep_last: how many stay whole.
        keep_every: every so many steps the adapter stays; None for none but the best.
        best_by: the validation's number that decides which one is best; `auto`: PSNR at the most steps; None: none is.
        metadata: goes into the exported adapter's header.
        config: text of the resolved configuration.
        dtype: data type of the exported adapter.
    """

    def __init__(
        self,
        folder: Path,
        keep_last: int,
        metadata: dict[str, str],
        config: str,
        dtype: torch.dtype = torch.float32,
        keep_every: int | None = None,
        best_by: str | None = None,
    ):
        self.folder = folder
        self.keep_last = keep_last
        self.metadata = metadata
        self.config = config
        self.dtype = dtype
        self.keep_every = keep_every
        self.best_by = best_by

    def save(self, step: int, adapter: Adapter, optimizer: Optimizer, run: dict[str, Any]) -> Path:
        """Writes under a temporary name, flushes to disk, renames, then drops what is too old.

        Args:
            step: optimizer steps done.
            run: small JSON values to find again, such as the global batch size.
        """
        final = self.folder / f"step-{step:06d}"
        temporary = self.folder / f".{final.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            self._write(temporary, step, adapter, optimizer, run)
        except BaseException:  # a full disk, Ctrl-C: what was there stays, what is half there goes
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        sync(self.folder)
        write_text(self.folder / LATEST, final.name + "\n")
        done = [path for path in self.all() if _step(path) <= step]  # a later one is damaged, or was gone back from
        for old in done[: -self.keep_last]:
            self._reduce(old)
        return final

    def _reduce(self, old: Path) -> None:
        """Leaves the adapter of a checkpoint that is to stay, and nothing of another."""
        best = self.best()
        if (best and best["step"] == _step(old)) or (self.keep_every and _step(old) % self.keep_every == 0):
            for name in (OPTIMIZER, LORA):
                (old / name).unlink(missing_ok=True)
        else:
            shutil.rmtree(old)

    def judge(self, step: int, numbers: dict[str, float]) -> None:
        """Notes whether the checkpoint of this step validated better than all before. Step 0 has none, and shows the numbers.

        Raises:
            InputError: `best_by` is not among the numbers.
        """
        name = _most_steps(numbers) if self.best_by == "auto" else self.best_by
        if name is None:
            return
        if name not in numbers:
            raise InputError(
                f"train.best_by={name} is not a number that the validation reports. It reports {', '.join(sorted(numbers))}"
            )
        best = self.best()
        if step and (not best or best["name"] != name or is_better(name, numbers[name], best["value"])):
            text = json.dumps({"step": step, "name": name, "value": numbers[name]})
            write_text(self.folder / BEST, text + "\n")

    def best(self) -> dict[str, Any] | None:
        """`step`, `name` and `value` of the checkpoint that validated best."""
        return best_checkpoint(self.folder)

    def _write(self, folder: Path, step: int, adapter: Adapter, optimizer: Optimizer, run: dict[str, Any]) -> None:
        with optimizer.averaged():
            adapter.export(folder, self.metadata | {"step": str(step)}, self.dtype)
        save_file(_on_cpu(adapter.state_dict()), folder / LORA)
        tensors, values = optimizer_state(optimizer.torch_optimizer)
        save_file(_on_cpu(tensors), folder / OPTIMIZER)
        kind = type(optimizer.torch_optimizer).__name__
        state = {"step": step, "optimizer_state": values, "run": run | {"optimizer": kind}}
        (folder / STATE).write_text(json.dumps(state))
        (folder / CONFIG).write_text(self.config)
        for file in folder.iterdir():
            sync(file)
        sync(folder)

    def resumable(self) -> list[Path]:
        """Checkpoints that are not reduced to the adapter, oldest first."""
        return [path for path in self.all() if any((path / name).exists() for name in (OPTIMIZER, LORA))]

    def all(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        return sorted((path for path in self.folder.glob("step-*") if path.name[5:].isdigit()), key=_step)

    def find(self, resume: str) -> Checkpoint | None:
        """The checkpoint to continue from, or None to start.

        Args:
            resume: `auto`, `never`, or a checkpoint's path.

        Raises:
            InputError: `never` and there are checkpoints; or the named one is missing or damaged; or all are damaged.
        """
        if resume == "never":
            if self.all():
                raise InputError(
                    f"{self.folder} has checkpoints and resume=never: choose another run_dir, or resume=auto"
                )
            return None
        if resume != "auto":
            return read_checkpoint(Path(resume))
        for path in reversed(self.resumable()):
            try:
                return read_checkpoint(path)
            except InputError as error:
                print(f"warning: {error}; trying the previous one", file=sys.stderr)
        if self.all():
            raise InputError(f"no checkpoint in {self.folder} can be read: move the folder away to start again")
        return None


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads every file of a checkpoint.

    Raises:
        InputError: it is missing or damaged.
    """
    if not path.is_dir():
        raise InputError(f"no checkpoint at {path}: give a folder such as runs/NAME/checkpoints/step-000500")
    lora, tensors = _read(load_file, path / LORA), _read(load_file, path / OPTIMIZER)
    config = _read(Path.read_text, path / CONFIG)
    state = _read(lambda file: json.loads(file.read_text()), path / STATE)
    return Checkpoint(path, state["step"], lora, tensors, state["optimizer_state"], state["run"], config)


def read_run(path: Path) -> dict[str, Any]:
    """What `save` was given of the run; empty where that is damaged, which reading the checkpoint will tell."""
    try:
        return json.loads((path / STATE).read_text())["run"]
    except (OSError, ValueError):
        return {}


def _most_steps(numbers: dict[str, float]) -> str | None:
    """The name of PSNR at the most steps."""
    steps = [int(number) for name in numbers if (number := _between(name, "validation/steps_", "/psnr")).isdigit()]
    return f"validation/steps_{max(steps)}/psnr" if steps else None


def _between(text: str, before: str, after: str) -> str:
    matches = text.startswith(before) and text.endswith(after)
    return text.removeprefix(before).removesuffix(after) if matches else ""


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _read(reader: Callable[[Path], Any], file: Path) -> Any:
    try:
        return reader(file)
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"checkpoint file {file} is damaged or missing ({error})") from error


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
