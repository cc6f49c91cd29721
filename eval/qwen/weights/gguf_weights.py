"""A transformer from a GGUF file: the tensors have the transformer's own names, maybe with a prefix.

Quantised linear layers stay as they are in the file and are dequantised when they compute (diffusers' GGUFLinear); everything
else becomes plain numbers.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES, GGUFLinear, GGUFParameter
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor, dequantize
from torch import Tensor, nn

from data_prep.errors import InputError
from train.model.quantize import BLOCKS

PREFIX = "model.diffusion_model."
PLAIN = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)


def load_gguf(
    dit: nn.Module,
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    place: Callable[[nn.Module, str], None] | None = None,
) -> None:
    """Gives a transformer on the meta device the weights of a GGUF file, one tensor at a time.

    Args:
        dtype: data type of what is not quantised, and in which the layers compute.
        place: as of `ModelDirectory.load_into`.

    Raises:
        InputError: the file is broken, holds other tensors than the transformer has, or in a format that cannot be read.
    """
    tensors = _read(path)
    _check(path, tensors, {name: tuple(tensor.shape) for name, tensor in dit.state_dict().items()})
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        module = dit.get_submodule(owner)
        if _stays_quantised(name, module, tensor):
            assert isinstance(module, nn.Linear)
            dit.set_submodule(owner, _gguf_linear(module, tensor, device, dtype))
        else:
            weight = _owned(dequantize(tensor.data, tensor.tensor_type)).to(device, dtype)
            module.register_parameter(leaf, nn.Parameter(weight, requires_grad=False))
        if place:
            place(module, leaf)


def _read(path: Path) -> dict[str, ReaderTensor]:
    try:
        return {tensor.name.removeprefix(PREFIX): tensor for tensor in GGUFReader(path).tensors}
    except (ValueError, IndexError, KeyError) as error:
        raise InputError(f"{path} is not a readable GGUF file ({error})") from error


def _check(path: Path, tensors: dict[str, ReaderTensor], expected: dict[str, tuple[int, ...]]) -> None:
    for name, tensor in tensors.items():
        if name not in expected:
            raise InputError(f"{path} holds {name!r}, which this transformer lacks")
        shape = tuple(int(side) for side in reversed(tensor.shape))  # GGUF counts the innermost dimension first
        if shape != expected[name]:
            raise InputError(f"{path} is for another model: {name!r} has shape {shape}, not {expected[name]}")
        if tensor.tensor_type not in (*PLAIN, *SUPPORTED_GGUF_QUANT_TYPES):
            raise InputError(f"{path}: {name!r} is stored as {tensor.tensor_type.name}, which cannot be read")
    if missing := [name for name in expected if name not in tensors]:
        raise InputError(f"{path} lacks {len(missing)} tensors, the first is {missing[0]!r}")


def _stays_quantised(name: str, module: nn.Module, tensor: ReaderTensor) -> bool:
    return name.startswith(BLOCKS) and isinstance(module, nn.Linear) and tensor.tensor_type not in PLAIN


def _gguf_linear(like: nn.Linear, tensor: ReaderTensor, device: torch.device, dtype: torch.dtype) -> GGUFLinear:
    linear = GGUFLinear(like.in_features, like.out_features, like.bias is not None, dtype, device=torch.device("meta"))
    make: Any = GGUFParameter  # its arguments are __new__'s, which the checker does not see
    linear.weight = make(_owned(tensor.data).to(device), quant_type=tensor.tensor_type)
    linear.bias = like.bias  # it may have been read before
    return linear


def _owned(data: np.ndarray) -> Tensor:
    """A copy, so that nothing refers to the file."""
    return torch.from_numpy(np.array(data))
