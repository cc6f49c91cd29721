"""Where base models are searched: first the path itself, then below `$MODEL_DIR`."""

import os
from pathlib import Path

from data_prep.errors import InputError
from data_prep.model.hub_files import HUB_ID
from train.record.lookup import listed, nearest

MODEL_DIR = "MODEL_DIR"
"""Environment variable: the folder that holds base models."""


def find_model(text: str) -> str:
    """A folder with this path, otherwise one below `$MODEL_DIR`, otherwise the text itself as a hub id.

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
    where = f"looked at {listed(tried)}" if parent else f"${MODEL_DIR}, a folder for models, is not set"
    raise InputError(
        f"no model at {text}{nearest(text, _model_names(parent))}: name a folder or a hub id such as "
        f"Qwen/Qwen-Image-Edit-2511 ({where})"
    )


def _model_names(parent: str | None) -> list[str]:
    folder = Path(parent).expanduser() if parent else None
    return sorted(each.name for each in folder.iterdir() if each.is_dir()) if folder and folder.is_dir() else []
