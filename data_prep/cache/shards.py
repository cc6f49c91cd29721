"""Arrow files of tensors: memory-mapped when read, whole or absent when written.

A tensor is its raw little-endian bytes, its shape and its dtype, for bfloat16 too. Any Arrow library reads them.
"""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from data_prep.files import atomic_file

TENSOR = pa.struct([("data", pa.large_binary()), ("shape", pa.list_(pa.int32())), ("dtype", pa.string())])
LATENTS_SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "bucket": pa.string(),
        "target_latents": TENSOR,
        "source_latents": TENSOR,
        "edit_latents": pa.list_(TENSOR),
        "bridge_image": pa.int32(),
        "mask": TENSOR,
    }
)
"""`source_latents` is null where it is `edit_latents[bridge_image]`, and where there are no references (text to image)."""
TEXT_SCHEMA = pa.schema({"key": pa.string(), "prompt_emb": TENSOR})
SUB_NOISE_SCHEMA = pa.schema({"sub_noise": TENSOR})


def to_arrow(tensor: Tensor) -> dict[str, Any]:
    """A tensor of any dtype as a value of type `TENSOR`."""
    tensor = tensor.detach().cpu()
    data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return {"data": data, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}


def from_arrow(value: pa.StructScalar) -> Tensor:
    """The tensor of a value of type `TENSOR`, in memory of its own."""
    buffer = bytearray(value["data"].as_buffer())
    dtype = getattr(torch, value["dtype"].as_py())
    return torch.frombuffer(buffer, dtype=dtype).reshape(value["shape"].as_py())


def write_arrow(path: Path, values: Iterable[dict[str, Any]], schema: pa.Schema, batch_rows: int | None = None) -> None:
    """Writes rows of plain values atomically.

    Args:
        batch_rows: number of rows of a record batch, which is all that is in memory at once; None: one batch.
    """
    values = iter(values)
    batches = iter(lambda: list(itertools.islice(values, batch_rows)), []) if batch_rows else iter([list(values)])
    with atomic_file(path) as temporary, pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, schema) as out:
        for batch in batches:
            out.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))


def read_arrow(path: Path) -> pa.RecordBatch:
    """Maps a file of one batch that `write_arrow` wrote; bytes come from the disk when they are looked at.

    Raises:
        pa.ArrowInvalid: the file is damaged.
    """
    return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)


def read_table(path: Path) -> pa.Table:
    """The same of a file of any number of batches."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
