"""A frozen linear layer with its low-rank branch as one operation: products in the model's dtype, gradients in float32.

PEFT computes the branch in float32 beside a bf16 layer: the casts and sums cost as much as the frozen product. Here the
branch is added into the frozen product's output, and layers that read the same input read it once.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from train.model.quantize import (
    QuantizedLinear,
    flat,
    flat_rounded,
    product,
    product_backward,
    round_rows,
    rounded_input,
)


class WorkingCopies(NamedTuple):
    """A layer's LoRA weights in the model's dtype, detached."""

    down: Tensor
    """(rank, in), a part of `stack`."""
    up: Tensor
    """(out, rank)."""
    stack: Tensor
    """The downs of all layers that read the same input, one below the other, (sum of ranks, in)."""


class LoraLinear(PeftLinear):
    """PEFT's LoRA layer with products in the input's dtype; weights, configuration and files are PEFT's.

    PEFT's forward is used for what it alone can do: DoRA, dropout, several or disabled adapters.

    Attributes:
        copies: what to multiply by instead of a cast of the weights; whoever sets them keeps them up to date.
        idle: the frozen layer computes alone.
    """

    copies: WorkingCopies | None = None
    idle: bool = False

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """(…, in) -> (…, out)."""
        if self.idle:
            return self.base_layer(x)
        return linear(x, self)[0] if is_plain(self) else super().forward(x, *args, **kwargs)


def is_plain(layer: Any) -> bool:
    """Whether a layer is a LoRA layer that computes `base(x) + scale * up(down(x))` and nothing else."""
    return (
        isinstance(layer, LoraLinear)
        and not layer.idle
        and not layer.disable_adapters
        and not layer.merged_adapters
        and layer.active_adapters == ["default"]
        and not layer.lora_variant
        and isinstance(layer.lora_dropout["default"], nn.Identity)
    )


def has_its_weights(layer: Any) -> bool:
    """Whether the frozen layer can be multiplied without being called."""
    return type(layer.base_layer) in (nn.Linear, QuantizedLinear)


def linear(x: Tensor, *layers: Any) -> list[Tensor]:
    """The outputs of linear layers, with or without LoRA, that read the same input (…, in): each (…, out)."""
    if not all(is_plain(layer) and has_its_weights(layer) for layer in layers):
        if len(layers) != 1:
            return [linear(x, layer)[0] for layer in layers]
        layer = layers[0]
        return [_beside(x, layer) if is_plain(layer) else layer(x)]
    downs = [layer.lora_A["default"].weight for layer in layers]
    ups = [layer.lora_B["default"].weight for layer in layers]
    copies = [layer.copies for layer in layers if layer.copies is not None]
    shared = len(copies) == len(layers) and all(copy.stack is copies[0].stack for copy in copies)
    if shared and len(copies[0].stack) == sum(len(copy.down) for copy in copies):
        stack, work_ups = copies[0].stack, [copy.up for copy in copies]
    else:
        stack = torch.cat([down.detach() for down in downs]).to(x.dtype)
        work_ups = [up.detach().to(x.dtype) for up in ups]
    bases = [layer.base_layer for layer in layers]
    *outputs, _ = low_rank_linear(
        x,
        *(rounded_input(x, bases[0]) or (None, None)),  # whose weights have one format
        [base.weight for base in bases],
        [getattr(base, "scale", None) for base in bases],
        [base.bias for base in bases],
        downs,
        ups,
        [float(layer.scaling["default"]) for layer in layers],
        stack,
        work_ups,
    )
    return outputs


def _beside(x: Tensor, layer: Any) -> Tensor:
    """The branch beside a frozen layer that must be called."""
    down, up = layer.lora_A["default"].weight.to(x.dtype), layer.lora_B["default"].weight.to(x.dtype)
    return layer.base_layer(x) + layer.scaling["default"] * F.linear(F.linear(x, down), up)


def give_copies(groups: Iterable[Sequence[Any]], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Gives layers working copies, which are empty.

    Args:
        groups: layers that read the same input stand together.

    Returns:
        The copies, and the weights that must be copied into them.
    """
    copies, weights = [], []
    for group in groups:
        downs = [layer.lora_A["default"].weight for layer in group]
        stack = torch.empty(sum(map(len, downs)), downs[0].shape[1], dtype=dtype, device=downs[0].device)
        for layer, down in zip(group, stack.split([len(down) for down in downs]), strict=True):
            up = torch.empty_like(layer.lora_B["default"].weight, dtype=dtype, requires_grad=False)
            layer.copies = WorkingCopies(down, up, stack)
            copies += [down, up]
            weights += [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    return copies, weights


@torch.library.custom_op("qwen_edit::low_rank_linear", mutates_args=())
def low_rank_linear(
    x: Tensor,
    rounded: Tensor | None,
    row_scale: Tensor | None,
    weights: Sequence[Tensor],
    weight_scales: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float],
    stack: Tensor,
    work_ups: Sequence[Tensor],
) -> list[Tensor]:
    """y_i = x @ weight_i' + bias_i + scale_i * (x @ down_i') @ up_i', in x's dtype.

    Args:
        x: (…, in).
        rounded, row_scale: x in 8 bits, from `rounded_input`, for products in 8 bits.
        weights: frozen, (out_i, in) in x's dtype, or as a `QuantizedLinear` has them, with `weight_scales`.
        weight_scales: None of plain weights.
        biases: (out_i,) or None, in x's dtype.
        downs, ups: trained, (rank_i, in) and (out_i, rank_i), float32; known as A and B. They only receive the gradients.
        scales: alpha / rank.
        stack: all down_i in x's dtype, one below the other, (sum of ranks, in).
        work_ups: all up_i in x's dtype.

    Returns:
        Each y_i, (…, out_i), and x @ stack', (tokens, sum of ranks), which the backward pass needs.
    """
    tokens, tokens_rounded = flat(x), flat_rounded(rounded, row_scale)
    hidden = tokens @ stack.t()
    outputs = []
    for weight, weight_scale, bias, up, scale, part in zip(
        weights, weight_scales, biases, work_ups, scales, _columns(hidden, work_ups), strict=True
    ):
        outputs.append(x.new_empty(*x.shape[:-1], len(up)))
        output = outputs[-1].view(-1, len(up))
        product(tokens, tokens_rounded, weight, weight_scale, bias, output)
        output.addmm_(part, up.t(), alpha=scale)
    return [*outputs, hidden]


