"""The form as the browser keeps it, so that a restart of the server does not empty it; and an example for a first visit.

What is kept are the choices and the texts of the first tab, in the browser's own storage. Pictures are not: they are large, and
the server deletes what was uploaded.
"""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_file_to_cache
from markupsafe import Markup

from eval.page.studio import QUIET, Example, Studio
from eval.page.tabs.fields import Asking, adapter_names, mode_updates
from eval.page.tabs.knob_fields import BY_FIELD, NumberInput
from eval.page.uploads import taken
from eval.request.knobs import ModeName
from eval.request.request import CONTROLLED, MASKED

KEY = "edit-form"
"""In the browser's storage."""
PICTURES = ("source", "painting", "reference_1", "reference_2")
OPENED_WITH = "opened_with"
"""The adapter of the server's command line, kept beside the fields: another one there replaces the one that was chosen."""
INSTRUCTION = "Make the cup blue."
"""For the photograph that comes with scikit-image."""


def build_example(studio: Studio) -> tuple[gr.Group, gr.Button]:
    """The card of a first visit, hidden until it is known to be one, and its button."""
    example = first_example(studio)
    with gr.Group(visible=False, elem_id="first-visit") as card, gr.Row(equal_height=True):
        gr.Image(
            str(example.image), interactive=False, buttons=[], height=110, show_label=False, min_width=110, scale=1
        )
        with gr.Column(scale=3, min_width=180):
            gr.HTML(Markup("<p><b>New here?</b> Try an edit of this picture: “{}”</p>").format(example.prompt))
            run = gr.Button("Run this example", variant="secondary", elem_id="run-example")
    return card, run


def first_example(studio: Studio) -> Example:
    """The first of the server's examples, or else a photograph that is on every machine."""
    if studio.examples:
        return studio.examples[0]
    found = find_spec("skimage")
    assert found
    assert found.origin
    return Example(Path(found.origin).parent / "data/coffee.png", INSTRUCTION)


def example_mode(studio: Studio) -> ModeName | None:
    """The first mode that needs a picture and an instruction alone; None if this base has no such."""
    modes = studio.editor.abilities.modes
    return next((mode for mode in modes if mode not in (*MASKED, *CONTROLLED, "variation")), None)


def connect_kept(studio: Studio, asking: Asking, card: gr.Group, page: gr.Blocks) -> None:
    """Keeps the form in the browser whenever it changes, and fills it when the page opens."""
    kept = {name: field for name, field in asking.fields.items() if name not in PICTURES}
    store = gr.BrowserState(None, storage_key=KEY, secret=KEY)

    automatic = {field: None for field in kept.values() if isinstance(field, NumberInput) and field.value is None}

    def opened(stored: Any) -> dict[Any, Any]:
        # An empty number says 0 until it is told that it is empty.
        if not isinstance(stored, dict):
            return automatic | {card: gr.Group(visible=example_mode(studio) is not None)}
        return automatic | restored(stored, studio, kept, asking)

    outputs = [*kept.values(), *asking.groups.values(), card]
    page.load(opened, store, outputs, **QUIET)
    names, own = json.dumps(list(kept)), json.dumps({OPENED_WITH: studio.first_adapter})
    save = f"(...values) => [Object.assign({own}, Object.fromEntries({names}.map((name, i) => [name, values[i]])))]"
    gr.on([field.change for field in kept.values()], None, list(kept.values()), store, js=save, show_progress="hidden")


def restored(stored: dict[str, Any], studio: Studio, kept: dict[str, Any], asking: Asking) -> dict[Any, Any]:
    """Updates of the fields; what a field cannot hold (any more) stays as the page has it."""
    fits = {name: stored[name] for name, field in kept.items() if name in stored and holds(name, field, stored[name])}
    updates = {kept[name]: value for name, value in fits.items() if name not in ("mode", "prompt")}
    updates |= mode_updates(fits.get("mode", studio.editor.abilities.modes[0]), asking, fits.get("prompt", ""))
    names = adapter_names(studio)
    if stored.get(OPENED_WITH) == studio.first_adapter and stored.get("adapter") in names:
        updates[kept["adapter"]] = gr.Dropdown(names, value=stored["adapter"])
    return updates


def holds(name: str, field: Any, value: Any) -> bool:
    """Whether a field of the form can hold a value that a browser kept."""
    if isinstance(field, gr.CheckboxGroup):
        return isinstance(value, list) and all(each in _values(field) for each in value)
    if isinstance(field, gr.Dropdown):
        return name != "adapter" and value in _values(field)
    if isinstance(field, gr.Textbox):
        return isinstance(value, str) and (field.max_length is None or len(value) <= field.max_length)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if isinstance(field, gr.Slider):
        return field.minimum <= value <= field.maximum
    knob = BY_FIELD[name].knob if name in BY_FIELD else None
    return value > 0 if knob is None else knob.takes(value)


def _values(field: gr.Dropdown | gr.CheckboxGroup) -> list[Any]:
    return [value for _, value in field.choices]


def fill_example(studio: Studio, asking: Asking, card: gr.Group) -> Callable[[], dict[Any, Any]]:
    """The handler that puts the example into the form."""

    def fill() -> dict[Any, Any]:
        example, mode = first_example(studio), example_mode(studio)
        assert mode  # else there is no button
        fields = asking.fields
        return mode_updates(mode, asking, example.prompt) | {
            fields["source"]: taken(save_file_to_cache(example.image, str(studio.cache)), studio.limits, studio.cache),
            card: gr.Group(visible=False),
        }

    return fill
