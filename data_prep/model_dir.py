"""A model directory in the layout of Qwen/Qwen-Image-Edit-2511: where its files are, what they say, how they are read."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn

from data_prep.errors import InputError

COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer", "processor")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SAMPLES, SAMPLE_BYTES = 256, 4096


@dataclass(frozen=True)
class ModelDirectory:
    """A local folder with `transformer/ vae/ text_encoder/ tokenizer/ processor/`."""

    path: Path

    @classmethod
    def resolve(cls, model: str | os.PathLike) -> "ModelDirectory":
        """A folder as it is, or a hub id, downloaded (or found in the hub's cache) with progress.

        Raises:
            InputError: neither, or the folder lacks a component.
        """
        path = Path(model).expanduser()
        if not path.is_dir():
            path = download(str(model))
        missing = [name for name in COMPONENTS if not (path / name).is_dir()]
        if missing:
            raise InputError(
                f"{path} is no model directory, it lacks {', '.join(missing)}: expected the layout of Qwen/Qwen-Image-Edit-2511"
            )
        return cls(path)

    def config(self, component: str) -> dict:
        """The component's `config.json`."""
        return _read_json(self.path / component / "config.json")

    def shards(self, component: str) -> list[Path]:
        """The component's safetensors files.

        Raises:
            InputError: there are none.
        """
        folder = self.path / component
        files = sorted(folder.glob("*.safetensors"))
        for index in folder.glob("*.safetensors.index.json"):
            files = [folder / name for name in sorted(set(_read_json(index)["weight_map"].values()))]
        missing = [file for file in files if not file.is_file()]
        if missing or not files:
            raise InputError(
                f"weights are missing: {missing[0] if missing else folder / '*.safetensors'} does not exist"
            )
        return files

    def tensors(self, component: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the component, read one at a time."""
        for file in self.shards(component):
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118
                        yield name, opened.get_tensor(name)
            except SafetensorError as error:
                raise InputError(f"{file} cannot be read ({error}): download it again") from error

    def load_into(self, module: nn.Module, component: str, device: torch.device | str, dtype: torch.dtype) -> None:
        """Gives a module built on the meta device its weights, each tensor straight in its place: no second full copy.

        Raises:
            InputError: a tensor is missing, unexpected, or of another shape.
        """
        waiting = {name: tensor.shape for name, tensor in module.state_dict().items()}
        where = f"{self.path / component}"
        for name, tensor in self.tensors(component):
            shape = waiting.pop(name, None)
            if shape is None:
                raise InputError(f"{where} holds {name!r}, which its config.json does not describe")
            if shape != tensor.shape:
                raise InputError(
                    f"{where}: {name!r} has shape {tuple(tensor.shape)}, config.json asks for {tuple(shape)}"
                )
            module.load_state_dict({name: tensor.to(device, dtype)}, strict=False, assign=True)
        if waiting:
            raise InputError(f"{where} lacks {len(waiting)} tensors, the first is {next(iter(waiting))!r}")

    def fingerprint(self, *components: str) -> str:
        """Identifies the components' contents: configuration and tokenizer files whole, and of each safetensors file its
        header and 256 evenly spaced samples, so that 16 GB take less than a second. Paths and dates do not count.
        """
        digest = hashlib.blake2b(digest_size=16)
        for component in components:
            for file in sorted((self.path / component).iterdir()):
                digest.update(f"{component}/{file.name}".encode())
                digest.update(_sample(file) if file.suffix == ".safetensors" else file.read_bytes())
        return digest.hexdigest()


def download(hub_id: str) -> Path:
    """Fetches the components' files from the hub.

    Raises:
        InputError: not a hub id, or the hub does not have it or cannot be reached.
    """
    if hub_id.rstrip("/").endswith("models/tiny"):
        raise InputError(f"no tiny model at {hub_id}: make it with `python scripts/make_tiny_model.py`")
    if not HUB_ID.fullmatch(hub_id):
        raise InputError(
            f"no model at {hub_id}: set model.path to a folder or to a hub id such as Qwen/Qwen-Image-Edit-2511"
        )
    patterns = ["model_index.json", *(f"{name}/*" for name in COMPONENTS)]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"no folder {hub_id}, and downloading it from the hub failed: {reason}") from error


@cache
def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: the model directory is incomplete") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not valid JSON ({error})") from None


def _sample(file: Path) -> bytes:
    """Size, header and evenly spaced samples of a safetensors file."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        header = opened.read(8 + int.from_bytes(opened.read(8), "little"))
        parts = [str(size).encode(), header]
        for i in range(SAMPLES):
            opened.seek(max(0, (size - SAMPLE_BYTES) * i // (SAMPLES - 1)))
            parts.append(opened.read(SAMPLE_BYTES))
    return b"".join(parts)
