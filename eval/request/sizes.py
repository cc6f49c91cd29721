"""The sizes of images that a command line sets, on top of those that an adapter or a base brings."""

from dataclasses import asdict, dataclass, replace

from data_prep.errors import InputError
from data_prep.model.geometry import Geometry
from eval.request.request import MAX_PIXELS


@dataclass(frozen=True)
class SizeLimits:
    """What takes the place of a geometry's own numbers; None leaves one.

    Raises:
        InputError: a size is too small or too large.
    """

    max_pixels: int | None = None
    """Largest area of a result."""
    vision_pixels: int | None = None
    """Area that the text encoder sees."""

    def __post_init__(self):
        for name, value in asdict(self).items():
            if value is not None and value > MAX_PIXELS:
                raise InputError(f"{name} must be at most {MAX_PIXELS:,}, got {value:,}")
        try:
            self.applied_to(Geometry(max_pixels=1024**2))
        except ValueError as error:
            raise InputError(str(error)) from error

    def applied_to(self, geometry: Geometry) -> Geometry:
        """The geometry with these numbers."""
        return replace(geometry, **{name: value for name, value in asdict(self).items() if value is not None})


NO_LIMITS = SizeLimits()
