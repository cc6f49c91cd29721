"""What a person chose on the page -> a request, and which choices a mode has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops

from data_prep.errors import InputError
from data_prep.model.geometry import Size
from data_prep.rows.images import file_digest, open_transparent
from eval.page.limits import Limits, read_picture
from eval.page.tabs.knob_fields import knob_value, whole
from eval.request.knobs import AdapterUse, Control, ControlName, Declared, Focus, ModeName
from eval.request.request import ASPECTS, DEFAULT_STRENGTHS, KEEPING, KNOBS, MASKED, WITH_STRENGTH, EditRequest
from train.record.lookup import FoundAdapter

MODE_NAMES: dict[ModeName, str] = {
    "edit": "Edit by instruction",
    "turbo": "Edit in few steps (turbo)",
    "inpaint": "Inpaint: only where you paint",
    "focus": "Focus: only inside a circle",
    "img2img": "Image to image: stay close to the source",
    "variation": "Variation: no instruction",
    "control": "Control: keep the lines or the depth",
    "control-inpaint": "Control and inpaint",
    "invert": "Invert: walk the source back, then edit",
}
MODE_HINTS: dict[ModeName, str] = {
    "edit": "Say what should change. The whole picture may.",
    "turbo": "For adapters that were made for 1 to 8 steps: Lightning and the like, and bridges.",
    "inpaint": "Paint over what may change. Every other pixel stays exactly as it is.",
    "focus": "The edit stays inside a circle with a feathered edge.",
    "img2img": "Starts from the partly noised source: less strength keeps more of it.",
    "variation": "The same picture again, a little different.",
    "control": "A map of the source tells the model where lines or surfaces are.",
    "control-inpaint": "A map of the source guides the edit, which stays where you paint.",
    "invert": "Finds the noise that the source comes from, and edits from there.",
}
STRENGTHS: dict[ModeName, float] = {mode: DEFAULT_STRENGTHS.get(mode, 1.0) for mode in WITH_STRENGTH}
"""Where a mode's strength slider begins; modes without one are not here. At 1 the edit starts anew."""
CONTROL_NAMES: dict[ControlName, str] = {"canny": "Edges (Canny)", "lines": "Lines, as drawn", "depth": "Depth"}

BASE_MODEL = "Base model, no adapter"
AS_SOURCE, EXACT = "As the source", "Exact size"
SHAPES = (AS_SOURCE, *ASPECTS, EXACT)
OPACITY = 0.55
"""Of the paint: what is under it stays visible."""


@dataclass(frozen=True)
class Asked:
    """A request and the files that it was made of."""

    request: EditRequest
    sources: list[tuple[str, str]]
    """Name and digest of each, for the picture's provenance."""


def make_request(values: Mapping[str, Any], adapters: Sequence[FoundAdapter], limits: Limits) -> Asked:
    """Reads the form. Nothing that another mode asks for is taken over.

    Args:
        values: name of a field -> what it holds; the names are those of `fields.build_form`.
        adapters: those that may be chosen, by name.
        limits: what is accepted.

    Raises:
        InputError: something is missing, or out of its range.
    """
    mode: ModeName = values["mode"]
    paths = [path for path in (values["source"], values["reference_1"], values["reference_2"]) if path]
    if not values["source"]:
        raise InputError("choose a source picture first")
    if mode != "variation" and not (values["prompt"] or "").strip():
        raise InputError("write an instruction: what should change?")
    if (values["count"] or 1) > limits.max_count:
        raise InputError(f"at most {limits.max_count} pictures at once, got {values['count']}")
    images = [read_picture(path, limits) for path in paths]
    found = {each.field: _value(each, values, mode, adapters) for each in KNOBS if mode in each.knob.modes}
    mask = painted_mask(values["painting"], Size.of(images[0])) if mode in MASKED else None
    original = open_transparent(paths[0]) if mode in KEEPING else None
    given = {name: value for name, value in found.items() if value is not None}
    request = EditRequest(images=images, mask=mask, original=original, **given)
    return Asked(request, [(Path(path).name, file_digest(path)) for path in paths])


def _value(each: Declared, values: Mapping[str, Any], mode: ModeName, adapters: Sequence[FoundAdapter]) -> Any:
    """A knob's value, of the one field or the several that the form has for it; None for the default."""
    if each.field == "prompt":
        return "" if mode == "variation" else values["prompt"].strip()
    if each.field == "adapters":
        return chosen_adapters(values["adapter"], values["weight"], adapters)
    if each.field == "focus":
        return Focus(*(float(values[f"focus_{part}"]) for part in ("x", "y", "radius")))
    if each.field == "controls":
        return _controls(values)
    if each.field == "strength":
        return _strength(mode, values["strength"])
    if each.field == "size":
        return _size(values) if values["shape"] == EXACT else None
    if each.field == "aspect":
        return values["shape"] if values["shape"] in ASPECTS else None
    return knob_value(each, values[each.field])


def chosen_adapters(name: str, weight: float, adapters: Sequence[FoundAdapter]) -> list[AdapterUse]:
    """The adapter of that name; only found ones can be chosen, never a path.

    Raises:
        InputError: there is none (any more).
    """
    if name == BASE_MODEL:
        return []
    for adapter in adapters:
        if adapter.name == name:
            return [AdapterUse(adapter.path, float(weight))]
    raise InputError(f"the adapter {name} is not there any more: press Refresh beside it")


def painted_mask(painting: Mapping[str, Any] | None, size: Size) -> Image.Image:
    """255 where a brush has been, in the source's size.

    Args:
        painting: the value of the paint box: `layers` are RGBA pictures with the strokes.
        size: of the source.

    Raises:
        InputError: nothing is painted.
    """
    alphas = [layer.convert("RGBA").getchannel("A") for layer in (painting or {}).get("layers", [])]
    layers = [alpha.point(lambda value: min(255, round(value / OPACITY))) for alpha in alphas]
    if not layers:
        raise InputError("paint over the part that may change: nothing is painted yet")
    mask = layers[0]
    for layer in layers[1:]:
        mask = ImageChops.lighter(mask, layer.resize(mask.size))
    mask = mask.resize((size.width, size.height), Image.Resampling.BILINEAR).point(lambda value: 255 * (value > 127))
    if mask.getbbox() is None:
        raise InputError("paint over the part that may change: nothing is painted yet")
    return mask


def _controls(values: Mapping[str, Any]) -> list[Control]:
    if not values["controls"]:
        raise InputError("choose at least one map: edges, lines or depth")
    return [Control(kind, float(values[f"{kind}_strength"])) for kind in CONTROL_NAMES if kind in values["controls"]]


def _strength(mode: ModeName, value: float) -> float | None:
    """None where the mode has none, and where it starts anew anyway."""
    if mode not in STRENGTHS or (STRENGTHS[mode] == 1 and value == 1):
        return None
    return float(value)


def _size(values: Mapping[str, Any]) -> Size:
    if not values["width"] or not values["height"]:
        raise InputError("give the width and the height, in multiples of 32")
    return Size(whole(values["height"], "height"), whole(values["width"], "width"))
