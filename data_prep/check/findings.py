"""What a measurement means: which findings a row has, how grave they are, and where the limits lie."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from data_prep.errors import InputError
from data_prep.model.geometry import Geometry, Size
from data_prep.rows.rows import RejectedRow, Row

Severity = Literal["error", "warning"]

ERRORS = {
    "row": "the dataset file's row cannot be used",
    "file": "a file cannot be used",
    "shift": "the target is moved against its source: the model would learn to move pictures",
    "zoom": "the target is larger or smaller than its source: the model would learn to zoom",
    "turned": "the target is turned or mirrored against its source: the model would learn to turn pictures",
    "identical": "source and target are the same picture, perhaps saved again: there is nothing to learn",
    "mask_polarity": "the mask is white where the picture changes; white means background to preserve",
    "mask_white": "the mask is white all over: nothing may change",
    "leak": "a training row shows what is held out",
}
"""Rows that must be fixed."""
WARNINGS = {
    "nearly_identical": "source and target can hardly be told apart: is there an edit to learn?",
    "duplicate": "the same pictures and prompt as another row",
    "near_duplicate": "nearly the same pictures as another row with this prompt",
    "mask_black": "the mask is black all over: there is no background to preserve",
    "mask_vanishes": "at the size that is trained the mask has no edit or no background left",
    "mask_grey": "the mask is mostly grey: is it a mask?",
    "mask_size": "the mask has another size than the target, and is resized",
    "aspect": "one side of the image is much longer than the other (--max-aspect)",
    "cropped": "the source has another aspect than the target, and is cropped to it",
    "upscaled": "the source is much smaller than the target that is trained, and is enlarged",
    "small": "the target is small, and is trained so, since nothing is enlarged: use a larger original, or leave the row out",
    "no_source": "no source: text to image, which flow matching trains and Latent Bridge Matching cannot",
    "long_prompt": "the prompt is very long (--max-tokens)",
    "converted": "a file is not used exactly as it is stored: nothing to do, if what was done to it is right",
}
"""What somebody should know of, and may be meant."""
KINDS = {**ERRORS, **WARNINGS}

MAX_CROPPED = 0.02
"""Fraction by which the aspects of source and target may differ."""
MIN_SCALE = 0.5
"""A source whose sides are under this fraction of the trained target's is enlarged out of recognition."""
GREY = 0.25
"""Share of a mask that may be neither black nor white: soft edges."""
FULL = 0.999
"""Share that counts as all of it."""
CHANGED, UNCHANGED = 0.1, 0.02
"""Share of the white that must have changed, and of the black that may have, for the polarity to be wrong."""


@dataclass(frozen=True)
class Limits:
    """From where on something is a finding."""

    geometry: Geometry
    """How training sizes images."""
    max_shift: float = 2.0
    """Pixels of the target as it is trained."""
    max_zoom: float = 1.0
    """Per cent."""
    min_side: int = 256
    """Pixels of a target's shorter side."""
    max_aspect: float = 4.0
    """Longer side over shorter."""
    max_tokens: int = 512
    """Most tokens of a prompt."""
    ignored: frozenset[str] = field(default_factory=frozenset)
    """Kinds that are none."""

    def __post_init__(self):
        for name in ("max_shift", "max_zoom", "min_side", "max_aspect", "max_tokens"):
            if not getattr(self, name) > 0:
                raise InputError(f"--{name.replace('_', '-')} must be above 0, got {getattr(self, name)}")
        choices = [kind for kind in KINDS if kind not in ("row", "file")]
        for kind in sorted(self.ignored.difference(choices)):
            raise InputError(f"no finding {kind!r} can be ignored: choose from {', '.join(choices)}")


@dataclass(frozen=True)
class Finding:
    """One thing to say about one row."""

    row: int
    """Number in the dataset file, from 1."""
    kind: str
    message: str
    id: str | None = None
    path: str | None = None
    """The file at fault, if it is one."""
    other_row: int | None = None
    """The other row that it is about."""
    weight: float = 0.0
    """How bad it is, within its kind."""

    @property
    def severity(self) -> Severity:
        """Severity of its kind."""
        return "error" if self.kind in ERRORS else "warning"


def judge_rejected(rejected: RejectedRow, row: Row | None) -> list[Finding]:
    """An unusable row: rejected from the dataset file itself, or (`row` is given) for one of its files."""
    kind = "row" if row is None else "file"
    return [Finding(rejected.number, kind, rejected.reason, row.id if row else rejected.id, rejected.path)]


