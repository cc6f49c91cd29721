"""The same adapter under the names of another program: kohya's scripts, diffusers, or the form that most read.

    kohya       lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight, .lora_up.weight, .alpha (the rank), .dora_scale
                lycoris_transformer_blocks_0_attn_to_q.lokr_w1, .lokr_w2 (or _a and _b), .alpha
    diffusers   transformer.transformer_blocks.0.attn.to_q.lora_A.weight, .lora_B.weight, .lora_magnitude_vector
    common      diffusion_model.transformer_blocks.0.attn.to_q.lora_A.weight, … as training writes it

Every alpha / rank is multiplied into B, or w1, in float32.
"""

import functools
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_prep.errors import InputError
from data_prep.files import atomic_file
from data_prep.model.directory import KNOWN
from eval.exports.forms import FormName
from train.model.adapter_files import (
    CONFIG_FILE,
    EXTRA_FILE,
    EXTRA_KEY,
    WEIGHTS_FILE,
    adapter_file,
    extra_file,
    read_header,
)
from train.model.adapter_reader import LowRank, linear_modules, read_parts
from train.model.denoiser import build_dit
from train.model.layers.lokr import LEFT, RIGHT

BLOCK = re.compile(r"transformer_blocks[._](\d+)[._](.+)")


def module_name(written: str) -> str | None:
    """A linear module of Qwen-Image's transformer, of any number of blocks, by its name with dots or without.

    Returns:
        Its name with dots; None if it has no such module.
    """
    if match := BLOCK.fullmatch(written):
        inside = _names()[0].get(match[2])
        return f"transformer_blocks.{match[1]}.{inside}" if inside else None
    return _names()[1].get(written)


@functools.cache
def _names() -> tuple[dict[str, str], dict[str, str]]:
    """Names of linear modules inside a block, and of the others, by themselves and without dots."""
    folder = KNOWN["Qwen/Qwen-Image-Edit-2511"]
    config = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        names = linear_modules(build_dit(config | {"num_layers": 1}))
    first = "transformer_blocks.0."
    inside = [name.removeprefix(first) for name in names if name.startswith(first)]
    others = [name for name in names if not name.startswith(first)]
    return _both_ways(inside), _both_ways(others)


def _both_ways(names: Sequence[str]) -> dict[str, str]:
    return {name: name for name in names} | {name.replace(".", "_"): name for name in names}


def convert(path: Path, form: FormName, out: Path, dtype: torch.dtype | None = None) -> int:
    """Writes an adapter's file under another program's names, with its header, and beside it what was trained beside LoRA.

    Args:
        path: a checkpoint folder or a safetensors file.
        dtype: of the new file; by default as the old one's.

    Returns:
        How many modules it changes.

    Raises:
        InputError: the file is no adapter of Qwen-Image, or the form has no names for what it holds.
    """
    file = adapter_file(path)
    beside = extra_file(path)
    _check_place(out, file, beside)
    parts = read_parts(file, module_name)
    stored = dtype or _dtype(file)
    tensors: dict[str, Tensor] = {}
    for name, part in parts.items():
        tensors |= dict(_lokr(file, name, part, form) if part.products else _low_rank(name, part, form))
    header = {key: value for key, value in read_header(file).items() if key != "lora_adapter_metadata"}
    if beside:
        header[EXTRA_KEY] = json.dumps(json.loads(header[EXTRA_KEY]) | {"file": EXTRA_FILE})
    ready = {key: tensor.to(stored).contiguous() for key, tensor in tensors.items()}
    for key, tensor in ready.items():
        if not tensor.isfinite().all():
            raise InputError(f"{key} has numbers that {stored} cannot hold: convert without --dtype, or to bf16")
    with atomic_file(out) as temporary:
        save_file(ready, temporary, metadata={"format": "pt", **header})
    if beside and beside.parent.absolute() != out.parent.absolute():
        with atomic_file(out.parent / EXTRA_FILE) as temporary:
            shutil.copyfile(beside, temporary)
    return len(parts)


def _check_place(out: Path, file: Path, beside: Path | None) -> None:
    """Finds that the new file would overwrite the old one, or be taken for a part of something else."""
    if out.suffix != ".safetensors":
        raise InputError(f"--out must end in .safetensors, got {out}")
    if out.exists() and out.samefile(file):
        raise InputError(f"--out {out} is the file that is converted: choose another name")
    if out.exists():
        raise InputError(f"--out {out} is there already: choose another name, or remove it")
    others = [CONFIG_FILE] if out.name == WEIGHTS_FILE else []
    there = [name for name in (*others, *([EXTRA_FILE] if beside else [])) if (out.parent / name).exists()]
    if there and out.parent.absolute() != file.parent.absolute():
        raise InputError(f"{out.parent} has a {there[0]} of another adapter: choose another folder")


def _low_rank(name: str, part: LowRank, form: FormName) -> Iterator[tuple[str, Tensor]]:
    if form == "kohya":
        start = f"lora_unet_{name.replace('.', '_')}"
        yield f"{start}.lora_down.weight", part.down
        yield f"{start}.lora_up.weight", part.up
        yield f"{start}.alpha", torch.tensor(float(part.rank))
        if part.magnitude is not None:
            yield f"{start}.dora_scale", part.magnitude.view(-1, 1)
        return
    start = f"{'transformer' if form == 'diffusers' else 'diffusion_model'}.{name}"
    yield f"{start}.lora_A.weight", part.down
    yield f"{start}.lora_B.weight", part.up
    if part.magnitude is not None:
        ending = "" if form == "diffusers" else ".weight"
        yield f"{start}.lora_magnitude_vector{ending}", part.magnitude.flatten()


def _lokr(file: Path, name: str, part: LowRank, form: FormName) -> Iterator[tuple[str, Tensor]]:
    if form == "diffusers":
        raise InputError(
            f"{file} is a LoKr adapter, and diffusers has no names for it: merge it, or use kohya or common"
        )
    (product,) = part.products
    start = f"lycoris_{name.replace('.', '_')}" if form == "kohya" else f"diffusion_model.{name}"
    for side, factor in (LEFT, product.left), (RIGHT, product.right):
        for ending, matrix in zip(("_a", "_b") if len(factor) == 2 else ("",), factor, strict=True):
            yield f"{start}.{side}{ending}", matrix
    if ranks := [len(factor[1]) for factor in (product.left, product.right) if len(factor) == 2]:
        yield f"{start}.alpha", torch.tensor(float(ranks[-1]))  # which readers divide by this rank


def _dtype(file: Path) -> torch.dtype:
    """Of a file's largest tensor."""
    with safe_open(file, framework="pt") as opened:
        largest = max(opened.keys(), key=lambda key: torch.Size(opened.get_slice(key).get_shape()).numel())
        return opened.get_tensor(largest).dtype
