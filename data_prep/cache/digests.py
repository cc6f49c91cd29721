"""Hashes of image files, kept as long as a file's size and time stay: a finished cache is recognised without reading it."""

import hashlib
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_prep.cache.shards import read_table
from data_prep.files import atomic_file
from data_prep.rows.images import file_digest

SECONDS_TO_SETTLE = 2.0
"""A file that was written so shortly before could change again within the same tick of its file system's clock."""
ENTRY = np.dtype([("file", "S32"), ("digest", "S32")])


class FileDigests:
    """`file_digest`, of each file once.

    Args:
        path: where they are kept; it need not exist.
    """

    def __init__(self, path: Path):
        self._path, self._known = path, _read(path)
        self.new: dict[str, str] = {}
        """What was not known before: hash of path, size and time -> hash of the contents."""
        self._lock = threading.Lock()

    def __call__(self, path: Path) -> str:
        """The hash of the file's bytes.

        Raises:
            RejectedImage: as `file_digest`.
        """
        try:
            status = os.stat(path)
        except OSError:
            return file_digest(path)  # which says what is wrong with it
        file = stamp(path, status)
        found = self.new.get(file) or _look_up(self._known, file)
        if found is None:
            found = file_digest(path)
            if time.time() - status.st_mtime > SECONDS_TO_SETTLE:
                with self._lock:
                    self.new[file] = found
        return found

    def save(self, new: Mapping[str, str]) -> None:
        """Adds to what is kept. Of two processes that save at once one may win, and the other's files are read again."""
        if new:
            _write(self._path, {**_as_dict(_read(self._path)), **new})


def keep_digests(path: Path, wanted: set[str]) -> None:
    """Forgets all other files.

    Args:
        wanted: results of `stamp`.
    """
    known = _as_dict(_read(path))
    if known.keys() - wanted:
        _write(path, {file: digest for file, digest in known.items() if file in wanted})


def stamp(path: Path | str, status: os.stat_result) -> str:
    """Which file it is, and as of when."""
    text = f"{os.path.abspath(path)}\0{status.st_size}\0{status.st_mtime_ns}"
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=16).hexdigest()


def _look_up(known: np.ndarray, file: str) -> str | None:
    place = int(np.searchsorted(known["file"], file.encode()))
    return known["digest"][place].decode() if place < len(known) and known["file"][place] == file.encode() else None


def _as_dict(known: np.ndarray) -> dict[str, str]:
    return {file.decode(): digest.decode() for file, digest in known.tolist()}


def _read(path: Path) -> np.ndarray:
    """Sorted by file; nothing of a file that is missing or damaged."""
    try:
        table = read_table(path)
    except (FileNotFoundError, pa.ArrowInvalid):
        return np.empty(0, ENTRY)
    known = np.empty(len(table), ENTRY)
    for name in ENTRY.names or ():
        known[name] = table.column(name).to_numpy()
    return known


def _write(path: Path, entries: Mapping[str, str]) -> None:
    table = pa.table({"file": sorted(entries), "digest": [entries[file] for file in sorted(entries)]})
    with (
        atomic_file(path) as temporary,
        pa.OSFile(str(temporary), "wb") as file,
        pa.ipc.new_file(file, table.schema) as out,
    ):
        out.write_table(table)
