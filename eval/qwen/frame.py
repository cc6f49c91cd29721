"""A picture shown whole at a size whose sides are multiples of 32, which its own shape seldom is."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from data_prep.model.geometry import Size, fit
from eval.request.request import EditRequest


@dataclass(frozen=True)
class Frame:
    """The size that a model computes at, and the part in its middle that shows the picture."""

    size: Size
    """In multiples of 32."""
    inner: Size
    """Within `size`, and as large on at least one side. Equal to it, the picture covers all, and what stands out is cropped."""

    @classmethod
    def around(cls, picture: Size, size: Size) -> "Frame":
        """The largest part of `size` that has the picture's shape, to the nearest pixel."""
        scale = min(size.height / picture.height, size.width / picture.width)
        height, width = (max(1, round(side * scale)) for side in picture)
        return cls(size, Size(min(height, size.height), min(width, size.width)))

    @classmethod
    def of(cls, request: EditRequest, size: Size) -> "Frame":
        """Of a request's pictures.

        Args:
            size: at which the request is computed.
        """
        return cls.around(Size.of(request.images[0]), size) if shown_whole(request) else cls(size, size)

    @property
    def is_full(self) -> bool:
        """Whether nothing is left beside the picture."""
        return self.inner == self.size

    def place(self, image: Image.Image) -> Image.Image:
        """The image at `size`: reduced to the inner part (Lanczos) and continued by its mirror image beyond it."""
        return self._continued(fit(image, self.inner), "symmetric")

    def extend(self, mask: Image.Image) -> Image.Image:
        """A mask of the inner part (mode L) at `size`: it goes on as it is at its edge."""
        return self._continued(mask, "edge")

    def crop(self, image: Image.Image) -> Image.Image:
        """The inner part of an image of `size`."""
        if self.is_full:
            return image
        top, left = self._corner
        return image.crop((left, top, left + self.inner.width, top + self.inner.height))

    @property
    def _corner(self) -> tuple[int, int]:
        return (self.size.height - self.inner.height) // 2, (self.size.width - self.inner.width) // 2

    def _continued(self, image: Image.Image, mode: str) -> Image.Image:
        if self.is_full:
            return image
        gaps = [
            (before, whole - inner - before)
            for before, whole, inner in zip(self._corner, self.size, self.inner, strict=True)
        ]
        values = np.asarray(image)
        return Image.fromarray(np.pad(values, [*gaps, (0, 0)][: values.ndim], mode=mode))  # type: ignore[call-overload]


def shown_whole(request: EditRequest) -> bool:
    """Whether all of the first image is shown: the edit begins there, and no other shape is asked for."""
    return not (request.size or request.aspect or request.bridge_image)
