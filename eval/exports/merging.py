"""Adapters inside the transformer's weights, written one tensor at a time: 20 B parameters need no memory for all of them.

    W' = W + sum of weight · (B A, or LoKr's product); with one DoRA as `fused_weight` says; what was trained in full in W's place

In float32, with one rounding at the end.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open
from torch import Tensor

from data_prep.errors import InputError
from data_prep.files import atomic_file, atomic_folder, write_text
from data_prep.model.directory import ModelDirectory
from eval.exports.forms import GGUFName
from eval.exports.tensor_files import DTYPES, Layout, gguf_bytes, write_gguf, write_safetensors
from eval.qwen.weights.adapters import added_up
from eval.qwen.weights.extra_weights import read_all, weighted
from eval.request.knobs import AdapterUse
from eval.request.metadata import describe_adapters, read_metadata
from train.model.adapter_reader import fused_weight
from train.model.denoiser import build_dit

TRANSFORMER = "transformer"
SHARD_NAME = "diffusion_pytorch_model{suffix}.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
KEPT = ("objective", "base_pipeline", "loss", "sigmas", "geometry", "sigma_convention")
"""Of the first adapter's header: how the merged transformer is to be sampled."""


@dataclass(frozen=True)
class Merge:
    """A transformer and what goes into it.

    Attributes:
        files: where each tensor of the base model is.
        layout: shape and dtype of each tensor of the merged transformer.
        change: a tensor of the base model, by its name -> the merged one, float32 where it changed.
        header: what the files say of themselves.
    """

    model: ModelDirectory
    files: Mapping[str, Path]
    layout: Mapping[str, Layout]
    change: Callable[[str, Tensor], Tensor]
    header: Mapping[str, str]

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        """A merged tensor.

        Raises:
            InputError: the dtype cannot hold a number of it.
        """
        with safe_open(self.files[name], framework="pt") as opened:
            merged = self.change(name, opened.get_tensor(name)).to(dtype)
        if not merged.isfinite().all():
            raise InputError(f"{name} has numbers that {dtype} cannot hold: use --dtype bf16")
        return merged

    def write_folder(self, out: Path, shard_size: str, whole: bool = False) -> None:
        """Writes the transformer as diffusers does: `config.json`, files of at most `shard_size`, and their index.

        Args:
            out: a folder that does not exist yet; it is whole or not there.
            shard_size: such as `5GB`.
            whole: the base model's other parts are copied beside it, in a model directory.

        Raises:
            InputError: the folder is there already, there is no room for it, or `shard_size` is no size.
        """
        sizes: Any = {name: layout.num_bytes for name, layout in self.layout.items()}
        try:
            split = split_state_dict_into_shards_factory(
                sizes, get_storage_size=int, filename_pattern=SHARD_NAME, max_shard_size=shard_size
            )
        except ValueError:
            raise InputError(f"--shard-size must look like 5GB, got {shard_size!r}") from None
        check_room(out, sum(sizes.values()) + (_copied_bytes(self.model.path) if whole else 0))
        with atomic_folder(out) as temporary:
            folder = temporary / TRANSFORMER if whole else temporary
            if whole:
                shutil.copytree(
                    self.model.path, temporary, ignore=_but_transformer(self.model.path), dirs_exist_ok=True
                )
            folder.mkdir(exist_ok=True)
            shutil.copyfile(self.model.path / TRANSFORMER / "config.json", folder / "config.json")
            for file, names in split.filename_to_tensors.items():
                write_safetensors(folder / file, {name: self.layout[name] for name in names}, self.tensor, self.header)
            if split.is_sharded:
                index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
                write_text(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")

    def write_gguf(self, out: Path, kind: GGUFName) -> None:
        """Writes one GGUF file, with the blocks' matrices in a type of its own and everything else in float32."""
        shapes = {name: each.shape for name, each in self.layout.items()}
        check_room(out, gguf_bytes(kind, shapes))
        with atomic_file(out) as temporary:
            write_gguf(temporary, kind, shapes, self.tensor, self.header)


def prepare_merge(model: ModelDirectory, adapters: Sequence[AdapterUse], dtype: torch.dtype | None) -> Merge:
    """Reads the adapters, and of the model what its files say.

    Args:
        dtype: of the merged tensors; by default each has the base model's.

    Raises:
        InputError: an adapter is not for this model, cannot be added to others, or has a module that the transformer lacks.
    """
    used = [use for use in adapters if use.weight != 0]
    headers = [read_metadata(use.path) for use in used]
    if len({header.get("objective", "flow") for header in headers}) > 1:
        raise InputError("the adapters were trained for different objectives, lbm and flow: merge them one at a time")
    with torch.device("meta"):
        dit = build_dit(model.config(TRANSFORMER))
    parts, extras = added_up(dit, adapters), read_all(adapters)
    shapes = {name: tuple(tensor.shape) for name, tensor in dit.state_dict().items()}
    in_full: dict[str, list[tuple[Tensor, float]]] = {}
    for extra, weight in extras:
        if extra.nodes:
            raise InputError(
                f"{extra.file} adds the module {next(iter(extra.nodes))}, which is no part of a transformer and cannot be merged"
            )
        for name, tensor in extra.in_full.items():
            if shapes.get(name) != tuple(tensor.shape):
                raise InputError(f"{extra.file} is for another model: it has {name} of shape {tuple(tensor.shape)}")
            in_full.setdefault(name, []).append((tensor, weight))

    @torch.no_grad()
    def change(name: str, tensor: Tensor) -> Tensor:
        if name in in_full:
            tensor = weighted(in_full[name], tensor.float())
        part = parts.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        return fused_weight(tensor, part) if part else tensor

    files, layout = _layout(model, dtype)
    return Merge(model, files, layout, change, _header(model, used, headers))


def _layout(model: ModelDirectory, dtype: torch.dtype | None) -> tuple[dict[str, Path], dict[str, Layout]]:
    files, layout = {}, {}
    for file in model.shards(TRANSFORMER):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                stored = opened.get_slice(name)
                if stored.get_dtype() not in DTYPES:
                    raise InputError(
                        f"{file}: {name} is stored as {stored.get_dtype()}, which is not merged: use the bf16 model"
                    )
                files[name] = file
                layout[name] = Layout(tuple(stored.get_shape()), dtype or DTYPES[stored.get_dtype()])
    return files, layout


def _header(model: ModelDirectory, used: Sequence[AdapterUse], headers: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """How the transformer is sampled, and what is in it, without a path of this machine."""
    merged = [each | {"path": Path(each["path"]).name} for each in describe_adapters(used)]
    own = {key: headers[0][key] for key in KEPT if headers and key in headers[0]}
    return {"format": "pt", **own, "base_fingerprint": model.fingerprint(TRANSFORMER), "merged": json.dumps(merged)}


def check_room(out: Path, num_bytes: int) -> None:
    """Finds that a disk is too small before it is full.

    Raises:
        InputError: it is.
    """
    there = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(there).free
    if free < num_bytes:
        raise InputError(f"{out} needs {num_bytes / 2**30:.1f} GiB, and {there} has {free / 2**30:.1f} GiB left")


def _copied_bytes(root: Path) -> int:
    """Of the files that a whole model directory is made of, beside the transformer's."""
    left_out, total = _but_transformer(root), 0
    for folder, folders, files in os.walk(root, followlinks=True):
        ignored = left_out(folder, [*folders, *files])
        folders[:] = [name for name in folders if name not in ignored]
        total += sum((Path(folder) / name).stat().st_size for name in files if name not in ignored)
    return total


def _but_transformer(root: Path) -> Callable[[str, list[str]], list[str]]:
    """For `copytree`: what a model directory has beside the transformer, and nothing hidden."""

    def ignored(folder: Any, names: list[str]) -> list[str]:
        top = Path(folder) == root
        return [name for name in names if name.startswith(".") or (top and name == TRANSFORMER)]

    return ignored
