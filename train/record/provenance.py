"""What a result depends on besides its configuration: the code's commit, the command, the machine, the versions."""

import importlib.metadata
import platform
import shlex
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "torch",
    "diffsynth",
    "diffusers",
    "transformers",
    "accelerate",
    "deepspeed",
    "peft",
    "prodigy-plus-schedule-free",
)


def provenance(world_size: int = 1) -> dict[str, Any]:
    """JSON values that are recorded with a run. `gpus` are those that this process sees: of one machine."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "git": git_state(Path(__file__)),
        "command": shlex.join(sys.orig_argv),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "world_size": world_size,
        "gpus": dict(Counter(gpus)),
        "cuda": torch.version.cuda,
        "versions": {"python": platform.python_version()} | versions(*PACKAGES),
    }


def versions(*packages: str) -> dict[str, str | None]:
    """Versions of packages; None for one that is not installed."""
    return {name: _version(name) for name in packages}


def git_state(file: Path) -> dict[str, Any] | None:
    """The commit that a file belongs to, and whether tracked files have changed since (`dirty`).

    None when there is no git, or no commit, or the file lies in a repository that does not track it.
    """
    folder = file.parent
    if _git(folder, "ls-files", "--error-unmatch", file.name) is None:
        return None
    commit, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": bool(changes)} if commit else None


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints, or None. It may be another user's repository, as in containers, and it stays untouched."""
    options = ["-c", "safe.directory=*", "--no-optional-locks", "-C", str(folder)]
    try:
        done = subprocess.run(["git", *options, *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
