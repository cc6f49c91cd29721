"""The frozen transformer's linear layers in fewer bits: int8 and fp8 by torch alone, nf4 by bitsandbytes.

A layer rounds its weight in the moment that it is loaded, so the whole transformer is never there in full precision. Quantised
are all linear layers of the blocks, modulation included: 20.38 of 20.43 billion weights. What is around the blocks stays: it
is 0.2 %, and everything goes through it.

Where the device multiplies 8-bit numbers, a layer's tokens are rounded too, row by row, and so is, in the backward pass, the
gradient of its output; elsewhere, and for nf4, one layer's weight at a time is widened for its product. Either way autograd
keeps nothing but the stored weight.
"""

import functools
import math
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from data_prep.errors import InputError

Weights = Literal["bf16", "fp8", "int8", "nf4"]
"""`bf16` leaves the weights as they are, whatever their dtype."""
BLOCKS = "transformer_blocks."
STORED = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "nf4": torch.uint8}
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
"""The largest value of each 8-bit format that is used."""
UNITS = {torch.float8_e4m3fn: (8, 9), torch.int8: (8, 0)}
"""CUDA's first compute capability whose matrix units multiply it."""
NF4_BLOCK = 64
"""Weights that share a scale, in the order of memory."""
SUMS_BYTES = 256 * 2**20
"""Memory for the sums of 8-bit products at a time: all of a picture of one megapixel."""
FEWEST_ROWS = 17
"""`torch._int_mm` takes no fewer on CUDA."""
UNIT_SIZE = 16
"""Inputs and outputs of a layer must be multiples of it for matrix units of 8 bits."""


