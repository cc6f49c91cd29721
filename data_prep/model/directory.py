"""A model directory in the layout of Qwen/Qwen-Image-Edit-2511: where its files are, what they say, how they are read."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import nn

from data_prep.errors import InputError
from data_prep.model.editions import FIRST, PLUS, Edition, edition_of
from data_prep.model.hub_files import HUB_ID, fetch

INDEX = "model_index.json"
COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer", "processor")
KNOWN = {f"Qwen/{folder.name}": folder for folder in (Path(__file__).parent / "known").iterdir()}
"""Hub id of a published model -> its `config.json` files, in their folders. They say its sizes, and ship with the project."""
SAMPLES, SAMPLE_BYTES = 256, 4096
NEVER_READ = (".bin", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".pb", ".pt")
"""Weights in other formats, which some model folders hold beside safetensors, gigabytes of them."""


@dataclass(frozen=True)
class ModelDirectory:
    """A local folder with `transformer/ vae/ text_encoder/ tokenizer/ processor/`."""

    path: Path

    @classmethod
    def resolve(cls, model: str | os.PathLike, weights: bool = True) -> "ModelDirectory":
        """A folder as it is, or a hub id, downloaded (or found in the hub's cache) with progress.

        Args:
            weights: download all of it, or only what says how large it is. For a known model the hub is not asked for that:
                it is in the hub's cache on this machine, or ships with the project.

        Raises:
            InputError: neither, or the folder lacks a component.
        """
        path = Path(model).expanduser()
        if not path.is_dir():
            if not weights and str(model) in KNOWN:
                return cls(_cached(str(model)) or KNOWN[str(model)])
            path = download(str(model), weights)
        missing = [name for name in COMPONENTS if not (path / name).is_dir()]
        if missing:
            raise InputError(
                f"{path} is not a model folder: {', '.join(missing)} missing. It must have the layout of "
                "Qwen/Qwen-Image-Edit-2511"
            )
        found = cls(path)
        _ = found.edition
        return found

    @property
    def edition(self) -> Edition:
        """Which Qwen-Image-Edit it is, by `model_index.json`; without one, that of 2509 and 2511.

        Raises:
            InputError: another pipeline's model.
        """
        index = self.path / INDEX
        if not index.is_file():
            return PLUS
        return edition_of(str(_read_json(index).get("_class_name")), self.path)

    @property
    def shipped(self) -> bool:
        """Whether these are the sizes of a known model, and nothing else."""
        return self.path in KNOWN.values()

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
        """Every tensor of the component, read one at a time. It may be a view of the file: copy what should outlive it."""
        for file in self.shards(component):
            with _opened(file) as weights:
                for name in weights.keys():  # noqa: SIM118
                    yield name, weights.get_tensor(name)

    def shapes(self, component: str) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of the component, from the files' headers alone."""
        shapes = {}
        for file in self.shards(component):
            with _opened(file) as weights:
                for name in weights.keys():  # noqa: SIM118
                    shapes[name] = tuple(weights.get_slice(name).get_shape())
        return shapes

    def load_into(
        self,
        module: nn.Module,
        component: str,
        device: torch.device | str,
        dtype: torch.dtype,
        rename: Callable[[str], str | None] = str,
        place: Callable[[nn.Module, str], None] | None = None,
        read: bool = True,
        change: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """Gives a module built on the meta device its weights, each tensor straight in its place: no second full copy.

        Names and shapes are compared before the first tensor is read. Nothing refers to the files afterwards.

        Args:
            rename: the module's name for a stored tensor, or None for a tensor that the module does without.
            place: called for every tensor as soon as it is loaded, with the module whose own it is and its name there, for
                example to keep only a part of it.
            read: false leaves the numbers undefined, for a `place` that gets them from another process, in the same order.
            change: given each tensor that is read, with the module's name for it; what it returns is loaded.

        Raises:
            InputError: a tensor is missing, unexpected, or of another shape.
        """
        expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        stored = {own: shape for name, shape in self.shapes(component).items() if (own := rename(name))}
        _check_shapes(self.path / component, stored, expected)
        for name, tensor in self.tensors(component) if read else self._unread(component, device, dtype):
            if own := rename(name):
                owner, _, leaf = own.rpartition(".")  # only its owner: the whole module would be walked for each tensor
                changed = change(own, tensor) if change and read else tensor
                weights = {leaf: changed.to(device, dtype, copy=read)}
                submodule = module.get_submodule(owner)
                submodule.load_state_dict(weights, strict=False, assign=True)
                if place:
                    place(submodule, leaf)

    def _unread(
        self, component: str, device: torch.device | str, dtype: torch.dtype
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """As `tensors`, in its order, with undefined numbers."""
        for name, shape in self.shapes(component).items():
            yield name, torch.empty(shape, device=device, dtype=dtype)

    @property
    def _is_first(self) -> bool:
        """Also asked of other pipelines' folders."""
        index = self.path / INDEX
        return index.is_file() and _read_json(index).get("_class_name") == FIRST.pipeline

    def fingerprint(self, *components: str) -> str:
        """Identifies the components' contents: configuration and tokenizer files whole, and of each safetensors file its
        header and 256 evenly spaced samples, so that 16 GB take less than a second. Paths and dates do not count. The first
        Qwen-Image-Edit has the text encoder of the later ones, but not their template, which counts too.
        """
        digest = hashlib.blake2b(digest_size=16)
        if "text_encoder" in components and self._is_first:
            digest.update(FIRST.pipeline.encode())
        for component in components:
            files = (file for file in (self.path / component).iterdir() if file.is_file())
            for file in sorted(file for file in files if file.suffix not in NEVER_READ):
                digest.update(f"{component}/{file.name}".encode())
                digest.update(_sample(file) if file.suffix == ".safetensors" else file.read_bytes())
        return digest.hexdigest()


def download(hub_id: str, weights: bool = True) -> Path:
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
    files = "*" if weights else "*.json"
    return fetch(hub_id, [INDEX, *(f"{name}/{files}" for name in COMPONENTS)])


def _cached(hub_id: str) -> Path | None:
    """Where the hub's cache on this machine has all that says how large a known model is."""
    parts = [folder.name for folder in KNOWN[hub_id].iterdir()]
    found = [try_to_load_from_cache(hub_id, f"{part}/config.json") for part in parts]
    files = [Path(file) for file in found if isinstance(file, str)]
    return files[0].parents[1] if len(files) == len(parts) else None


def _check_shapes(where: Path, stored: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    for name, shape in stored.items():
        if name not in expected:
            raise InputError(f"{where} holds {name!r}, which its config.json does not describe")
        if shape != expected[name]:
            raise InputError(f"{where}: {name!r} has shape {shape}, config.json asks for {expected[name]}")
    if missing := [name for name in expected if name not in stored]:
        raise InputError(f"{where} lacks {len(missing)} tensors, the first is {missing[0]!r}")


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as weights:
            yield weights
    except SafetensorError as error:
        raise InputError(f"{file} cannot be read ({error}): download it again") from error


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
