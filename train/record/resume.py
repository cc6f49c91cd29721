"""Whether and from what a run continues: the checkpoint, and what must be as it was."""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_prep.cache.batches import BatchStream
from data_prep.cache.order import ORDER_VERSION
from data_prep.cache.reader import CacheReader
from data_prep.errors import InputError
from train.config import Config, read_yaml
from train.parallel.processes import Processes
from train.record.checkpoint import Checkpoint, Checkpoints, read_checkpoint

MAY_CHANGE = (
    *("name", "run_dir", "phases", "resume", "logger", "validate", "cache", "parallel", "plan"),
    *("data.on_error", "data.validation", "train.num_steps", "train.save_every", "train.validate_every"),
    *("train.log_every", "train.keep_last", "train.device", "train.micro_batch_size", "train.grad_accum_steps"),
    *("train.global_batch_size", "train.group_size", "train.gradient_checkpointing"),
    "train.attention",
    "train.compile",
)
"""What a continued run may do otherwise; the global batch and the groups are compared by themselves."""


def find_checkpoint(checkpoints: Checkpoints, resume: str, processes: Processes) -> Checkpoint | None:
    """What to continue from. Rank 0 chooses, so that a slow shared disk cannot make ranks choose differently.

    Raises:
        InputError: as `Checkpoints.find`; on another rank, that the checkpoint is not there.
    """
    found = checkpoints.find(resume) if processes.is_main else None
    chosen = processes.gather(found and found.path)[0]
    return found if processes.is_main or chosen is None else read_checkpoint(chosen)


def run_identity(stream: BatchStream) -> dict[str, Any]:
    """What the steps of a run depend on beside its configuration, as JSON values."""
    return {
        "data": data_identity(stream.reader),
        "global_batch_size": stream.global_batch_size,
        "group_size": stream.group_size,
        "order": ORDER_VERSION,
    }


def data_identity(reader: CacheReader) -> str:
    """A hash of the records and their order."""
    digest = hashlib.blake2b(digest_size=8)
    for bucket, indices in sorted(reader.buckets.items()):
        digest.update(f"{bucket}{indices}".encode())
    for key in reader.keys:
        digest.update(key.encode())
    return digest.hexdigest()


def check_continuation(config: Config, checkpoint: Path, saved: dict[str, Any], identity: dict[str, Any]) -> None:
    """Refuses to continue a run whose settings or data have changed in what its steps depend on.

    Args:
        config: now.
        checkpoint: to continue from.
        saved: the identity that it was saved with, and more.
        identity: from `run_identity`.

    Raises:
        InputError: names the keys that differ.
    """
    if saved.get("order", 1) != identity["order"]:
        raise InputError(
            f"{checkpoint} was made by another version of this program, in which records came in another order and other "
            "noise was drawn for them, so that this one cannot continue it exactly: continue it with that version, or give "
            "another run_dir to start anew"
        )
    before = _flat(read_yaml(checkpoint / "config.yaml"))
    now = _flat(asdict(config))
    differing = [
        key
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not any(key == free or key.startswith(f"{free}.") for free in MAY_CHANGE)
    ]
    if not differing and saved["global_batch_size"] != identity["global_batch_size"]:
        differing = [f"a global batch of {saved['global_batch_size']} and not {identity['global_batch_size']}"]
    if not differing and saved["group_size"] != identity["group_size"]:
        differing = [f"groups of {saved['group_size']} and not {identity['group_size']}: see train.group_size"]
    if not differing and saved["data"] != identity["data"]:
        differing = ["the training data"]
    if differing:
        raise InputError(
            f"{checkpoint} was made with other settings ({', '.join(differing[:4])}): give the same command to continue, "
            "or another run_dir to start anew"
        )


def continued_states(checkpoint: Checkpoint | None, checkpoints: Checkpoints) -> dict[str, Any]:
    """What the loggers were in the checkpoint, by name. A checkpoint of another run_dir begins a run of its own."""
    if checkpoint is None or checkpoint.path.resolve().parent != checkpoints.folder.resolve():
        return {}
    return checkpoint.run.get("loggers", {})


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix.rstrip("."): values}
    return {key: value for name, child in values.items() for key, value in _flat(child, f"{prefix}{name}.").items()}
