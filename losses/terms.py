"""What a loss returns."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class LossTerms:
    """Per-sample values; the loop takes the mean.

    Attributes:
        loss: what is optimised, importance weights included, (B,).
        logged: name -> detached values, (B,), without importance weights; NaN where a term does not apply to a sample.
    """

    loss: Tensor
    logged: dict[str, Tensor]
