"""A form of OpenAI's image edits -> a request: their fields, and every knob of an edit under its own name."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from data_prep.errors import InputError
from data_prep.rows.images import file_digest, image_size_text, open_transparent
from eval.page.api.body import Body
from eval.page.api.refusals import Refusal
from eval.page.limits import Limits, TooLarge, read_alpha, read_picture
from eval.request.knobs import AdapterUse, split_weight
from eval.request.request import KEEPING, KNOBS, EditRequest
from train.record.lookup import FoundAdapter

IGNORED = ("user", "safety_identifier")
"""They say whose request it is, which changes no picture."""
FIXED = {
    "response_format": ("b64_json",),
    "output_format": ("png",),
    "background": ("auto", "opaque"),
    "quality": ("auto",),
    "moderation": ("auto",),
    "stream": ("false",),
    "partial_images": ("0",),
}
"""Fields of theirs whose other values this server has not: it answers with PNG files, which carry their settings."""
OURS = {each.name: each for each in KNOBS}
AUTO = "auto"


def make_request(
    body: Body, models: Mapping[str, FoundAdapter | None], standard: str, limits: Limits
) -> tuple[EditRequest, list[tuple[str, str]]]:
    """Reads the form.

    Args:
        models: name -> adapter of all that may be asked for; the base model's is None.
        standard: the name of the model that is used where the form names none.
        limits: what is accepted.

    Returns:
        The request, and name and digest of each file that it was made of.

    Raises:
        Refusal: 400 for a field that is missing, unknown or unreadable, 404 for an unknown model, 413 for a picture with too
            many pixels, 422 for values out of their range or that do not go together.
    """
    fields = {name: values for name, values in body.fields.items() if name not in IGNORED}
    _check_fixed(fields)
    named = _one(fields, "model")
    knobs = _knobs({name: values for name, values in fields.items() if name not in (*FIXED, "model", "n")})
    knobs["count"] = _count(fields, knobs, limits)
    knobs["adapters"] = _adapters(fields.get("adapter", []), named, models, standard)
    if "prompt" not in fields and knobs.get("mode") != "variation":
        raise Refusal(400, "prompt is missing: say what should change", "prompt", "missing_required_parameter")
    if not body.images:
        raise Refusal(
            400, "image is missing: send the picture to edit as a file", "image", "missing_required_parameter"
        )
    images = [_picture(path, limits) for path in body.images]
    mask = _mask(body.mask, images[0], limits) if body.mask else None
    knobs.setdefault("mode", "inpaint" if mask else "edit")
    original = open_transparent(body.images[0]) if knobs["mode"] in KEEPING else None
    try:
        request = EditRequest(**{"prompt": "", **knobs}, images=images, mask=mask, original=original)
    except InputError as error:
        raise Refusal(422, str(error), _field_of(str(error))) from None
    paths = [*body.images, *([body.mask] if body.mask else [])]
    return request, [(path.name, file_digest(path)) for path in paths]


def _check_fixed(fields: Mapping[str, list[str]]) -> None:
    known = {*FIXED, *OURS, "model", "n"}
    for name, values in fields.items():
        if name not in known:
            ours = ", ".join(sorted(OURS))
            raise Refusal(
                400, f"there is no parameter {name}; beside OpenAI's there are {ours}", name, "unknown_parameter"
            )
        if name in FIXED and (value := _one(fields, name)) not in FIXED[name]:
            taken = " or ".join(FIXED[name])
            raise Refusal(400, f"{name} must be {taken}, got {value!r}", name, "unsupported_value")
        if len(values) > 1 and not (name in OURS and OURS[name].several):
            raise Refusal(400, f"{name} is given {len(values)} times: give it once", name)


def _one(fields: Mapping[str, list[str]], name: str) -> str | None:
    """The value of a field; an empty one is as if it were not there."""
    values = fields.get(name)
    return values[0] if values and values[0] != "" else None


def _knobs(fields: Mapping[str, list[str]]) -> dict[str, Any]:
    """Fields of `EditRequest`, but for the adapters, which are found by name."""
    found: dict[str, Any] = {}
    for name, values in fields.items():
        knob = OURS[name]
        if name == "adapter" or values == [""] or (name == "size" and values == [AUTO]):
            continue
        try:
            parsed = [knob.parse(value) for value in values]
        except InputError as error:
            raise Refusal(422, str(error), name) from None
        except ValueError as error:
            wrong = {int: f"must be a whole number, got {values[0]!r}", float: f"must be a number, got {values[0]!r}"}
            raise Refusal(400, f"{name} {wrong.get(knob.type, str(error))}", name, "invalid_value") from None
        found[knob.field] = tuple(parsed) if knob.several else parsed[0]
    return found


def _count(fields: Mapping[str, list[str]], knobs: Mapping[str, Any], limits: Limits) -> int:
    """`n` is their name for it, `count` is ours."""
    text = _one(fields, "n")
    if text is not None and "count" in knobs:
        raise Refusal(400, "n and count are the same: give one of them", "n")
    try:
        count = int(text) if text is not None else knobs.get("count", 1)
    except ValueError:
        raise Refusal(400, f"n must be a whole number, got {text!r}", "n", "invalid_value") from None
    if not 1 <= count <= limits.max_count:
        raise Refusal(422, f"n must be from 1 to {limits.max_count}, got {count}", "n" if text else "count")
    return count


def _adapters(
    names: list[str], model: str | None, models: Mapping[str, FoundAdapter | None], standard: str
) -> list[AdapterUse]:
    """The adapters that `adapter` names, else the one that `model` is. Only found ones, never a path."""
    if model is not None and model not in models:
        raise Refusal(
            404, f"there is no model {model!r}: /v1/models lists those that are there", "model", "model_not_found"
        )
    names = [name for name in names if name]
    if names and model is not None and models[model]:
        raise Refusal(400, "model and adapter both name an adapter: give one of them", "adapter")
    uses = []
    for name, weight in map(split_weight, names or [model or standard]):
        if name not in models:
            told = f"there is no adapter {name!r}: /v1/models lists those that are there"
            raise Refusal(404, told, "adapter", "model_not_found")
        if not math.isfinite(weight):
            raise Refusal(422, f"the weight of {name} must be a number, got {weight}", "adapter")
        if adapter := models[name]:
            uses.append(AdapterUse(adapter.path, weight))
    return uses


def _picture(path: Path, limits: Limits) -> Image.Image:
    try:
        return read_picture(str(path), limits)
    except TooLarge as error:
        raise Refusal(413, str(error), "image") from None
    except InputError as error:
        raise Refusal(400, str(error), "image", "invalid_image") from None


def _mask(path: Path, image: Image.Image, limits: Limits) -> Image.Image:
    """255 where the edit may go: where the mask, as OpenAI's, is wholly transparent."""
    try:
        alpha = read_alpha(str(path), limits)
    except TooLarge as error:
        raise Refusal(413, str(error), "mask") from None
    except InputError as error:
        raise Refusal(400, str(error), "mask", "invalid_image") from None
    if alpha.size != image.size:
        sizes = f"it has {image_size_text(alpha)}, the image has {image_size_text(image)}"
        raise Refusal(400, f"the mask must have the first image's size: {sizes}", "mask", "invalid_image")
    mask = alpha.point(lambda value: 255 * (value == 0))
    if mask.getbbox() is None:
        raise Refusal(422, "the mask is transparent nowhere: the edit goes where its alpha is 0", "mask")
    return mask


def _field_of(message: str) -> str | None:
    """The field that a message begins with, if it is one."""
    word = message.partition(" ")[0].partition("=")[0]
    return next((each.name for each in KNOBS if word in (each.field, each.name)), None)
