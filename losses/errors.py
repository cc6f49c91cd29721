"""The squared error that both objectives share."""

from torch import Tensor


def squared_error(predicted: Tensor, expected: Tensor, mask: Tensor | None = None, mask_weight: float = 1.0) -> Tensor:
    """Mean squared error per sample, (B,), float32.

    Args:
        predicted, expected: (B, C, h, w).
        mask: 1 on background, (B, 1, h, w), or None.
        mask_weight: how much background counts against 1 for the rest. The weights of a sample are normalised, so a sample
            with an empty mask is not changed.
    """
    error = (predicted.float() - expected.float()).square().mean(1)
    if mask is None or mask_weight == 1.0:
        return error.flatten(1).mean(1)
    weight = (1 + (mask_weight - 1) * mask[:, 0].float()).flatten(1)
    return (weight * error.flatten(1)).sum(1) / weight.sum(1).clamp_min(1e-6)
