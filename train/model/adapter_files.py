"""Where an adapter's files are, and how they are called, for programs that do not load what wrote them."""

from pathlib import Path

from data_prep.errors import InputError

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
"""An adapter, and PEFT's configuration beside it."""
EXTRA_FILE = "extra_modules.safetensors"
"""What was trained beside LoRA, beside the adapter."""


def adapter_file(path: Path) -> Path:
    """The safetensors file of a checkpoint folder, or the file itself.

    Raises:
        InputError: there is none.
    """
    file = path / WEIGHTS_FILE if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"no adapter at {file}: give a checkpoint folder or its {WEIGHTS_FILE}")
    return file
