"""Where base models and adapters are looked up: as named, then below `$MODEL_DIR` and `$CHECKPOINT_DIR`."""

import difflib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import InputError
from data_prep.model.directory import HUB_ID
from train.model.adapter_files import WEIGHTS_FILE
from train.record.run_files import CHECKPOINTS, LATEST

MODEL_DIR = "MODEL_DIR"
"""Environment variable: the folder that holds base models."""
CHECKPOINT_DIR = "CHECKPOINT_DIR"
"""Environment variable: the folder that holds runs and their checkpoints."""
DEFAULT_CHECKPOINTS = "runs"


@dataclass(frozen=True)
class FoundAdapter:
    """A checkpoint of a run."""

    name: str
    """Run and step, `demo/lbm/step-000400`: `find_adapter` takes it."""
    path: Path
    """Its folder."""


def find_model(text: str) -> str:
    """A folder as it is named, else below `$MODEL_DIR`, else a hub id, which is returned as it is.

    Raises:
        InputError: no such folder, and the text cannot be a hub id.
    """
    tried = [Path(text).expanduser()]
    if parent := os.environ.get(MODEL_DIR):
        tried.append(Path(parent).expanduser() / text)
    for path in tried:
        if path.is_dir():
            return str(path)
    if HUB_ID.fullmatch(text):
        return text
    where = f"looked at {_listed(tried)}" if parent else f"${MODEL_DIR}, where models may be, is not set"
    raise InputError(
        f"no model at {text}{_nearest(text, _model_names(parent))}: name a folder or a hub id such as "
        f"Qwen/Qwen-Image-Edit-2511 ({where})"
    )


def find_adapter(text: str) -> Path:
    """A checkpoint folder or a safetensors file: as named, else below `$CHECKPOINT_DIR` (by default `runs`).

    A run's folder means its newest checkpoint.

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
    raise InputError(f"no adapter at {_listed(tried)}{_nearest(text, [*runs, *found])}")


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


def _model_names(parent: str | None) -> list[str]:
    folder = Path(parent).expanduser() if parent else None
    return sorted(each.name for each in folder.iterdir() if each.is_dir()) if folder and folder.is_dir() else []


def _listed(paths: list[Path]) -> str:
    return " or ".join(dict.fromkeys(map(str, paths)))


def _nearest(text: str, names: list[str]) -> str:
    """Up to three existing names that are like the text, as the end of a sentence."""
    nearest = difflib.get_close_matches(text, names, n=3, cutoff=0.4)
    return f"; did you mean {' or '.join(nearest)}?" if nearest else ""
