"""Features that several metrics and methods ask for are computed once."""

from collections.abc import Callable
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from data_prep.model.geometry import to_image
from eval.scores.metrics.metric import Example

Role = Literal["prediction", "target", "source"]
KEPT = 256


class Features:
    """Features of an example's pictures; those of source and target serve every method of a row.

    Args:
        compute: a picture -> its features.
    """

    def __init__(self, compute: Callable[[Image.Image], Tensor]):
        self.compute = compute
        self._known: dict[tuple, Tensor] = {}

    def __call__(self, example: Example, role: Role) -> Tensor:
        """Of one of its pictures, on the CPU."""
        pixels: Tensor = getattr(example, role)
        if role == "prediction":
            return self._of(pixels)
        key = (example.id, role, *pixels.shape)  # a file cut to a size is always the same picture
        if key not in self._known:
            if len(self._known) >= KEPT:
                self._known.clear()
            self._known[key] = self._of(pixels)
        return self._known[key]

    def _of(self, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return self.compute(to_image(pixels * 2 - 1)).float().cpu()


def cosine(one: Tensor, other: Tensor) -> float | None:
    """The cosine of the angle between vectors (D,), in [-1, 1]; None where one has no direction."""
    if min(one.norm(), other.norm()) == 0:
        return None
    return float(cosine_similarity(one.double(), other.double(), dim=0))
