"""One training at a time in a run's folder."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from data_prep.errors import InputError
from data_prep.files import make_folder

LOCK, OWNER = ".lock", ".owner.json"


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Holds the folder for this process, until it leaves the context or ends, however it ends: the lock is the system's.

    Raises:
        InputError: another process holds it.
    """
    make_folder(run_dir)
    lock = FileLock(run_dir / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"{run_dir} is in use by {_owner(run_dir)}: wait until it ends, stop it, or choose another run_dir"
        ) from None
    try:
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": f"{datetime.now():%Y-%m-%d %H:%M}"}
        (run_dir / OWNER).write_text(json.dumps(owner) + "\n")
        yield
    finally:
        lock.release()


def _owner(run_dir: Path) -> str:
    try:
        owner = json.loads((run_dir / OWNER).read_text())
    except (OSError, ValueError):  # it has only just begun
        return "another process"
    return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
