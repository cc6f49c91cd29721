"""What a metric is and is given; and all that there are, in the order of tables, with unit and direction."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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


SSIM_SOURCE = "Wang et al. 2004, doi:10.1109/TIP.2003.819861"
PIE_SOURCE = "Ju et al. 2023, arXiv 2310.01506"
LPIPS_SOURCE = "Zhang et al. 2018, arXiv 1801.03924"
DRIFT_SOURCE = "windowed phase correlation, data_prep/check/measures/drift.py"
FACE_SOURCE = "King 2017, dlib's ResNet face embedding"
SHIFT, ZOOM = 1.0, 0.003
"""Pixels, and share of the size: a picture beyond one of them has drifted."""
NEUTRAL = "a photo"
"""What StyleGAN-NADA starts its direction at: a dataset's row has no caption of its source."""
_KINDS: dict[str, tuple[str, Literal["higher", "lower"], str, int, str]] = {
    "psnr": ("PSNR", "higher", "dB", 2, "10·log10(1 / MSE)"),
    "ssim": ("SSIM", "higher", "", 3, SSIM_SOURCE),
    "mse": ("MSE ×10³", "lower", "10⁻³", 2, "mean square of the difference of values in [0, 1], times 1000"),
}
_PARTS = {"": "", "_edited": " edited", "_background": " background"}


def _pixel_metrics() -> Iterator[Metric]:
    for pie in ("", "_pie"):
        for part, words in _PARTS.items():
            if pie and not part:
                continue
            for name, (label, better, unit, digits, citation) in _KINDS.items():
                against = "source" if pie and part == "_background" else "target"
                shown = f"{label}{words}{', PIE' if pie else ''}"
                yield Metric(
                    f"{name}{part}{pie}", shown, better, against, PIE_SOURCE if pie else citation, unit, digits
                )


_FAMILIES: dict[str, tuple[Metric, ...]] = {
    "pixels.Pixels": tuple(_pixel_metrics()),
    "registration.Registration": (
        Metric("drift_shift", "shift", "lower", "source", DRIFT_SOURCE, "px", 2),
        Metric("drift_zoom", "zoom", "lower", "source", DRIFT_SOURCE, "%", 2),
        Metric("drifted", "drifted", "lower", "source", f"beyond {SHIFT:g} px or {100 * ZOOM:g} %", "share", 2),
        Metric("drift_unknown", "not comparable", "lower", "source", DRIFT_SOURCE, "share", 2),
    ),
    "perceptual.Lpips": (Metric("lpips", "LPIPS", "lower", "target", f"{LPIPS_SOURCE}, AlexNet"),),
    "perceptual.LpipsPie": (
        Metric("lpips_background_pie", "LPIPS background, PIE", "lower", "source", f"{PIE_SOURCE}, SqueezeNet"),
    ),
    "perceptual.Dists": (Metric("dists", "DISTS", "lower", "target", "Ding et al. 2020, arXiv 2004.07728, VGG16"),),
    "clip.Clip": (
        Metric(
            *("clip_score", "CLIPScore", "higher", "instruction"),
            "100·max(cos(image, instruction), 0); Hessel et al. 2021, arXiv 2104.08718",
            digits=2,
        ),
        Metric(
            *("clip_direction", "CLIP direction, text", "higher", "instruction"),
            f"cos(picture − source, instruction − “{NEUTRAL}”); Gal et al. 2021, arXiv 2108.00946",
        ),
        Metric(
            *("clip_direction_target", "CLIP direction, target", "higher", "target"),
            "cos(picture − source, target − source); as Nguyen et al. 2023, arXiv 2307.14331",
        ),
        Metric("clip_i", "CLIP-I", "higher", "target", "cos(picture, target); Ruiz et al. 2022, arXiv 2208.12242"),
    ),
    "dino.Dino": (
        Metric("dino", "DINO", "higher", "target", "cos(picture, target); Ruiz et al. 2022, arXiv 2208.12242"),
        Metric(*("structure", "structure ×10³", "lower", "source"), f"Tumanyan et al. 2022; {PIE_SOURCE}", "10⁻³", 2),
    ),
    "identity.Identity": (
        Metric("identity", "face distance", "lower", "source", FACE_SOURCE),
        Metric("face_kept", "face found", "higher", "source", FACE_SOURCE, "share", 2),
    ),
    "fid.Fid": (Metric("fid", "FID", "lower", "target", "Heusel et al. 2017, arXiv 1706.08500", digits=2),),
}
"""By the class that measures them, as `module.Class` of this folder."""
METRICS: dict[str, Metric] = {
    metric.name: replace(metric, family=family) for family, metrics in _FAMILIES.items() for metric in metrics
}
"""By name."""
ALL = "all"
CAPTION = "psnr"
"""Always measured: it stands under every picture."""


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
