"""Whether and from what a run continues: the checkpoint, and what must be as it was."""

import hashlib
import inspect
from collections.abc import Iterable
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from data_prep.cache.batches import BatchStream
from data_prep.cache.order import ORDER_VERSION
from data_prep.cache.reader import CacheReader
from data_prep.errors import InputError
from train.config import Config, DatasetConfig, read_yaml
from train.parallel.processes import Processes
from train.record.checkpoint import CONFIG, Checkpoint, Checkpoints, read_checkpoint, read_run
from train.record.run_files import CHECKPOINTS

OTHER_DATA = "the training data has changed: its rows, their order, their weights or their images"
MAY_CHANGE = (
    *("name", "run_dir", "phases", "resume", "logger", "validate", "cache", "parallel", "plan"),
    *("data.dataset", "data.root", "data.on_error", "data.validation", "model.path"),
    *("train.num_steps", "train.save_every", "train.save_minutes", "train.validate_every", "train.log_every"),
    *("train.keep_last", "train.keep_every", "train.best_by", "train.device", "train.micro_batch_size"),
    *("train.grad_accum_steps", "train.global_batch_size", "train.gradient_checkpointing", "train.attention"),
    *("train.group_size", "train.offload_blocks", "train.compile", "optim.schedule_steps"),
    *("adapter.init_from", "adapter.export_frozen"),
)
"""What a continued run may do otherwise. Some of it is compared by itself: the records, whatever their file is called; the
model's weights, whatever their folder; the global batch, a product; and the groups."""


def newest_checkpoint(config: Config) -> Path | None:
    """The checkpoint that the run will continue from if it is whole, as far as names tell; None if there is none."""
    if config.resume not in ("auto", "never"):
        return path if (path := Path(config.resume)).is_dir() else None
    found = Checkpoints(Path(config.run_dir) / CHECKPOINTS, 1, {}, "").resumable() if config.resume == "auto" else []
    return next((path for path in reversed(found) if (path / CONFIG).exists()), None)


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
        "keys": keys_identity(stream.reader.keys),
        "global_batch_size": stream.global_batch_size,
        "group_size": stream.group_size,
        "order": ORDER_VERSION,
    }


def data_identity(reader: CacheReader) -> str:
    """A hash of the records, their order, and their weights if these are not all the same."""
    digest = hashlib.blake2b(digest_size=8)
    for bucket, indices in sorted(reader.buckets.items()):
        digest.update(f"{bucket}{indices.tolist()}".encode())
    for key in reader.keys:
        digest.update(key.encode())
    if reader.weights is not None:
        digest.update(reader.weights.tobytes())
    return digest.hexdigest()


def keys_identity(keys: Iterable[str]) -> str:
    """A hash of the records' keys in the order of their rows, which is known before anything is encoded."""
    digest = hashlib.blake2b(digest_size=8)
    for key in keys:
        digest.update(key.encode())
    return digest.hexdigest()


def check_keys(checkpoint: Path, saved: dict[str, Any], keys: Iterable[str]) -> None:
    """Refuses to continue a run with other records, before they are encoded. Runs of earlier versions do not say which they had.

    Raises:
        InputError: they differ.
    """
    if saved.get("keys") and saved["keys"] != keys_identity(keys):
        _refuse(checkpoint, [OTHER_DATA])


def check_settings(config: Config, checkpoint: Path) -> None:
    """Refuses to continue a run with settings that would train otherwise. Reads small files of the checkpoint alone.

    Raises:
        InputError: names each key with its old and its new value; or the checkpoint is of a version with another order.
    """
    if (run := read_run(checkpoint)) and run.get("order", 1) != ORDER_VERSION:
        raise InputError(
            f"{checkpoint} was made by another version of this program, which drew the records in another order and with other "
            "noise, so this version cannot resume it exactly: resume it with that version, or start again in another run_dir"
        )
    before, now = _flat(read_yaml(checkpoint / CONFIG)), _flat(asdict(config))
    defaults = _defaults(config)
    changed = [
        f"{key} was {_shown(before, key, defaults)} and is {_shown(now, key, defaults)}"
        for key in sorted(before.keys() | now.keys())
        if _value(before, key, defaults) != _value(now, key, defaults)
        and not any(key == free or key.startswith(f"{free}.") for free in MAY_CHANGE)
    ]
    changed += _changed_draws(before.get("data.dataset"), now["data.dataset"])
    steps = before["train.num_steps"], config.train.num_steps
    if config.optim.get("schedule") == "cosine" and not config.optim.get("schedule_steps") and steps[0] != steps[1]:
        changed.append(
            f"train.num_steps was {steps[0]} and is {steps[1]}, over which optim.schedule=cosine falls: choose with "
            f"optim.schedule_steps={steps[0]} (stay at the end of the old curve) or ={steps[1]} (jump to the longer one)"
        )
    _refuse(checkpoint, changed)


