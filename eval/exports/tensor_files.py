"""Files of tensors that are written one tensor at a time: safetensors, whose library wants them all at once, and GGUF."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.exports.forms import GGUFName
from train.model.quantize import BLOCKS

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""By their names in safetensors."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ARCHITECTURE = "qwen_image"
"""What llama.cpp's format calls this transformer; ComfyUI-GGUF looks for it."""


@dataclass(frozen=True)
class Layout:
    """Of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


Read = Callable[[str, torch.dtype], Tensor]
"""Gives a tensor by its name, in a dtype."""


def write_safetensors(path: Path, layout: Mapping[str, Layout], read: Read, metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file: the header's length in 8 bytes, the header as JSON, the numbers."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, each in layout.items():
        offsets = [end, end := end + each.num_bytes]
        header[name] = {"dtype": NAMES[each.dtype], "shape": list(each.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, each in layout.items():
            tensor = read(name, each.dtype)
            assert tuple(tensor.shape) == each.shape
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def gguf_bytes(kind: GGUFName, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of the numbers in a file that `write_gguf` writes."""
    return sum(_gguf_types(kind, shapes)[1].values())


def _gguf_types(kind: GGUFName, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Any], dict[str, int]]:
    """Of each tensor: its type, and its bytes."""
    import gguf

    wanted, plain = gguf.GGMLQuantizationType[kind], gguf.GGMLQuantizationType.F32
    group, _ = gguf.GGML_QUANT_SIZES[wanted]
    types = {
        name: wanted if name.startswith(BLOCKS) and len(shape) == 2 and shape[1] % group == 0 else plain
        for name, shape in shapes.items()
    }
    sizes = {}
    for name, shape in shapes.items():
        items, num_bytes = gguf.GGML_QUANT_SIZES[types[name]]
        sizes[name] = torch.Size(shape).numel() // items * num_bytes
    return types, sizes


def write_gguf(
    path: Path, kind: GGUFName, shapes: Mapping[str, tuple[int, ...]], read: Read, metadata: Mapping[str, str]
) -> None:
    """Writes a GGUF file: the blocks' matrices as `kind`, where its groups divide their rows, everything else in float32."""
    import gguf  # an extra, and only this format needs it

    types, sizes = _gguf_types(kind, shapes)
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in metadata.items():
        writer.add_string(f"{ARCHITECTURE}.{key}", value)
    for name, shape in shapes.items():
        writer.add_tensor_info(name, shape, np.dtype(np.float32), sizes[name], raw_dtype=types[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, type_ in types.items():
        writer.write_tensor_data(gguf.quantize(read(name, torch.float32).numpy(), type_))
    writer.close()