def judge(row: Row, measured: dict[str, Any], limits: Limits) -> list[Finding]:
    """The findings of a row that can be read, but for those that other rows have a part in."""
    found: list[Finding] = []

    def add(kind: str, message: str, weight: float = 0.0, path: object = None) -> None:
        if kind not in limits.ignored:
            found.append(Finding(row.number, kind, message, row.id, str(path) if path else None, weight=weight))

    target, *sources = (Size(*size) for size in measured["sizes"])
    trained = limits.geometry.target_size(target)
    scale = max(trained.height / target.height, trained.width / target.width)
    _judge_likeness(measured, row, add)
    if measured["drift"] and measured["alike"] is None:
        _judge_drift(measured["drift"], scale, limits, add)
    if measured["mask"]:
        _judge_mask(measured["mask"], target, row, add)
    if not sources:
        add("no_source", "the row has no edit_image: it is text to image, which only loss=flow trains")
    turned = measured["turn"] in ("90", "270") and "turned" not in limits.ignored  # which says it already
    _judge_sizes(target, sources, trained, row, limits, add, turned)
    if measured["tokens"] > limits.max_tokens:
        add("long_prompt", f"the prompt has {measured['tokens']} tokens, over {limits.max_tokens}", measured["tokens"])
    for path, conversion in measured["conversions"]:
        add("converted", conversion, path=path)
    return found


def _judge_likeness(measured: dict[str, Any], row: Row, add: Any) -> None:
    match measured["alike"]:
        case "equal":
            add("identical", "source and target are the same picture", path=row.image)
        case "target_saved_again":
            add("identical", "the target is the source, saved again as a JPEG", path=row.image)
        case "source_saved_again":
            message = "the source is the target, saved again as a JPEG: right only if the edit is to undo that"
            add("nearly_identical", message, path=row.edit_image[row.bridge_image])
        case "nearly":
            add("nearly_identical", "source and target differ by no more than faint noise", path=row.image)
    if turn := measured["turn"]:
        how = "mirrored" if turn == "mirrored" else f"turned by {turn} degrees clockwise"
        why = "" if turn == "mirrored" else " (a program may have dropped the EXIF orientation of one)"
        add("turned", f"the target is {how} against its source: turn one of the files{why}", path=row.image)


def _judge_drift(drift: list[float], scale: float, limits: Limits, add: Any) -> None:
    x, y, zoom = drift[0] * scale, drift[1] * scale, 100 * drift[2]
    if (shift := math.hypot(x, y)) > limits.max_shift:
        add("shift", f"the target is shifted by {shift:.1f} pixels ({x:+.1f} across, {y:+.1f} down)", shift)
    if abs(zoom) > limits.max_zoom:
        add("zoom", f"the target is {abs(zoom):.1f} % {'larger' if zoom > 0 else 'smaller'} than its source", abs(zoom))


def _judge_mask(mask: dict[str, Any], target: Size, row: Row, add: Any) -> None:
    changed_white, changed_black = mask["changed_white"], mask["changed_black"]
    if mask["white"] >= FULL:
        add("mask_white", "the mask is white all over", path=row.back_mask)
    elif mask["black"] >= FULL:
        add("mask_black", "the mask is black all over", path=row.back_mask)
    elif 1 - mask["white"] - mask["black"] > GREY:
        share = 1 - mask["white"] - mask["black"]
        add("mask_grey", f"{share:.0%} of the mask are neither black nor white", share, row.back_mask)
    elif None not in (changed_white, changed_black) and changed_white >= CHANGED and changed_black <= UNCHANGED:
        message = f"{changed_white:.0%} of the mask's white change, and {changed_black:.0%} of its black"
        add("mask_polarity", message, changed_white, row.back_mask)
    elif mask["background_cells"] in (0, 1):
        side = "background" if mask["background_cells"] == 0 else "edit"
        message = f"no latent cell (8x8 pixels) of the trained picture is {side}"
        add("mask_vanishes", message, path=row.back_mask)
    if Size(*mask["size"]) != target:
        height, width = mask["size"]
        add("mask_size", f"{width}x{height}, the target is {target.width}x{target.height}", path=row.back_mask)


def _judge_sizes(
    target: Size, sources: list[Size], trained: Size, row: Row, limits: Limits, add: Any, turned: bool
) -> None:
    if min(target) < limits.min_side:
        message = (
            f"{target.width}x{target.height}, a side under {limits.min_side} pixels; it is trained at {trained.width}x"
            f"{trained.height}"
        )
        add("small", message, -min(target), row.image)
    for size, path in zip((target, *sources), (row.image, *row.edit_image), strict=True):
        if (aspect := max(size) / min(size)) > limits.max_aspect:
            add("aspect", f"{size.width}x{size.height}", aspect, path)
    if not sources:
        return
    source = sources[row.bridge_image]
    skew = abs(math.log(source.width * target.height / (source.height * target.width)))
    pair = f"the source is {source.width}x{source.height}, the target {target.width}x{target.height}"
    if skew > MAX_CROPPED and not turned:
        add("cropped", pair, skew, row.edit_image[row.bridge_image])
    covering = max(trained.height / source.height, trained.width / source.width)
    if covering > 1 / MIN_SCALE:
        add(
            "upscaled",
            f"{pair}, trained at {trained.width}x{trained.height}",
            covering,
            row.edit_image[row.bridge_image],
        )
