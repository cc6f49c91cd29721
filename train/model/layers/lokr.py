"""LoKr: what is added to a frozen linear layer's weight is a Kronecker product (Yeh et al. 2024, arXiv 2309.14859).

    W + scale * kron(w1, w2)        w1: (out / k, in / n), w2: (k, n); w2, and w1 if asked for, may be products of a small rank

PEFT makes the whole product, as large as W and in float32, in every forward pass. Here the input is multiplied by the factors,
one after the other, in its own dtype: kron(w1, w2) x = w1 X w2' for x as a matrix X of in / n rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoKrConfig
from peft.tuners.lokr import Linear as PeftLokr
from torch import Tensor, nn

LEFT, RIGHT = "lokr_w1", "lokr_w2"
NAMES = tuple(f"{factor}{part}" for factor in (LEFT, RIGHT) for part in ("", "_a", "_b"))
"""A factor's name in files where it is one matrix; `_a` and `_b` where it is a product."""

Factor = tuple[Tensor, ...]
"""One matrix, or two whose product it is: (rows, rank) and (rank, columns)."""


@dataclass(frozen=True)
class Kronecker:
    """kron(w1, w2)."""

    left: Factor
    """w1, with the scale in its first matrix."""
    right: Factor
    """w2."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the product, (out, in)."""
        return len(self.left[0]) * len(self.right[0]), self.left[-1].shape[1] * self.right[-1].shape[1]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.left, *self.right))

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "Kronecker":
        """The same on a device, and in a dtype."""
        left, right = (tuple(t.to(device, dtype) for t in factor) for factor in (self.left, self.right))
        return Kronecker(left, right)

    def scaled(self, scale: float) -> "Kronecker":
        """The product times a number."""
        return self if scale == 1 else Kronecker((self.left[0] * scale, *self.left[1:]), self.right)

    def weight(self) -> Tensor:
        """The product itself, (out, in)."""
        return torch.kron(_matrix(self.left), _matrix(self.right))


def _matrix(factor: Factor) -> Tensor:
    return factor[0] if len(factor) == 1 else factor[0] @ factor[1]


def kronecker_product(x: Tensor, left: Factor, right: Factor) -> Tensor:
    """kron(w1, w2) times each vector, (…, in) -> (…, out). Where w2 is a product, w1 comes between its two, where it is cheap."""
    hidden = F.linear(x.unflatten(-1, (left[-1].shape[1], right[-1].shape[1])), right[-1])
    hidden = _matrix(left) @ hidden
    return (hidden if len(right) == 1 else F.linear(hidden, right[0])).flatten(-2)


class LokrLinear(PeftLokr):
    """PEFT's LoKr layer with products in the input's dtype; weights, configuration and files are PEFT's.

    Attributes:
        idle: the frozen layer computes alone.
    """

    idle: bool = False

    def named_factors(self) -> dict[str, nn.Parameter]:
        """What is trained, by its name: float32, without the scale."""
        return {name: getattr(self, name)["default"] for name in NAMES if "default" in getattr(self, name)}

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """(…, in) -> (…, out)."""
        if self.idle:
            return self.base_layer(x)
        named = self.named_factors().items()
        left, right = (tuple(w.to(x.dtype) for name, w in named if name.startswith(side)) for side in (LEFT, RIGHT))
        return self.base_layer(x) + self.scaling["default"] * kronecker_product(x, left, right)


class KroneckerBeside(nn.Module):
    """A linear layer of any kind, and a fixed Kronecker product added to what it computes.

    Args:
        base_layer: (…, in) -> (…, out).
        product: in the dtype that is computed in, on the layer's device.
    """

    def __init__(self, base_layer: nn.Module, product: Kronecker):
        super().__init__()
        self.base_layer = base_layer
        self.left, self.right = (
            nn.ParameterList(nn.Parameter(weight, requires_grad=False) for weight in factor)
            for factor in (product.left, product.right)
        )
        self.in_features, self.out_features = product.shape[1], product.shape[0]

    @property
    def weight(self) -> Tensor:
        """The layer's own, whose dtype and device are asked for."""
        return self.base_layer.weight  # pyright: ignore[reportReturnType]

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)."""
        return self.base_layer(x) + kronecker_product(x, tuple(self.left), tuple(self.right))


def lokr_shapes(out: int, width: int, rank: int, decompose_both: bool, factor: int) -> dict[str, tuple[int, ...]]:
    """The shapes of what is trained of a linear layer, by name, as PEFT makes them: a factor is a product of this rank only where
    the rank is below half its longer side.

    Args:
        out, width: of the layer.
        factor: the shorter side of w1, where it divides the layer's; -1: near the square root.
    """
    config = lokr_config(rank, decompose_both, factor)
    with torch.device("meta"):
        layer = LokrLinear(nn.Linear(width, out), "default", config, r=rank, alpha=rank)
    return {name: tuple(weight.shape) for name, weight in layer.named_factors().items()}


def lokr_products(out: int, width: int, *sizes: Any) -> int:
    """Multiplications for one vector, as `kronecker_product` makes them; arguments as of `lokr_shapes`."""
    shapes = lokr_shapes(out, width, *sizes)
    rows, columns = shapes.get(LEFT) or (shapes[f"{LEFT}_a"][0], shapes[f"{LEFT}_b"][1])
    if RIGHT in shapes:
        return shapes[RIGHT][0] * (width + rows * columns)
    return shapes[f"{RIGHT}_b"][0] * (width + rows * columns + out)


def lokr_config(rank: int, decompose_both: bool, decompose_factor: int, **options: Any) -> LoKrConfig:
    """PEFT's configuration: w1 starts at random and w2 at zero, as in LyCORIS and as LoRA's A and B do."""
    return LoKrConfig(
        r=rank,
        decompose_both=decompose_both,
        decompose_factor=decompose_factor,
        init_weights="lycoris",
        **options,
    )
