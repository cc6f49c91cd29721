"""What a metric is, and what it is given."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from data_prep.errors import InputError

if TYPE_CHECKING:  # the list of metrics is part of a help text
    from torch import Tensor

CLIP, DINO = "openai/clip-vit-large-patch14", "facebook/dino-vitb8"
Scores = dict[str, float]


class Unavailable(Exception):
    """A metric's weights cannot be had here. The message says which, and where they may be put."""


@dataclass(frozen=True)
class Metric:
    """What is to be known of a number beside the number."""

    name: str
    """In files and options: `psnr_background`."""
    label: str
    """In tables."""
    better: Literal["higher", "lower"]
    against: Literal["target", "source", "instruction"]
    """What the picture is compared with."""
    citation: str
    unit: str = ""
    digits: int = 3
    """Shown after the point."""
    family: str = ""
    """The class that measures it, as `module.Class` of this folder."""


@dataclass(frozen=True)
class Example:
    """One picture and all that it can be compared with. Pixels are RGB in [0, 1], shape (3, H, W), all of one size."""

    id: str
    prompt: str
    """The instruction."""
    method: str
    """`steps_4`, or `source` for the source unchanged."""
    prediction: "Tensor"
    target: "Tensor"
    source: "Tensor"
    background: "Tensor | None" = None
    """True where the picture must stay as it was, (H, W); None for a row without a mask."""


class Family(Protocol):
    """Metrics that share a model, or need none."""

    def __call__(self, example: Example) -> Scores:
        """The scores by metric's name; without those that have no meaning for this picture."""
        ...


class SetFamily(Protocol):
    """Metrics of a whole set of pictures."""

    def add(self, example: Example) -> None:
        """Takes a picture into its method's set."""
        ...

    def result(self, method: str) -> Scores:
        """The scores of a method's set.

        Raises:
            Unavailable: there are too few pictures.
        """
        ...


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def check_names(names: Sequence[str], known: Sequence[str]) -> None:
    """Refuses metrics that there are not.

    Raises:
        InputError: a name is not known.
    """
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"there is no metric {unknown[0]!r}; there are: {', '.join(known)}")