def check_identity(checkpoint: Path, saved: dict[str, Any], identity: dict[str, Any]) -> None:
    """Refuses to continue a run with other records, another model, another global batch or other groups.

    Args:
        saved, identity: of `run_identity`, and `model`, then and now; before caching without `data`.

    Raises:
        InputError: names what differs.
    """
    if "data" in identity and saved.get("data", identity["data"]) != identity["data"]:
        _refuse(checkpoint, [OTHER_DATA])
    words = {"model": "the model's weights", "global_batch_size": "the global batch", "group_size": "train.group_size"}
    differing = [key for key in words if saved.get(key, identity[key]) != identity[key]]
    _refuse(checkpoint, [f"{words[key]} was {saved[key]} and is {identity[key]}" for key in differing])


def _changed_draws(before: Any, now: Any) -> list[str]:
    """What differs of how often datasets are drawn, and at which areas; their files may have moved."""
    lists = [
        [each if isinstance(each, dict) else {} for each in (part if isinstance(part, list) else [part])]
        for part in (before, now)
    ]
    if len(lists[0]) != len(lists[1]):
        return [f"data.dataset had {len(lists[0])} datasets and has {len(lists[1])}"]
    defaults = vars(DatasetConfig("dataset"))
    return [
        f"data.dataset[{place}].{key} was {_shown(old, key, defaults)} and is {_shown(new, key, defaults)}"
        for place, (old, new) in enumerate(zip(*lists, strict=True))
        for key in ("weight", "repeats", "resolutions")
        if _value(old, key, defaults) != _value(new, key, defaults)
    ]


def _refuse(checkpoint: Path, changed: list[str]) -> None:
    if changed:
        more = f"; and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise InputError(
            f"{checkpoint} was made with other settings: {'; '.join(changed[:4])}{more}. Give the same command to resume, "
            "or another run_dir to start again"
        )


def _defaults(config: Config) -> dict[str, Any]:
    """Of keys that one of two configurations may not have: the sections' fields, and arguments of the open nodes' classes."""
    values: dict[str, Any] = {}
    for item in fields(config):
        part = getattr(config, item.name)
        if is_dataclass(part) and not isinstance(part, type):
            values |= _flat(asdict(type(part)()), f"{item.name}.")
    for name in ("loss", "optim"):
        target = resolve_name(getattr(config, name)["_target_"])
        arguments = inspect.signature(target).parameters.values()
        values |= {f"{name}.{each.name}": each.default for each in arguments if each.default is not each.empty}
    return values


def _value(flat: dict[str, Any], key: str, defaults: dict[str, Any]) -> Any:
    value = flat.get(key, defaults.get(key))
    return list(value) if isinstance(value, tuple) else value


def _shown(flat: dict[str, Any], key: str, defaults: dict[str, Any]) -> str:
    value = _value(flat, key, defaults)
    return "null" if value is None else str(value)


def continued_states(checkpoint: Checkpoint | None, checkpoints: Checkpoints) -> dict[str, Any]:
    """What the loggers were in the checkpoint, by name. A checkpoint of another run_dir begins a run of its own."""
    if checkpoint is None or checkpoint.path.resolve().parent != checkpoints.folder.resolve():
        return {}
    return checkpoint.run.get("loggers", {})


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix.rstrip("."): values}
    return {key: value for name, child in values.items() for key, value in _flat(child, f"{prefix}{name}.").items()}
