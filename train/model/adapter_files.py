"""Where an adapter's files are, and how they are called, for programs that do not load what wrote them."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from data_prep.errors import InputError

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
"""An adapter, and PEFT's configuration beside it."""
EXTRA_FILE = "extra_modules.safetensors"
"""What was trained beside LoRA, beside the adapter."""
EXTRA_KEY = "extra_modules"
"""The key of an adapter's header that says so: JSON with `file`, `in_full` (modules of the transformer) and `added` ones."""


def adapter_file(path: Path) -> Path:
    """The safetensors file of a checkpoint folder, or the file itself.

    Raises:
        InputError: there is none.
    """
    file = path / WEIGHTS_FILE if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"no adapter at {file}: give a checkpoint folder or its {WEIGHTS_FILE}")
    return file


def read_header(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file.

    Raises:
        InputError: it is not one.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.metadata() or {}
    except SafetensorError as error:
        raise InputError(f"{file} is not a readable safetensors file ({error})") from error


def extra_file(adapter: Path) -> Path | None:
    """The file beside an adapter's with what was trained beside LoRA, or None where there was nothing.

    Args:
        adapter: a checkpoint folder or a safetensors file.

    Raises:
        InputError: the adapter names one and it is not there.
    """
    file = adapter_file(adapter)
    header = json.loads(read_header(file).get(EXTRA_KEY, "null"))
    if header is None:
        return None
    beside = file.parent / Path(header["file"]).name  # a file of somebody else's names none elsewhere
    if not beside.is_file():
        raise InputError(
            f"{file} was trained with modules beside LoRA, but their file {beside.name} is not in the same folder: put it there"
        )
    return beside
