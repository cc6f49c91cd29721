"""Where adapters are looked up: as named, below `$CHECKPOINT_DIR`, and on the hub."""

import difflib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import InputError
from data_prep.model.hub_files import HUB_ID, fetch
from train.model.adapter_files import CONFIG_FILE, EXTRA_FILE, WEIGHTS_FILE
from train.record.run_files import CHECKPOINTS, LATEST

CHECKPOINT_DIR = "CHECKPOINT_DIR"
"""Environment variable: the folder that holds runs and their checkpoints."""
DEFAULT_CHECKPOINTS = "runs"
HUB_NAMES = (WEIGHTS_FILE, "pytorch_lora_weights.safetensors")
"""What an adapter's file on the hub is usually called."""


@dataclass(frozen=True)
class FoundAdapter:
    """A checkpoint of a run."""

    name: str
    """Run and step, `demo/lbm/step-000400`: `find_adapter` takes it."""
    path: Path
    """Its folder."""


def find_adapter(text: str) -> Path:
    """A checkpoint folder or a safetensors file: as named, else below `$CHECKPOINT_DIR` (by default `runs`), else on the hub.

    A run's folder means its newest checkpoint.

    Args:
        text: a path, a run, a run's step, or a hub id, `OWNER/NAME`, whose file is downloaded.

    Raises:
        InputError: there is none; the message says where was looked and what is nearest.
    """
    folder = checkpoint_folder()
    tried = [Path(text).expanduser(), folder / text]
    for path in tried:
        if path.exists():
            return _adapter_at(path)
    found = {adapter.name: adapter.path for adapter in found_adapters(folder)}
    if text in found:
        return found[text]
    runs = {name.rpartition("/")[0] for name in found} - {""}
    missing = f"no adapter at {listed(tried)}{nearest(text, [*runs, *found])}"
    if not HUB_ID.fullmatch(text):
        raise InputError(missing)
    try:
        return _on_hub(text, fetch(text, ["*.safetensors", CONFIG_FILE]))
    except InputError as error:
        raise InputError(f"{missing}; and {error}") from error


def _on_hub(hub_id: str, folder: Path) -> Path:
    """The one adapter of a downloaded repository."""
    files = sorted(file for file in folder.rglob("*.safetensors") if file.name != EXTRA_FILE)
    usual = [folder / name for name in HUB_NAMES if (folder / name).is_file()]
    if usual or len(files) == 1:
        return (usual or files)[0]
    names = ", ".join(str(file.relative_to(folder)) for file in files[:6])
    raise InputError(
        f"{hub_id} on the hub has {len(files)} safetensors files ({names}): download one, and give its path"
    )


def checkpoint_folder() -> Path:
    """`$CHECKPOINT_DIR`, by default `runs` in the working directory."""
    return Path(os.environ.get(CHECKPOINT_DIR) or DEFAULT_CHECKPOINTS).expanduser()


def found_adapters(folder: Path | None = None) -> list[FoundAdapter]:
    """The checkpoints of every run below a folder, newest first; none if there is no such folder.

    Args:
        folder: by default `checkpoint_folder()`.
    """
    folder = folder or checkpoint_folder()
    adapters = []
    for run in _runs(folder):
        for file in run.glob(f"{CHECKPOINTS}/step-*/{WEIGHTS_FILE}"):
            name = (run.relative_to(folder) / file.parent.name).as_posix()
            adapters.append((file.stat().st_mtime_ns, FoundAdapter(name, file.parent)))
    return [adapter for _, adapter in sorted(adapters, key=lambda pair: (pair[0], pair[1].name), reverse=True)]


def _runs(folder: Path) -> Iterator[Path]:
    """Folders that have checkpoints. What else is inside a run (caches of many files) is not walked."""
    for root, folders, _ in os.walk(folder):
        if CHECKPOINTS in folders:
            yield Path(root)
            folders.clear()
        folders[:] = [name for name in folders if not name.startswith(".")]


def _adapter_at(path: Path) -> Path:
    """A file, a checkpoint, or the newest checkpoint of a run."""
    if path.is_file() or (path / WEIGHTS_FILE).is_file():
        return path
    folder = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    if not (folder / LATEST).is_file():
        raise InputError(f"{path} holds no {WEIGHTS_FILE} and no checkpoints of a run: name a checkpoint's folder")
    newest = folder / (folder / LATEST).read_text(encoding="utf-8").strip()
    if not (newest / WEIGHTS_FILE).is_file():
        raise InputError(f"{folder / LATEST} names {newest.name}, which has no {WEIGHTS_FILE}: name another checkpoint")
    return newest


def listed(paths: list[Path]) -> str:
    """As they stand in a sentence."""
    return " or ".join(dict.fromkeys(map(str, paths)))


def nearest(text: str, names: list[str]) -> str:
    """Up to three existing names that are like the text, as the end of a sentence."""
    close = difflib.get_close_matches(text, names, n=3, cutoff=0.4)
    return f"; did you mean {' or '.join(close)}?" if close else ""