class Rounded(NamedTuple):
    """Numbers in 8 bits; the real ones are values * scale."""

    values: Tensor
    """(…, in)."""
    scale: Tensor
    """One of each row, (…, 1), float32."""


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weight is rounded when it is loaded. To a state dict it is the layer that it replaces.

    Attributes:
        weight: int8 and fp8: (out, in), one scale for each output channel, weight = stored * scale. nf4: (out, in / 2), two
            numbers a byte, in blocks of 64 (Dettmers et al. 2023, arXiv 2305.14314).
        scale: (out,) float32; of nf4 each block's largest absolute value, (out * in / 64,) bfloat16.

    Args:
        like: the layer that it replaces; for nf4 with as many weights as whole blocks.
        weights: the format.
        dtype: data type of the bias, and of what the state dict has.
    """

    scale: Tensor

    def __init__(self, like: nn.Linear, weights: Literal["fp8", "int8", "nf4"], dtype: torch.dtype):
        rows, columns = like.weight.shape
        super().__init__(columns, rows, like.bias is not None, device="meta", dtype=dtype)
        self.dtype = dtype
        shape, scales = (rows, columns), torch.empty(rows, device="meta")
        if weights == "nf4":
            assert rows * columns % NF4_BLOCK == columns % 2 == 0, f"{rows} x {columns} is no whole number of blocks"
            shape = (rows, columns // 2)
            scales = torch.empty(rows * columns // NF4_BLOCK, device="meta", dtype=torch.bfloat16)
        self.weight = nn.Parameter(torch.empty(shape, device="meta", dtype=STORED[weights]), requires_grad=False)
        self.register_buffer("scale", scales, persistent=False)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)."""
        rounded = rounded_input(x, self) or (None, None)
        return quantized_linear(x, *rounded, self.weight, self.scale, self.bias)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if (weight := state_dict.get(f"{prefix}weight")) is not None:
            state_dict[f"{prefix}weight"], self.scale = round_weight(weight, self.weight.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = widened(self.weight, self.scale, self.dtype)


def quantize_blocks(dit: nn.Module, weights: Weights, dtype: torch.dtype) -> None:
    """Replaces the linear layers of the blocks of a transformer on the meta device, but for those that `mark_trained` names; they
    round the weights that they are given.

    The size of every parameter and buffer is afterwards what it will be when they are loaded.

    Args:
        dtype: data type of what is not quantised.
    """
    dit.to(dtype)
    if weights == "bf16":
        return
    for name, module in list(dit.named_modules()):
        if isinstance(module, nn.Linear) and name.startswith(BLOCKS) and not hasattr(module, "in_full"):
            dit.set_submodule(name, QuantizedLinear(module, weights, dtype))


def check_weights(weights: Weights, option: str = "model.weights") -> None:
    """Refuses a format whose package is not installed.

    Args:
        option: what the user calls it.

    Raises:
        InputError: names the package and how to get it.
    """
    if weights == "nf4" and find_spec("bitsandbytes") is None:
        raise InputError(f"{option}=nf4 needs the package bitsandbytes: pip install bitsandbytes")


@torch.compiler.assume_constant_result
def has_products(device: torch.device, stored: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether a layer's products are computed in 8 bits: by matrix units of NVIDIA's, beside bfloat16.

    On the meta device, where runs are planned for a GPU, they are.

    Args:
        stored: format of the weights.
        dtype: data type of the activations, and of the product.
    """
    if stored not in UNITS or dtype != torch.bfloat16 or device.type not in ("cuda", "meta"):
        return False
    return device.type == "meta" or (
        torch.version.hip is None and torch.cuda.get_device_capability(device) >= UNITS[stored]
    )


def describe_products(weights: Weights, device: torch.device, dtype: torch.dtype) -> str:
    """How a transformer of these weights is computed, in words."""
    name = str(dtype).removeprefix("torch.")
    if weights == "bf16":
        return f"{name} weights"
    if has_products(device, STORED[weights], dtype):
        return f"{weights} weights, multiplied in 8 bits: activations and their gradients are rounded too, row by row"
    return f"{weights} weights, dequantised to {name} layer by layer: nothing else is rounded"


def round_weight(weight: Tensor, stored: torch.dtype) -> tuple[Tensor, Tensor]:
    """A weight (out, in) as `QuantizedLinear` keeps it: its stored numbers and scales, where it is."""
    if stored != torch.uint8:
        values, scale = round_rows(weight, stored, scale_dtype=weight.dtype)
        return values, scale.flatten()
    import bitsandbytes  # noqa: F401  # an optional package, and importing it takes a second

    # Rows of one block: for the CPU, its routines give wrong numbers where rows are no multiple of a block.
    blocks = weight.reshape(-1, NF4_BLOCK)
    packed, largest = torch.ops.bitsandbytes.quantize_4bit(blocks, NF4_BLOCK, "nf4", torch.uint8)
    return packed.view(len(weight), -1), largest.to(torch.bfloat16)


def round_rows(
    numbers: Tensor, stored: torch.dtype, factor: Tensor | None = None, scale_dtype: torch.dtype = torch.float32
) -> Rounded:
    """Rounds each row (the last dimension) to 8 bits: its largest value becomes the largest of the format.

    As LLM.int8() does with both operands (Dettmers et al. 2022, arXiv 2208.07339, sec. 2.1).

    Args:
        factor: factor of each column, (in,); the numbers are multiplied by it first.
        scale_dtype: what the scale is rounded to before it is divided by, so that it can be used in that dtype at no loss. What
            is then beyond the largest value is so by less than half a step.
    """
    if factor is not None:
        numbers = numbers * factor  # in float32, which the factor is in
    largest = torch.linalg.vector_norm(numbers, math.inf, dim=-1, keepdim=True, dtype=torch.float32)
    scale = (largest / LARGEST[stored]).clamp_min(torch.finfo(torch.float32).tiny).to(scale_dtype).float()
    scaled = numbers / scale
    return Rounded((scaled.round() if stored == torch.int8 else scaled).to(stored), scale)


def rounded_input(x: Tensor, layer: nn.Linear) -> Rounded | None:
    """A layer's input (…, in) in 8 bits, or None where the layer multiplies by its widened weight.

    A vector for each sample, as the modulation's, is multiplied so: it would gain nothing, and all tokens depend on it.
    """
    stored = layer.weight.dtype
    if x.ndim < 3 or not fits_units(layer.in_features, layer.out_features):
        return None
    return round_rows(x.detach(), stored) if has_products(x.device, stored, x.dtype) else None


def fits_units(inputs: int, outputs: int) -> bool:
    """Whether a layer of these sizes can be multiplied in 8 bits."""
    return inputs % UNIT_SIZE == outputs % UNIT_SIZE == 0


def widened(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A stored weight in plain numbers, (out, in). Without a scale it is plain already."""
    if scale is None:
        return weight
    if weight.dtype != torch.uint8:
        return weight.to(dtype).mul_(scale.to(dtype)[:, None])
    shape = len(weight), 2 * weight.shape[1]
    if weight.is_meta:
        return weight.new_empty(shape, dtype=dtype)
    blocks = [weight.numel() * 2 // NF4_BLOCK, NF4_BLOCK]
    packed, largest = weight.view(-1, 1), scale.float()
    return torch.ops.bitsandbytes.dequantize_4bit(packed, largest, NF4_BLOCK, "nf4", blocks, dtype).view(shape)


def product(
    x: Tensor, rounded: Rounded | None, weight: Tensor, scale: Tensor | None, bias: Tensor | None, out: Tensor
) -> None:
    """out = x @ weight' + bias.

    Args:
        x: (tokens, in).
        rounded: the same in 8 bits; None to widen the weight.
        weight, scale: as of `QuantizedLinear`, or a plain weight and None.
        out: (tokens, out).
    """
    if rounded is not None:
        scaled_product(rounded, weight, scale, out, bias)
        return
    plain = widened(weight, scale, x.dtype)
    if bias is None:
        torch.mm(x, plain.t(), out=out)
    else:
        torch.addmm(bias, x, plain.t(), out=out)


def product_backward(
    gradient: Tensor, rounded: Rounded | None, weight: Tensor, scale: Tensor | None, out: Tensor, add: bool
) -> None:
    """out = gradient @ weight.

    Args:
        gradient: (tokens, out).
        rounded: the gradient times the weight's scale, in 8 bits; None to widen the weight.
        weight, scale: as of `product`.
        out: (tokens, in).
        add: out += that.
    """
    if rounded is not None:
        # The units read both factors along the summed dimension: 8 bits a weight are copied, and let go again.
        scaled_product(rounded, turned(weight), None, out, add=add)
    elif add:
        out.addmm_(gradient, widened(weight, scale, gradient.dtype))
    else:
        torch.mm(gradient, widened(weight, scale, gradient.dtype), out=out)


def scaled_product(
    a: Rounded, b: Tensor, scale: Tensor | None, out: Tensor, bias: Tensor | None = None, add: bool = False
) -> None:
    """out = a @ (scale * b)' + bias, by the units for 8 bits.

    All of a is multiplied without its scales, which the sums are multiplied by afterwards: units that take a scale for each
    row are those of few GPUs, and cuBLAS refuses some numbers of rows there (pytorch/ao#4582).

    Args:
        a: (rows, n).
        b: (columns, n), its rows one after the other in memory.
        scale: scale of each row of b, (columns,); None for 1, as of gradients.
        out: (rows, columns), contiguous.
        bias: (columns,), or None for 0.
        add: out += that.
    """
    values, row_scale = a
    sums_type = torch.int32 if b.dtype == torch.int8 else out.dtype
    step = max(FEWEST_ROWS, SUMS_BYTES // (sums_type.itemsize * len(b)))
    kernels = _kernels(out.device)
    finish = kernels.scale_sums if kernels else _scale_sums
    for rows, factors, target in zip(values.split(step), row_scale.split(step), out.split(step), strict=True):
        finish(_sums(rows, b, out.dtype, fast=scale is not None), factors, scale, bias, target, add)


def _sums(rows: Tensor, b: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    """rows @ b', of int8 in int32, of fp8 in `dtype`.

    Args:
        fast: fp8 is summed up in Hopper's faster registers, as torchao does it with outputs; gradients are summed in full.
    """
    if b.dtype == torch.int8:
        missing = FEWEST_ROWS - len(rows)
        padded = F.pad(rows, (0, 0, 0, missing)) if missing > 0 else rows  # padding by nothing would copy
        return torch._int_mm(padded, b.t())[: len(rows)]  # pyright: ignore
    one = _one(rows.device)
    return torch._scaled_mm(rows, b.t(), scale_a=one, scale_b=one, out_dtype=dtype, use_fast_accum=fast)  # pyright: ignore


@functools.cache
def _one(device: torch.device) -> Tensor:
    return torch.ones((), device=device)


@functools.cache
def _kernels(device: torch.device) -> Any:
    """Triton's kernels, which come with PyTorch for GPUs; None where operations follow one another instead."""
    if device.type != "cuda" or not find_spec("triton"):
        return None
    from train.model.layers import kernels

    return kernels


def _scale_sums(
    sums: Tensor, row_scale: Tensor, scale: Tensor | None, bias: Tensor | None, out: Tensor, add: bool
) -> None:
    """As `train.model.layers.kernels.scale_sums`, operation by operation."""
    numbers = sums * row_scale
    if scale is not None:
        numbers *= scale
    if bias is not None:
        numbers += bias
    out.copy_(numbers.add_(out) if add else numbers)


def turned(weight: Tensor) -> Tensor:
    """A stored weight of 8 bits (out, in) -> (in, out), contiguous."""
    kernels = _kernels(weight.device)
    return kernels.turned(weight) if kernels else weight.t().contiguous()


@torch.library.custom_op("qwen_edit::quantized_linear", mutates_args=())
def quantized_linear(
    x: Tensor, rounded: Tensor | None, row_scale: Tensor | None, weight: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """x @ weight' + bias of a `QuantizedLinear`, (…, out) in x's dtype.

    Args:
        x: (…, in).
        rounded, row_scale: of `rounded_input`.
    """
    output = x.new_empty(*x.shape[:-1], len(weight))
    product(flat(x), flat_rounded(rounded, row_scale), weight, scale, bias, output.view(-1, len(weight)))
    return output


@quantized_linear.register_fake
def _(x, rounded, row_scale, weight, scale, bias):
    return x.new_empty(*x.shape[:-1], len(weight))


@torch.library.custom_op("qwen_edit::quantized_linear_backward", mutates_args=())
def quantized_linear_backward(
    gradient: Tensor, rounded: Tensor | None, row_scale: Tensor | None, weight: Tensor, scale: Tensor, width: int
) -> Tensor:
    """The gradient of `quantized_linear`'s input, (…, width).

    Args:
        gradient: gradient of its output, (…, out).
        rounded, row_scale: the gradient times the weight's scale, in 8 bits.
    """
    d_x = gradient.new_empty(*gradient.shape[:-1], width)
    pair = flat_rounded(rounded, row_scale)
    product_backward(flat(gradient), pair, weight, scale, d_x.view(-1, width), add=False)
    return d_x


@quantized_linear_backward.register_fake
def _(gradient, rounded, row_scale, weight, scale, width):
    return gradient.new_empty(*gradient.shape[:-1], width)


def flat(x: Tensor) -> Tensor:
    """(…, in) -> (tokens, in)."""
    return x.reshape(-1, x.shape[-1])


def flat_rounded(values: Tensor | None, scale: Tensor | None) -> Rounded | None:
    """The same of both parts."""
    return None if values is None or scale is None else Rounded(flat(values), flat(scale))


def _save(ctx, inputs, output) -> None:
    x, rounded, _, weight, scale, _ = inputs
    ctx.save_for_backward(weight, scale)
    ctx.width, ctx.in_8_bits = x.shape[-1], rounded is not None


def _backward(ctx, gradient):
    weight, scale = ctx.saved_tensors
    gradient = gradient.contiguous()  # and so are its rounded rows, as the units want them
    rounded = round_rows(gradient, weight.dtype, scale) if ctx.in_8_bits else (None, None)
    d_x = quantized_linear_backward(gradient, *rounded, weight, scale, ctx.width)
    return d_x, None, None, None, None, None


quantized_linear.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.qwen_edit.quantized_linear)
def _forward_flops(x, rounded, row_scale, weight, *args, **kwargs) -> int:
    """2mkn of a product of m x k and k x n."""
    return 2 * math.prod(x) * weight[0]


@register_flop_formula(torch.ops.qwen_edit.quantized_linear_backward)
def _backward_flops(gradient, rounded, row_scale, weight, scale, width, *args, **kwargs) -> int:
    return 2 * math.prod(gradient) * width
