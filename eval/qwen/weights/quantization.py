"""The transformer's linear layers in fewer bits: int8 and fp8 by torch alone, nf4 by bitsandbytes.

Only weights are rounded; products are computed in the activations' dtype. A layer rounds its weight in the moment that it is
loaded, so the whole transformer is never there in full precision. Quantised are all linear layers of the blocks, modulation
included: 20.38 of 20.43 billion weights. What is around the blocks stays: it is 0.2 %, and all pictures go through it.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = "transformer_blocks."
STORED = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
"""The dtype, and its largest value that is used."""


class ScaledLinear(nn.Linear):
    """A linear layer of 8-bit weights with one scale for each output channel; weight = stored * scale.

    Args:
        like: the layer that it replaces.
        stored: what the weights are rounded to.
    """

    scale: Tensor

    def __init__(self, like: nn.Linear, stored: Literal["int8", "fp8"]):
        super().__init__(like.in_features, like.out_features, like.bias is not None, device="meta")
        self.requires_grad_(False)
        self.stored: Literal["int8", "fp8"] = stored
        self.register_buffer("scale", torch.empty(like.out_features, device="meta"), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        # 8-bit numbers are exact in bfloat16, so the scale may come after the product.
        product = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return product if self.bias is None else product + self.bias

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if (weight := state_dict.get(f"{prefix}weight")) is not None:
            state_dict[f"{prefix}weight"], self.scale = round_rows(weight, self.stored)
        super()._load_from_state_dict(state_dict, prefix, *args)


def round_rows(weight: Tensor, stored: Literal["int8", "fp8"]) -> tuple[Tensor, Tensor]:
    """Rounds a weight (out, in) -> (out, in) in 8 bits, and its scale (out,), in the weight's dtype.

    Each row's largest value becomes the largest number of the format, as in weight-only LLM.int8() (arXiv 2208.07339, sec. 2).
    """
    dtype, largest = STORED[stored]
    scale = weight.float().abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / largest
    scale = scale.to(weight.dtype)  # rounded before it is divided by, so that its own rounding costs nothing
    scaled = (weight.float() / scale.float()[:, None]).clamp(-largest, largest)
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale


def quantize_blocks(dit: nn.Module, weights: Literal["int8", "fp8", "nf4"], dtype: torch.dtype) -> None:
    """Replaces the linear layers of a transformer on the meta device; they round the weights that they are given.

    Args:
        dtype: in which nf4 layers compute.
    """
    for name, module in list(dit.named_modules()):
        if isinstance(module, nn.Linear) and name.startswith(BLOCKS):
            dit.set_submodule(name, _quantized(module, weights, dtype))


def _quantized(module: nn.Linear, weights: Literal["int8", "fp8", "nf4"], dtype: torch.dtype) -> nn.Linear:
    if weights != "nf4":
        return ScaledLinear(module, weights)
    from eval.qwen.weights.nf4 import NF4Linear  # an optional package, and importing it takes a second

    return NF4Linear(module, dtype)
