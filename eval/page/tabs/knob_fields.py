"""A field of the form for a knob of an edit, and what it holds as the request's value.

Label, help, range and choices are those of the one table of knobs.
"""

from typing import Any, get_args

import gradio as gr
from gradio.components import Component

from data_prep.errors import InputError
from eval.page.studio import Unstubbed
from eval.request.knobs import Declared
from eval.request.request import KNOBS

AUTOMATIC = "automatic"
"""The choice, and the placeholder, that leave a value to the adapter or the mode."""
BY_FIELD = {each.field: each for each in KNOBS}
"""The table, by the request's fields."""


class NumberInput(gr.Number, metaclass=Unstubbed):
    """A number that reaches the handler as it was typed: `Knob.check` answers with the name of what is out of range, which
    `gr.Number` would round, or refuse without a name."""

    is_template = True

    def preprocess(self, payload: float | None) -> float | None:
        """What was typed; an empty field is None, or 0 if nobody has been in it."""
        return payload


def knob_field(name: str, value: Any = None, **own: Any) -> Component:
    """The field for one value.

    Args:
        name: field of the request.
        value: that it begins with; None for one that is left to the adapter or the mode.
        own: the component's further arguments.
    """
    each = BY_FIELD[name]
    words: dict[str, Any] = {"label": each.label, "info": _help(each, value), "elem_id": name.replace("_", "-")} | own
    if choices := get_args(each.type):
        return gr.Dropdown([AUTOMATIC, *choices], value=value or AUTOMATIC, **words)
    if each.type is str:
        return gr.Textbox(max_length=_whole_or_none(each.knob.most), **words)
    number: dict[str, Any] = {"precision": 0} if each.type is int else {}
    shown = {"placeholder": AUTOMATIC} if value is None else {}
    return NumberInput(value, minimum=each.knob.least, maximum=each.knob.most, **number, **shown, **words)


def knob_slider(name: str, value: float, step: float, most: float | None = None, **own: Any) -> gr.Slider:
    """The same as a slider over the knob's range.

    Args:
        most: its end, where that is before the knob's.
    """
    knob, each = BY_FIELD[name].knob, BY_FIELD[name]
    least = (knob.least or 0) + (step if knob.above else 0)
    highest = min(each for each in (knob.most, most) if each is not None)
    words: dict[str, Any] = {"label": each.label, "info": knob.help or None, "elem_id": name} | own
    return gr.Slider(least, highest, value, step=step, **words)


def knob_value(each: Declared, value: Any) -> Any:
    """What a field holds, as the request takes it; None where it is left to the adapter or the mode.

    Raises:
        InputError: a part of what can only be whole.
    """
    if value in (None, "", AUTOMATIC):
        return None
    if each.type in (int, float) and value == 0 and not each.knob.takes(0):
        return None  # Gradio sends 0 for a field that nobody has been in
    if each.type is int:
        return whole(value, each.field)
    return each.type(value) if each.type is float else value


def whole(value: float, name: str) -> int:
    """A number as an integer.

    Raises:
        InputError: it is none.
    """
    if value != int(value):
        raise InputError(f"{name} must be a whole number, got {value:g}")
    return int(value)


def _help(each: Declared, value: Any) -> str | None:
    default = f"Automatic: {each.knob.default}." if value is None and each.knob.default else ""
    return " ".join(filter(None, (each.knob.help, default))) or None


def _whole_or_none(value: float | None) -> int | None:
    return None if value is None else int(value)
