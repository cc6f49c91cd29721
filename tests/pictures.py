"""Small pictures for tests, and a reader of what the builders write."""

import json
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
from PIL import Image

from tests.commands import run_script


def picture(seed: int, size: tuple[int, int] = (32, 24)) -> Image.Image:
    """A picture of random pixels, width first."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def save(path: Path, seed: int = 0, size: tuple[int, int] = (32, 24)) -> Path:
    """Writes such a picture, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, size).save(path)
    return path


def prepare(*arguments: str | Path | int, check: bool = True, **options) -> CompletedProcess:
    """Runs `data_prep/run.py` in this process's Python, with one process unless told otherwise."""
    processes = () if "--processes" in arguments else ("--processes", 1)
    return run_script("data_prep/run.py", *map(str, (*arguments, *processes)), check=check, **options)


def lines(path: Path) -> list[dict[str, Any]]:
    """A JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def dataset(folder: Path) -> list[dict[str, Any]]:
    """The rows that a builder wrote."""
    return lines(folder / "dataset.jsonl")


def rejected(folder: Path) -> dict[str, tuple[int, str, str]]:
    """Id -> row number, file name and reason of what it left out."""
    return {
        each["id"]: (each["row"], Path(each["path"]).name, each["reason"]) for each in lines(folder / "rejected.jsonl")
    }


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of all files below a folder but hidden ones."""
    found = ((path.relative_to(folder), path) for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(name): path.read_bytes() for name, path in found if not any(part.startswith(".") for part in name.parts)
    }
