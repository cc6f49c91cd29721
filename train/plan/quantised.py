"""What frozen weights in fewer bits take: their bytes, and what multiplying by them reads, writes and holds for a moment.

Formulas of plain sizes. Where the GPU multiplies 8-bit numbers, each product rounds its input row by row (and the backward
pass needs the weight in the other order, a copy for the moment); elsewhere the weight is widened, one layer at a time.
"""

import math
from typing import NamedTuple

NF4_BLOCK, NF4_GROUP = 64, 256
"""Weights that share an 8-bit scale, and scales that share a float."""


class Layer(NamedTuple):
    """A frozen linear layer of a block, and what it is given."""

    inputs: int
    outputs: int
    tokens: int
    """Rows of one sample."""

    @property
    def numel(self) -> int:
        """Weights."""
        return self.inputs * self.outputs


def stored_bytes(inputs: int, outputs: int, weights: str, itemsize: int) -> int:
    """Of a weight (outputs, inputs) with its scales, without its bias.

    Args:
        weights: `bf16`, `fp8`, `int8` or `nf4`.
        itemsize: of `model.dtype`, in which `bf16` weights and the scales of 8-bit ones are.
    """
    if weights == "bf16":
        return inputs * outputs * itemsize
    if weights == "nf4":
        scales = inputs * outputs // NF4_BLOCK
        return inputs * outputs // 2 + scales + 4 * math.ceil(scales / NF4_GROUP)
    return inputs * outputs + itemsize * outputs


def workspace_bytes(layer: Layer, batch_size: int, weights: str, products: bool, itemsize: int) -> int:
    """What a product with a quantised weight holds for a moment, forward or backward, beside its input and output.

    Args:
        products: whether it is computed in 8 bits.
    """
    if weights == "bf16":
        return 0
    if not products:
        return layer.numel * itemsize
    rows, sums = layer.tokens * batch_size, 4 if weights == "int8" else 0  # int8 products are int32 first
    forward = rows * (layer.inputs + sums * layer.outputs)
    backward = rows * ((1 + itemsize) * layer.outputs + (itemsize + sums) * layer.inputs) + layer.numel
    return max(forward, backward)


def traffic_bytes(layer: Layer, batch_size: int, weights: str, products: bool, passes: float, itemsize: int) -> float:
    """What multiplying by a quantised weight reads and writes in GPU memory beyond a product in bf16.

    Args:
        passes: how often a step multiplies by it for each batch: forward, backward and where it is computed again.
    """
    if weights == "bf16":
        return 0
    if not products:  # read, written wide, and read again
        return passes * (stored_bytes(layer.inputs, layer.outputs, weights, itemsize) + itemsize * layer.numel)
    rows, sums = layer.tokens * batch_size, 8 if weights == "int8" else 0
    rounded = itemsize + 1  # read and written
    forward = rows * (rounded * layer.inputs + sums * layer.outputs)
    backward = rows * ((rounded + 2 * itemsize) * layer.outputs + sums * layer.inputs) + 2 * layer.numel
    return (passes - 1) * forward + backward