@low_rank_linear.register_fake
def _(x, rounded, row_scale, weights, weight_scales, biases, downs, ups, scales, stack, work_ups):
    tokens = x.numel() // x.shape[-1]
    return [*(x.new_empty(*x.shape[:-1], len(up)) for up in ups), x.new_empty(tokens, len(stack))]


@torch.library.custom_op("qwen_edit::low_rank_linear_backward", mutates_args=())
def low_rank_linear_backward(
    gradients: Sequence[Tensor],
    rounded: Sequence[Tensor],
    row_scales: Sequence[Tensor],
    x: Tensor,
    hidden: Tensor,
    weights: Sequence[Tensor],
    weight_scales: Sequence[Tensor | None],
    stack: Tensor,
    ups: Sequence[Tensor],
    scales: Sequence[float],
    input_gradient: bool,
) -> list[Tensor]:
    """The gradients of `low_rank_linear`'s trained weights, summed over tokens in float32, and of its input.

    Args:
        gradients: gradients of each y_i, (…, out_i).
        rounded, row_scales: of each the gradient times the weight's scale, in 8 bits; empty for products with widened weights.
        ups: in x's dtype.
        input_gradient: whether the gradient of x is wanted.

    Returns:
        Of all down_i, one below the other (sum of ranks, in), of each up_i (out_i, rank_i), float32, and, if wanted, of x.
    """
    tokens, flats = flat(x), [flat(gradient) for gradient in gradients]
    behind = torch.empty_like(hidden)  # the gradient of hidden
    d_ups = []
    for gradient, up, scale, part, slot in zip(
        flats, ups, scales, _columns(hidden, ups), _columns(behind, ups), strict=True
    ):
        torch.addmm(slot, gradient, up, beta=0, alpha=scale, out=slot)
        d_up = _float_product(gradient.t(), part)
        d_ups.append(d_up if scale == 1 else d_up.mul_(scale))
    results = [_float_product(behind.t(), tokens), *d_ups]
    if input_gradient:
        results.append(x.new_empty(x.shape))
        d_x = results[-1].view(tokens.shape)
        torch.mm(behind, stack, out=d_x)
        pairs = [*map(flat_rounded, rounded, row_scales)] or [None] * len(flats)
        for gradient, pair, weight, weight_scale in zip(flats, pairs, weights, weight_scales, strict=True):
            product_backward(gradient, pair, weight, weight_scale, d_x, add=True)
    return results


