"""What surrounds the matrix products in 8 bits, as Triton kernels: a pass over memory each, where PyTorch makes several."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Numbers of a row that one program scales."""
TILE = 64
"""Side of the square that one program turns."""


def scale_sums(
    sums: Tensor, row_scale: Tensor, scale: Tensor | None, bias: Tensor | None, out: Tensor, add: bool
) -> None:
    """out = sums * row_scale * scale + bias, or that added to out; computed in float32.

    Args:
        sums: (rows, columns).
        row_scale: (rows, 1), float32.
        scale: (columns,), float32, or None for 1.
        bias: (columns,), or None for 0.
        out: (rows, columns), contiguous, as all of them are.
    """
    rows, columns = out.shape
    if rows:
        grid = rows, triton.cdiv(columns, BLOCK)
        given: Any = scale is not None, bias is not None, add, BLOCK  # Triton makes constants of them
        with _current(out):
            _scale_sums[grid](sums, row_scale, scale, bias, out, columns, *given)


def turned(weight: Tensor) -> Tensor:
    """(rows, columns) of one byte each -> (columns, rows), contiguous."""
    rows, columns = weight.shape
    result = weight.new_empty(columns, rows)
    grid = triton.cdiv(rows, TILE), triton.cdiv(columns, TILE)
    side: Any = TILE
    with _current(weight):
        _turn[grid](weight.view(torch.uint8), result.view(torch.uint8), rows, columns, side)
    return result


def _current(tensor: Tensor) -> AbstractContextManager[Any]:
    """Inside, a tensor's GPU is the current one: Triton launches there, wherever the operands are."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@triton.jit
def _scale_sums(
    sums,
    row_scale,
    scale,
    bias,
    out,
    columns,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    ADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = places < columns
    numbers = tl.load(sums + row * columns + places, mask=inside).to(tl.float32) * tl.load(row_scale + row)
    if SCALED:
        numbers = numbers * tl.load(scale + places, mask=inside)
    if BIASED:
        numbers = numbers + tl.load(bias + places, mask=inside).to(tl.float32)
    if ADDED:
        numbers = numbers + tl.load(out + row * columns + places, mask=inside).to(tl.float32)
    tl.store(out + row * columns + places, numbers.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _turn(weight, result, rows, columns, TILE: tl.constexpr):
    row = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    column = (tl.program_id(1) * TILE + tl.arange(0, TILE)).to(tl.int64)
    tile = tl.load(
        weight + row[:, None] * columns + column[None, :],
        mask=(row[:, None] < rows) & (column[None, :] < columns),
    )
    tl.store(
        result + column[:, None] * rows + row[None, :],
        tl.trans(tile),
        mask=(column[:, None] < columns) & (row[None, :] < rows),
    )
