"""Linear layers in 4-bit NormalFloat (Dettmers et al. 2023, arXiv 2305.14314) by bitsandbytes."""

from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import Tensor, nn

BLOCK = 64
"""Weights that share a scale, in the order of memory."""


class NF4Linear(Linear4bit):
    """bitsandbytes' layer, which rounds the weight when it is loaded. 4.13 bits a weight, scales included.

    The weight is kept in rows of one block, and the product is that of the dequantised weight (as the library computes it for
    many tokens): its routines for the CPU give wrong numbers, or fail, where the inputs are not a multiple of a block.

    Args:
        like: the layer that it replaces; as many weights as whole blocks.
        dtype: in which it computes.
    """

    def __init__(self, like: nn.Linear, dtype: torch.dtype):
        assert like.weight.numel() % BLOCK == 0, f"{tuple(like.weight.shape)} is no whole number of blocks"
        bias = like.bias is not None
        super().__init__(like.in_features, like.out_features, bias, dtype, quant_type="nf4", device="meta")
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        packed: Any = self.weight
        weight = dequantize_4bit(packed.data, packed.quant_state).reshape(self.out_features, self.in_features)
        return F.linear(x, weight.to(x.dtype), self.bias)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if (weight := state_dict.pop(f"{prefix}weight", None)) is not None:
            make: Any = Params4bit  # its arguments are __new__'s, which the checker does not see
            packed = make(
                weight.reshape(-1, BLOCK), requires_grad=False, quant_type="nf4", blocksize=BLOCK, module=self
            )
            self.weight = packed.to(weight.device)  # where it is packed
        super()._load_from_state_dict(state_dict, prefix, *args)
