"""Hugging Face datasets: one that is on this machine, memory-mapped, or a stream from the hub."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_prep.errors import InputError
from data_prep.rows.tables import BadRow

HELD_OUT = ("validation", "valid", "val", "dev", "test", "eval")
"""Splits that are not for training, as datasets call them."""

FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json", ".csv": "csv"}
"""Files that can be given in place of a dataset's folder."""


@dataclass(frozen=True)
class Source:
    """Which dataset."""

    dataset: str
    """A folder, a file, or a hub id. Local paths are absolute."""
    name: str | None = None
    """Its configuration, where it has several."""
    split: str | None = None
    """None: all."""
    data_files: tuple[str, ...] = ()

    def splits(self) -> dict[str, Any]:
        """Split -> `datasets.Dataset` whose pictures are bytes, not decoded.

        Raises:
            InputError: there is no such dataset or split, or it cannot be read.
        """
        return self._load(streaming=False)

    def streams(self) -> dict[str, Any]:
        """Split -> `datasets.IterableDataset`, the same without downloading it first. Raises as `splits`."""
        return self._load(streaming=True)

    def _load(self, streaming: bool) -> dict[str, Any]:
        from datasets import DatasetDict, IterableDatasetDict
        from datasets.exceptions import DatasetsError

        try:
            loaded = self._saved() if self._is_saved() and not streaming else self._other(streaming)
        except (
            DatasetsError,
            OSError,
            ValueError,
            RuntimeError,
        ) as error:  # what `datasets` raises for wrong arguments
            first = str(error.__cause__ or error).strip().split("\n")[0]
            raise InputError(f"the dataset {self.dataset} cannot be loaded: {first}") from error
        if not isinstance(loaded, (DatasetDict, IterableDatasetDict)):
            loaded = {re.split(r"\W", str(loaded.split or self.split or "train"))[0]: loaded}
        return {str(split): _undecoded(table) for split, table in loaded.items()}

    def _is_saved(self) -> bool:
        folder = Path(self.dataset)
        return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()

    def _saved(self) -> Any:
        """What `datasets.save_to_disk` wrote."""
        from datasets import DatasetDict, load_from_disk

        loaded = load_from_disk(self.dataset)
        if self.split is None:
            return loaded
        splits = loaded if isinstance(loaded, DatasetDict) else {str(loaded.split or "train"): loaded}
        if self.split not in splits:
            raise ValueError(f"it has no split {self.split!r}, but {', '.join(map(str, splits))}")
        return DatasetDict({self.split: splits[self.split]})

    def _other(self, streaming: bool) -> Any:
        """A file or a folder of files, or a hub id."""
        from datasets import load_dataset

        path, data_files = self.dataset, list(self.data_files) or None
        if os.path.isfile(path):
            if (kind := FORMATS.get(Path(path).suffix.lower())) is None:
                raise ValueError(f"its name must end with one of {', '.join(FORMATS)}")
            path, data_files = kind, [path]
        return load_dataset(path, self.name, data_files=data_files, split=self.split, streaming=streaming)


@lru_cache(maxsize=8)
def open_columns(source: Source, split: str, columns: tuple[str, ...]) -> Any:
    """Some columns of a split that is on this machine, once for each process: the rows are memory-mapped."""
    return _splits(source)[split].select_columns(list(columns))


@lru_cache(maxsize=1)
def _splits(source: Source) -> dict[str, Any]:
    return source.splits()


def split_of_rows(split: str) -> str:
    """The `split` of a dataset file's rows: `validation` for all that is held out."""
    return "validation" if split in HELD_OUT else split


def picture_bytes(cell: Any, column: str) -> bytes:
    """The file in a cell of an undecoded picture column.

    Args:
        cell: `{"bytes": …, "path": …}`, or bytes.
        column: its name, for messages.

    Raises:
        BadRow: there is none, or its path cannot be read.
    """
    data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
    if data is None and path is not None:
        from datasets.download.streaming_download_manager import xopen

        try:
            with xopen(path, "rb") as file:
                data = file.read()
        except OSError as error:
            raise BadRow(f"{column}: {path} cannot be read: {error.strerror or error}") from None
    if not isinstance(data, bytes) or not data:
        raise BadRow(f"{column} holds no image" if not isinstance(data, str) else f"{column} holds text, not an image")
    return data


def check_picture_columns(table: Any, columns: Iterable[str], where: str) -> None:
    """Raises `InputError` for a column that holds no pictures."""
    from datasets import Image, List, Value

    for column in columns:
        feature = table.features[column]
        inner = feature.feature if isinstance(feature, List) else feature
        binary = isinstance(inner, Value) and inner.dtype.endswith("binary")
        if not (isinstance(inner, Image) or binary or (isinstance(inner, dict) and "bytes" in inner)):
            raise InputError(
                f"the column {column!r} of {where} holds no pictures but {feature}; a table of paths is for the command table"
            )


def rows_of(stream: Any) -> Iterator[dict[str, Any]]:
    """The rows of a stream. Raises `InputError` when the network or a file fails, with the way to continue."""
    try:
        yield from stream
    except (OSError, ValueError) as error:
        raise InputError(f"the stream broke off ({error}): run the same command again to continue") from error


def _undecoded(table: Any) -> Any:
    """`table` with the files of pictures as they are, whether one or a list of them."""
    from datasets import Image, List

    for name, feature in (table.features or {}).items():
        if isinstance(feature, Image):
            table = table.cast_column(name, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            table = table.cast_column(name, List(Image(decode=False)))
    return table
