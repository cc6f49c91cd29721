"""Weights & Biases."""

import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from data_prep.errors import InputError
from train.record.loggers import Logger, Numbers, Pictures

ADAPTER_FILES = ("adapter_model.safetensors", "extra_modules.safetensors", "adapter_config.json", "config.yaml")


class WandB(Logger):
    """Weights & Biases: project `WANDB_PROJECT` (default `qwen-image`), run `WANDB_NAME` (default the run's name).

    Without an API key it works offline, without a question; `wandb sync` uploads the folder later. A continued
    training continues its run. Steps that are trained again because they came after the checkpoint are in the history
    twice: W&B takes no row back, so its own row counter runs ahead of the training from then on, and charts are drawn
    over the number `step` instead.

    Args:
        run_dir: where the folder `wandb` is made.
        name: name of the run.
        config: the resolved configuration.
        record: what else was there at the start: git commit, versions, machine, data fingerprint.
        resumed_step: training steps done.
        state: state of the checkpoint that is continued, or nothing.
        artifact: upload the adapter of every checkpoint to W&B as an artifact.
    """

    def __init__(
        self,
        run_dir: Path,
        name: str,
        config: dict[str, Any],
        record: dict[str, Any] | None = None,
        resumed_step: int = 0,
        state: Mapping[str, Any] | None = None,
        artifact: bool = False,
    ):
        import wandb
        from wandb.errors import CommError

        self.wandb, self.artifacts = wandb, artifact
        record, state = record or {}, state or {}
        chosen = "WANDB_MODE" in os.environ
        try:
            has_key = not chosen and wandb.login(prompt=False, verify=False)
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT") or state.get("project", "qwen-image"),
                entity=os.environ.get("WANDB_ENTITY") or state.get("entity"),
                name=os.environ.get("WANDB_NAME", name),
                id=state.get("id"),
                resume="allow" if state else None,
                dir=str(run_dir),
                config=config | {"record": record},
                mode=None if chosen or has_key else "offline",
                settings=wandb.Settings(
                    console="off",
                    silent=True,
                    git_commit=(record.get("git") or {}).get("commit"),
                    x_transaction_log_flush_interval=1.0,  # seconds that a kill may cost, 15 by default
                ),
            )
        except CommError as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{reason}: check the key and the network, or set WANDB_MODE=offline to upload later"
            ) from error
        if not (self.run.offline or self.run.disabled):
            print(f"W&B: {self.run.url}", file=sys.stderr, flush=True)
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")
        # Rows must not go backwards, or W&B drops them. Offline the counter begins anew, and `wandb sync` moves it on.
        self.ahead = max(0, self.run.starting_step - (resumed_step + 1))

    def log(self, step: int, numbers: Numbers) -> None:
        """Logs scalars."""
        self._log(step, dict(numbers))

    def images(self, step: int, images: Pictures) -> None:
        """Logs pictures with their captions."""
        pictures = {
            name: self.wandb.Image(str(picture.path), caption=picture.caption or None)
            for name, picture in images.items()
        }
        self._log(step, pictures)

    def _log(self, step: int, values: dict[str, Any]) -> None:
        """All that is logged of a step becomes one row, so that the slider of the pictures counts training steps."""
        self.run.log({"step": step, **values}, step=step + self.ahead)

    def artifact(self, step: int, folder: Path) -> None:
        """Logs the adapter as the next version of an artifact, with its own header as metadata."""
        if not self.artifacts:
            return
        with safe_open(folder / ADAPTER_FILES[0], framework="pt") as file:
            header = file.metadata() or {}
        name = artifact_name(str(self.run.name))
        adapter = self.wandb.Artifact(name, type="adapter", metadata=header | {"step": step})
        for file in ADAPTER_FILES:
            if (folder / file).is_file():  # of what is trained beside LoRA there is none as a rule
                adapter.add_file(str(folder / file))
        self.run.log_artifact(adapter, aliases=["latest", f"step-{step}"])

    def state(self) -> dict[str, Any]:
        """Which run this is."""
        if self.run.disabled:
            return {}
        state = {"id": self.run.id, "project": self.run.project, "entity": self.run.entity}
        return {name: value for name, value in state.items() if value}

    def summary(self, numbers: Numbers) -> None:
        """Adds to what W&B sums up itself."""
        self.run.summary.update(dict(numbers))

    def close(self, exit_code: int = 0) -> None:
        """Finishes the run; says how to upload it if it is only here."""
        self.run.finish(exit_code)
        if self.run.offline and not self.run.disabled:
            folder = Path(self.run.settings.sync_dir)
            parts = sorted(folder.parent.glob(f"offline-run-*-{self.run.id}*"))
            waiting = [str(part) for part in parts if not list(part.glob("*.wandb.synced"))]
            print(f"W&B was offline. To upload the run: wandb sync {shlex.join(waiting)}", file=sys.stderr, flush=True)


def artifact_name(run_name: str) -> str:
    """`my run/2` -> `my-run-2-adapter`; of what W&B allows, at most 128 characters."""
    legal = re.sub(r"[^A-Za-z0-9_.-]+", "-", run_name).strip("-.")
    return f"{legal[:120] or 'run'}-adapter"
