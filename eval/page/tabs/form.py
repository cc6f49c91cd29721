"""What a person chose on the page -> a request, and which choices a mode has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops

from data_prep.errors import InputError
from data_prep.model.geometry import Size
from data_prep.rows.images import file_digest, open_transparent
from data_prep.rows.rows import EMPTY_PROMPT
from eval.page.limits import Limits, read_picture
from eval.request.knobs import AdapterUse, Control, ControlName, Focus, ModeName
from eval.request.request import ASPECTS, CONTROLLED, DEFAULT_STRENGTHS, KEEPING, MASKED, WITH_STRENGTH, EditRequest
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
    "focus": "The edit stays inside a circle with a soft rim.",
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
BY_DEFAULT = "What suits the adapter"


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
    count = _whole(values["count"], "count", 1)
    if count > limits.max_count:
        raise InputError(f"at most {limits.max_count} pictures at once, got {count}")
    images = [read_picture(path, limits) for path in paths]
    request = EditRequest(
        prompt="" if mode == "variation" else values["prompt"].strip(),
        images=images,
        mode=mode,
        original=open_transparent(paths[0]) if mode in KEEPING else None,
        adapters=chosen_adapters(values["adapter"], values["weight"], adapters),
        negative_prompt=values["negative_prompt"] or EMPTY_PROMPT,
        mask=painted_mask(values["painting"], Size.of(images[0])) if mode in MASKED else None,
        feather=float(values["feather"]) if mode in MASKED else None,
        focus=_focus(values) if mode == "focus" else None,
        controls=_controls(values) if mode in CONTROLLED else (),
        steps=_whole(values["steps"], "steps") or None,
        cfg_scale=values["cfg_scale"] or None,
        strength=_strength(mode, values["strength"]),
        sampler=None if values["sampler"] == BY_DEFAULT else values["sampler"],
        sizing=None if values["geometry"] == BY_DEFAULT else values["geometry"],
        seed=_whole(values["seed"], "seed", 0),
        count=count,
        **_shape(values),
    )
    return Asked(request, [(Path(path).name, file_digest(path)) for path in paths])


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
    raise InputError(f"the adapter {name} is not there any more: look again with the button beside it")


def painted_mask(painting: Mapping[str, Any] | None, size: Size) -> Image.Image:
    """255 where a brush has been, in the source's size.

    Args:
        painting: the value of the paint box: `layers` are RGBA pictures with the strokes.
        size: of the source.

    Raises:
        InputError: nothing is painted.
    """
    layers = [layer.convert("RGBA").getchannel("A") for layer in (painting or {}).get("layers", [])]
    if not layers:
        raise InputError("paint over the part that may change: nothing is painted yet")
    mask = layers[0]
    for layer in layers[1:]:
        mask = ImageChops.lighter(mask, layer.resize(mask.size))
    mask = mask.resize((size.width, size.height), Image.Resampling.BILINEAR).point(lambda value: 255 * (value > 127))
    if mask.getbbox() is None:
        raise InputError("paint over the part that may change: nothing is painted yet")
    return mask


def _focus(values: Mapping[str, Any]) -> Focus:
    return Focus(float(values["focus_x"]), float(values["focus_y"]), float(values["focus_radius"]))


def _controls(values: Mapping[str, Any]) -> list[Control]:
    if not values["controls"]:
        raise InputError("choose at least one map: edges, lines or depth")
    return [Control(kind, float(values[f"{kind}_strength"])) for kind in CONTROL_NAMES if kind in values["controls"]]


def _strength(mode: ModeName, value: float) -> float | None:
    """None where the mode has none, and where it starts anew anyway."""
    if mode not in STRENGTHS or (STRENGTHS[mode] == 1 and value == 1):
        return None
    return float(value)


def _shape(values: Mapping[str, Any]) -> dict[str, Any]:
    if values["shape"] == AS_SOURCE:
        return {}
    if values["shape"] != EXACT:
        return {"aspect": values["shape"]}
    height, width = (_whole(values[name], name) for name in ("height", "width"))
    if not height or not width:
        raise InputError("give the width and the height, in multiples of 32")
    return {"size": Size(height, width)}


def _whole(value: float | None, name: str, default: int | None = None) -> Any:
    """A number field as an integer; an empty one is its default."""
    if value is None:
        return default
    if value != int(value):
        raise InputError(f"{name} must be a whole number, got {value:g}")
    return int(value)
