"""Files that are either whole or not there, whatever kills the process that writes them."""

import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.errors import InputError

SECONDS_TO_WRITE = 3600
"""A temporary file that is older belongs to nobody."""


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder; on success it is synced and renamed to `path`, else it is removed.

    The temporary name begins with a dot and ends in `.tmp`; only a killed process leaves one behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """The same for a folder, which must not be there yet: yields a temporary one beside it.

    Raises:
        InputError: it is there.
    """
    if path.exists():
        raise InputError(f"{path} is there already: name a folder that is not, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                sync(file)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file atomically. What UTF-8 cannot say (file names in another encoding) is escaped."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file atomically, unless it is there with these bytes: then its time stays as it was."""
    if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
        return
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def make_folder(path: Path) -> None:
    """Makes a folder to write to, and clears away what killed processes left half written in it.

    Raises:
        InputError: it cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {path}: {error.strerror}") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise InputError(f"cannot write to the folder {path}: permission denied")
    remove_leftovers(path)


def remove_leftovers(folder: Path) -> None:
    """Deletes what `atomic_file` and `atomic_folder` left that is too old to be somebody's."""
    for path in folder.glob(".*.tmp"):
        if time.time() - path.stat().st_mtime > SECONDS_TO_WRITE:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Makes a file, or a folder's list of files, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