@low_rank_linear_backward.register_fake
def _(gradients, rounded, row_scales, x, hidden, weights, weight_scales, stack, ups, scales, input_gradient):
    wide = torch.promote_types(x.dtype, torch.float32)
    first = x.new_empty(len(stack), x.shape[-1], dtype=wide)
    return [
        first,
        *(torch.empty_like(up, dtype=wide) for up in ups),
        *([x.new_empty(x.shape)] if input_gradient else []),
    ]


def _columns(hidden: Tensor, ups: Sequence[Tensor]) -> Sequence[Tensor]:
    """Each layer's part of (tokens, sum of ranks)."""
    return hidden.split([up.shape[1] for up in ups], dim=1)


def _float_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, at least in float32, which is what matrix units sum in anyway."""
    if a.dtype.itemsize >= 4:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _save(ctx, inputs, output) -> None:
    x, rounded, _, weights, weight_scales, biases, downs, _, scales, stack, work_ups = inputs
    ctx.save_for_backward(x, output[-1], stack, *weights, *weight_scales, *work_ups)
    ctx.scales, ctx.ranks, ctx.in_8_bits = scales, [len(down) for down in downs], rounded is not None
    ctx.no_scales, ctx.no_biases = _no_gradients(weight_scales), _no_gradients(biases)


def _no_gradients(tensors: Sequence[Tensor | None]) -> list[None] | None:
    """As autograd wants it of a list that may hold None."""
    return None if any(each is None for each in tensors) else [None] * len(tensors)


def _backward(ctx, gradients):
    x, hidden, stack, *rest = ctx.saved_tensors
    count, wanted = len(ctx.scales), ctx.needs_input_grad[0]
    weights, weight_scales, ups = rest[:count], rest[count : 2 * count], rest[2 * count :]
    outputs = [
        x.new_zeros(*x.shape[:-1], len(up)) if gradient is None else gradient.contiguous()
        for gradient, up in zip(gradients[:-1], ups, strict=True)
    ]
    pairs = []
    if ctx.in_8_bits and wanted:  # here and not in the operation, so that the compiler makes one pass of it
        pairs = [round_rows(g, w.dtype, s) for g, w, s in zip(outputs, weights, weight_scales, strict=True)]
    rounded, row_scales = [pair.values for pair in pairs], [pair.scale for pair in pairs]
    d_stack, *d_ups = low_rank_linear_backward(
        outputs, rounded, row_scales, x, hidden, weights, weight_scales, stack, ups, ctx.scales, wanted
    )
    d_x = d_ups.pop() if wanted else None
    none, d_downs = [None] * count, list(d_stack.split(ctx.ranks))
    return d_x, None, None, none, ctx.no_scales, ctx.no_biases, d_downs, d_ups, None, None, none


low_rank_linear.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.qwen_edit.low_rank_linear)
def _forward_flops(x, rounded, row_scale, weights, weight_scales, biases, downs, ups, *args, **kwargs) -> int:
    """2mkn for each product of m x k and k x n."""
    return 2 * math.prod(x[:-1]) * sum(_sizes(x, downs, ups))


@register_flop_formula(torch.ops.qwen_edit.low_rank_linear_backward)
def _backward_flops(
    gradients,
    rounded,
    row_scales,
    x,
    hidden,
    weights,
    weight_scales,
    stack,
    ups,
    scales,
    input_gradient,
    *args,
    **kwargs,
) -> int:
    """The same products for the input, and one more for each trained weight's own gradient."""
    frozen, down, up = _sizes(x, [stack], ups)
    return 2 * math.prod(x[:-1]) * (down + 2 * up + (frozen + down if input_gradient else 0))


def _sizes(x: Sequence[int], downs: Sequence[Sequence[int]], ups: Sequence[Sequence[int]]) -> tuple[int, int, int]:
    """Of all frozen weights, all A and all B, from the shapes of x, A and B: how the frozen ones are stored is no matter."""
    return x[-1] * sum(up[0] for up in ups), sum(map(math.prod, downs)), sum(map(math.prod, ups))
