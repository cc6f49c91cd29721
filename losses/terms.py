"""What a loss returns."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SIGMA_BINS = (0.25, 0.5, 0.75, 1.0)
"""Upper ends; each bin begins above the one before."""


@dataclass
class LossTerms:
    """Per-sample values; the loop takes the mean.

    Attributes:
        loss: what is optimised, importance weights included, (B,).
        logged: name -> detached values, (B,), without importance weights; NaN where a term does not apply to a sample.
    """

    loss: Tensor
    logged: dict[str, Tensor]


def by_sigma(name: str, values: Tensor, sigma: Tensor) -> dict[str, Tensor]:
    """`NAME/sigma_0.25` and so on: the values (B,) whose sigma (B,) lies in the bin that ends there, NaN elsewhere."""
    ends = torch.tensor(SIGMA_BINS, device=sigma.device)
    bins = torch.bucketize(sigma, ends).clamp_max(len(SIGMA_BINS) - 1)
    return {
        f"{name}/sigma_{end:g}": torch.where(bins == place, values, math.nan) for place, end in enumerate(SIGMA_BINS)
    }
