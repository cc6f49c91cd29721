"""A table that grows row by row on stdout, and its numbers in a JSON file that is whole after each row."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from data_prep.files import write_text

PACKAGES = ("torch", "diffsynth", "peft", "deepspeed")


class Report:
    """Prints rows as they come, so that a run that is cut short has lost nothing.

    Args:
        columns: key -> how many characters it takes. Keys that a row lacks are left blank; others are in the file only;
            `failed` and `note` are lines of their own.
        file: where the numbers go, if anywhere.
        header: what holds for all rows.
    """

    def __init__(self, columns: Mapping[str, int], file: Path | None, header: Mapping[str, Any]):
        self.columns, self.file = columns, file
        self.numbers: dict[str, Any] = {**header, "rows": {}}
        for name, value in header.items():
            print(f"{name}: {_text(value)}")
        print("".join(_cell(name, width) for name, width in columns.items()), flush=True)
        self.save()

    def add(self, name: str, row: Mapping[str, Any]) -> None:
        """Prints and saves a row."""
        self.numbers["rows"][name] = dict(row)
        shown = {next(iter(self.columns)): name} | row
        print("".join(_cell(_text(shown.get(key)), width) for key, width in self.columns.items()), flush=True)
        for key in row.keys() & {"failed", "note"}:
            print(f"    {row[key]}", flush=True)
        self.save()

    def save(self) -> None:
        """Writes what there is so far."""
        if self.file:
            write_text(self.file, json.dumps(self.numbers, indent=1) + "\n")


def environment(device: str) -> dict[str, str]:
    """What a figure depends on: the command, the day, the card and the versions."""
    versions = {name: version(name) for name in PACKAGES}
    if device == "cuda":
        versions |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
    }


def lines(values: Sequence[Sequence[Any]], widths: Sequence[int]) -> str:
    """Lines of cells."""
    return "\n".join("".join(_cell(_text(v), w) for v, w in zip(line, widths, strict=True)) for line in values)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(text: str, width: int) -> str:
    """Text to the left where the width is negative, numbers to the right."""
    return f"{text:{-width}}" if width < 0 else f"{text:>{width}}"
