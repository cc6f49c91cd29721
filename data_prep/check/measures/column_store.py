"""The measurements of a million rows, in columns: on disk while they come, in memory one at a time when they are used."""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import InputError
from data_prep.rows.duplicates import HASH_BYTES
from data_prep.rows.rows import MAX_SOURCES, Row

TRAINED, VALIDATED = "train", "validation"
"""Splits. Rows of others are held out from training too, and not cached."""
FIELDS = np.dtype(
    [
        ("usable", "?"),
        ("split", "u1"),
        ("sizes", "<u4", (1 + MAX_SOURCES, 2)),
        ("bridge", "<u4"),
        ("tokens", "<u4"),
        ("drift", "<f4", (3,)),
        ("hashes", "u1", (2, HASH_BYTES)),
        ("digest", "<u8"),
        ("prompt", "<u8"),
        ("group", "<u8"),
    ]
)
"""Sizes are (height, width) of the target and the sources, 0 where there is none; bridge is the source that the bridge starts
from; drift is NaN where it is unknown."""
CHUNK = 4096


class Columns:
    """One entry per row of the dataset file, the unusable ones too."""

    def __init__(self, folder: Path):
        """Args: folder: where the disk has space."""
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (gone with the process)
        self._chunk = np.zeros(CHUNK, FIELDS)
        self._used = 0
        self.num_rows = 0
        self.splits: list[str] = []
        """By the code in the column `split`."""

    def add_unusable(self) -> None:
        """The next row, of which nothing is known."""
        self._next()

    def add(self, row: Row, measured: dict[str, Any]) -> None:
        """The next row."""
        entry = self._next()
        entry["usable"], entry["split"] = True, self._split(row.split)
        entry["sizes"][: len(measured["sizes"])] = measured["sizes"]
        entry["bridge"] = row.bridge_image
        entry["tokens"] = measured["tokens"]
        entry["drift"] = measured["drift"] or np.nan
        for place, value in enumerate(measured["hashes"]):
            entry["hashes"][place] = np.frombuffer(bytes.fromhex(value), np.uint8)
        entry["digest"] = int(measured["digest"], 16)
        entry["prompt"], entry["group"] = _number(row.prompt), _number(row.group)

    def __getitem__(self, name: str) -> np.ndarray:
        """A column, read from the disk."""
        column = np.empty(self.num_rows, FIELDS[name])
        self._file.seek(0)
        stored = self.num_rows - self._used
        for start in range(0, stored, CHUNK):
            column[start : start + CHUNK] = np.frombuffer(self._file.read(CHUNK * FIELDS.itemsize), FIELDS)[name]
        column[stored:] = self._chunk[name][: self._used]
        return column

    def close(self) -> None:
        """Gives the disk's space back."""
        self._file.close()

    def in_split(self, *names: str) -> np.ndarray:
        """Which rows are usable and in one of these splits, (N,)."""
        codes = [code for code, name in enumerate(self.splits) if name in names]
        return np.isin(self["split"], codes) & self["usable"]

    def _next(self) -> np.void:
        if self._used == CHUNK:
            self._file.seek(0, 2)
            self._file.write(self._chunk.tobytes())
            self._chunk[:] = np.zeros((), FIELDS)
            self._used = 0
        self._used, self.num_rows = self._used + 1, self.num_rows + 1
        return self._chunk[self._used - 1]

    def _split(self, name: str) -> int:
        if name not in self.splits:
            if len(self.splits) == 256:
                raise InputError(f"the dataset has over 256 splits, the last one {name!r}: is the column `split` one?")
            self.splits.append(name)
        return self.splits.index(name)


def _number(text: str) -> int:
    """A text's hash, 0 for none."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) if text else 0
