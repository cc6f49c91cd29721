"""What multiplying by frozen weights in fewer bits reads, writes and holds for a moment: formulas of plain sizes.

They follow train/model/quantize.py. Where the GPU multiplies 8-bit numbers, a product's input is rounded row by row, and the
backward pass turns a copy of the weight; elsewhere, for nf4, and for the modulation's few rows, the weight is widened.
"""

from typing import NamedTuple

from train.model.quantize import NF4_BLOCK, SUMS_BYTES, fits_units

FEW_ROWS = 2
"""Of one sample: the modulation's, whose vectors are not rounded."""


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


class Format(NamedTuple):
    """How frozen weights are kept and multiplied.

    Attributes:
        weights: `model.weights`.
        products: whether the GPU multiplies in 8 bits.
        compiled: whether blocks are compiled, so that rounding is one pass.
        itemsize: bytes per number of `model.dtype`.
    """

    weights: str
    products: bool
    compiled: bool
    itemsize: int

    def stored_bytes(self, layer: Layer) -> int:
        """Bytes of its weight with its scales, without its bias."""
        if self.weights == "bf16":
            return layer.numel * self.itemsize
        if self.weights == "nf4":  # and a bfloat16 scale for each block
            return layer.numel // 2 + 2 * (layer.numel // NF4_BLOCK)
        return layer.numel + 4 * layer.outputs

    def in_8_bits(self, layer: Layer) -> bool:
        """Whether its products are."""
        return self.products and layer.tokens > FEW_ROWS and fits_units(layer.inputs, layer.outputs)

    def workspace_bytes(self, layer: Layer, batch_size: int) -> int:
        """What its product holds for a moment, forward or backward, beside input and output."""
        if self.weights == "bf16":
            return 0
        if not self.in_8_bits(layer):
            return layer.numel * self.itemsize
        int8, rows, wider = self.weights == "int8", layer.tokens * batch_size, max(layer.inputs, layer.outputs)
        floats = 0 if self.compiled else 4 * (3 if int8 else 2)  # scaled, divided and rounded one after the other
        sums = min(SUMS_BYTES, (4 if int8 else self.itemsize) * rows * wider)
        return rows * wider * (1 + floats) + layer.numel + sums

    def traffic_bytes(self, layer: Layer, batch_size: int, passes: float) -> float:
        """What its products read and write in GPU memory beyond those in bf16.

        Args:
            passes: how often a step multiplies by it for each batch: forward, backward and where it is computed again.
        """
        if self.weights == "bf16":
            return 0.0
        if not self.in_8_bits(layer):  # read, written wide, and read again
            return passes * (self.stored_bytes(layer) + self.itemsize * layer.numel)
        rows, round_one = layer.tokens * batch_size, 2 * self.itemsize + 1  # read for the largest, read, and written
        finish = 2 * (4 if self.weights == "int8" else self.itemsize)  # sums are written, and read to be scaled
        forward = rows * (round_one * layer.inputs + finish * layer.outputs)
        backward = rows * (round_one * layer.outputs + finish * layer.inputs) + 2 * layer.numel
        return (passes - 1) * forward + backward
