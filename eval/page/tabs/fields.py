"""The form of the first tab: what is asked for. Labels, help and ranges are those of `eval/request/request.py:KNOBS`."""

import random
from typing import Any, NamedTuple

import gradio as gr
from PIL import Image, ImageOps

from eval.page.jobs import errors_in_words
from eval.page.limits import CANVAS, read_picture
from eval.page.studio import QUIET, Studio, picture_input
from eval.page.tabs.form import (
    AS_SOURCE,
    BASE_MODEL,
    CONTROL_NAMES,
    EXACT,
    MODE_HINTS,
    MODE_NAMES,
    OPACITY,
    SHAPES,
    STRENGTHS,
)
from eval.page.tabs.knob_fields import BY_FIELD, NumberInput, knob_field, knob_slider
from eval.page.uploads import taken
from eval.request.knobs import ModeName
from eval.request.request import FEATHER, KNOBS, MASKED

MAX_SEED = 2**31 - 1
"""Of a drawn one; any may be typed."""
DECODING: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "decoding"}
"""For what opens uploads: one large picture in memory at a time."""
PLACED = (
    *("prompt", "mode", "adapters", "feather", "focus", "controls", "strength", "seed", "count", "size"),
    "aspect",
)
"""Knobs with a place of their own in the form; all others are under "Size and sampling", in the table's order."""

Fields = dict[str, Any]
"""Name -> Gradio component."""


class Buttons(NamedTuple):
    """That begin an edit, and end it."""

    run: gr.Button
    cancel: gr.Button


class Asking(NamedTuple):
    """What stands above the result: the fields so far, those that single modes have, and the buttons."""

    fields: Fields
    groups: dict[str, gr.Group]
    repaint: gr.Button
    buttons: Buttons


def build_asking(studio: Studio) -> Asking:
    """Mode, source and instruction; names as `form.make_request` reads them."""
    modes = studio.editor.abilities.modes
    fields: Fields = {}
    fields["mode"] = gr.Dropdown(
        [(MODE_NAMES[mode], mode) for mode in modes],
        label=BY_FIELD["mode"].label,
        value=modes[0],
        info=MODE_HINTS[modes[0]],
        elem_id="mode",
        filterable=False,
    )
    fields["source"] = picture_input("Source", 330, "source")
    fields["painting"] = gr.ImageEditor(
        label="Paint the mask",
        elem_id="painting",
        type="pil",
        image_mode="RGBA",
        format="png",
        sources=(),
        transforms=(),
        layers=False,
        brush=gr.Brush(default_size=60, colors=[("#e5484d", OPACITY)], color_mode="fixed"),
        height=460,
        visible=False,
    )
    repaint = gr.Button("Replace the picture", size="sm", visible=False, elem_id="another")
    groups = _build_groups(fields, modes[0])
    fields["prompt"] = knob_field(
        "prompt",
        "",
        info=None,
        lines=2,
        max_lines=6,
        placeholder="Remove the sticker from the photograph.",
        elem_id="instruction",
    )
    with gr.Row():
        run = gr.Button("Edit", variant="primary", elem_id="run", scale=3)
        cancel = gr.Button("Cancel", variant="stop", elem_id="cancel", scale=1, min_width=90)
    return Asking(fields, groups, repaint, Buttons(run, cancel))


def build_settings(studio: Studio, asking: Asking) -> None:
    """What stands below the result on a telephone, added to the fields; then all are connected."""
    fields = asking.fields
    _build_adapter(studio, fields)
    _build_seed(studio, fields)
    _build_references(studio, fields)
    _build_advanced(studio, fields)
    _connect_mode(asking, studio)


def _build_seed(studio: Studio, fields: Fields) -> None:
    with gr.Row():
        fields["seed"] = knob_field("seed", 0, min_width=100)
        new_seed = gr.Button("Random", elem_id="new-seed", min_width=90, scale=0, elem_classes="beside-field")
        fields["count"] = knob_slider("count", 1, 1, studio.limits.max_count, info=None, min_width=200)
    new_seed.click(lambda: random.randint(0, MAX_SEED), outputs=fields["seed"], **QUIET)


def _build_groups(fields: Fields, mode: ModeName) -> dict[str, gr.Group]:
    """By knob, those that only some modes have."""

    def shown(name: str) -> bool:
        return mode in BY_FIELD[name].knob.modes

    groups: dict[str, gr.Group] = {}
    with gr.Group(visible=shown("strength")) as groups["strength"]:
        fields["strength"] = knob_slider("strength", STRENGTHS.get(mode, 0.6), 0.05)
    with gr.Group(visible=shown("feather")) as groups["feather"]:
        fields["feather"] = knob_field("feather", FEATHER)
    with gr.Group(visible=shown("focus")) as groups["focus"], gr.Row():
        for name, label, value in (("x", "Across", 0.5), ("y", "Down", 0.5), ("radius", "Radius", 0.25)):
            least = 0.01 if name == "radius" else 0
            fields[f"focus_{name}"] = gr.Slider(
                least, 1, value, step=0.01, label=label, elem_id=f"focus-{name}", min_width=120
            )
    with gr.Group(visible=shown("controls")) as groups["controls"]:
        fields["controls"] = gr.CheckboxGroup(
            [(label, kind) for kind, label in CONTROL_NAMES.items()],
            value=["canny"],
            label=BY_FIELD["controls"].label,
            info="Each counts as a reference: three in all.",
            elem_id="controls",
        )
        with gr.Row():
            for kind, label in CONTROL_NAMES.items():
                fields[f"{kind}_strength"] = gr.Slider(0, 2, 1, step=0.05, label=f"{label}: strength", min_width=120)
    return groups


def _build_adapter(studio: Studio, fields: Fields) -> None:
    with gr.Row():
        fields["adapter"] = gr.Dropdown(
            adapter_names(studio),
            value=studio.first_adapter or BASE_MODEL,
            label=BY_FIELD["adapters"].label,
            elem_id="adapter",
            scale=3,
        )
        again = gr.Button("Refresh", elem_id="refresh", min_width=100, scale=0, elem_classes="beside-field")
    fields["weight"] = gr.Slider(
        0, 2, 1, step=0.05, label="Weight of the adapter", elem_id="weight", visible=bool(studio.first_adapter)
    )
    adapter = fields["adapter"]
    again.click(lambda: gr.Dropdown(adapter_names(studio)), outputs=adapter, **QUIET)
    adapter.change(
        lambda name: gr.Slider(visible=name != BASE_MODEL),
        adapter,
        fields["weight"],
        **QUIET,
    )


def adapter_names(studio: Studio) -> list[str]:
    """What the dropdowns offer."""
    return [BASE_MODEL, *(adapter.name for adapter in studio.adapters())]


def _build_references(studio: Studio, fields: Fields) -> None:
    most = studio.editor.abilities.max_images
    with gr.Accordion("Reference pictures", open=False, visible=most > 1), gr.Row():
        for number in (1, 2):
            box = picture_input(f"Reference {number}", 170, f"reference-{number}", visible=number < most, min_width=140)
            fields[f"reference_{number}"] = box
            scale_uploads(box, studio)


def scale_uploads(box: gr.Image, studio: Studio) -> None:
    """Large pictures are scaled as they arrive; what cannot be taken leaves the box."""
    box.upload(lambda path: taken(path, studio.limits, studio.cache), box, box, **QUIET | DECODING)


def _build_advanced(studio: Studio, fields: Fields) -> None:
    with gr.Accordion("Size and sampling", open=False, elem_id="advanced"):
        with gr.Row():
            fields["shape"] = gr.Dropdown(list(SHAPES), value=AS_SOURCE, label="Shape", elem_id="shape", min_width=140)
            for name in ("width", "height"):
                fields[name] = NumberInput(
                    label=name.capitalize(), step=32, visible=False, min_width=100, elem_id=name, precision=0
                )
        with gr.Row():
            for each in (each for each in KNOBS if each.field not in PLACED):
                shown = studio.editor.abilities.has(each)
                wide = 300 if each.type is str else 180
                fields[each.field] = knob_field(
                    each.field, "" if each.type is str else None, min_width=wide, visible=shown
                )
    fields["shape"].change(
        lambda shape: [gr.Number(visible=shape == EXACT)] * 2,
        fields["shape"],
        [fields["width"], fields["height"]],
        **QUIET,
    )


def mode_updates(mode: ModeName, asking: Asking, prompt: str | None = None) -> dict[Any, Any]:
    """What a mode shows: the knobs that it has. The instruction becomes `prompt`, if that is given."""
    text: dict[str, Any] = {} if prompt is None else {"value": prompt}
    shown = {group: gr.Group(visible=mode in BY_FIELD[name].knob.modes) for name, group in asking.groups.items()}
    return shown | {
        asking.fields["mode"]: gr.update(value=mode, info=MODE_HINTS[mode]),
        asking.fields["prompt"]: gr.Textbox(visible=mode != "variation", **text),
    }


def _connect_mode(asking: Asking, studio: Studio) -> None:
    """Shows what the mode asks for; in masked modes the source is what is painted on."""
    fields, repaint = asking.fields, asking.repaint
    source, mode, painting = fields["source"], fields["mode"], fields["painting"]

    def boxes(background: Any, keep: bool = False) -> dict[Any, Any]:
        paint = background is not None
        return {
            source: gr.Image(visible=not paint),
            painting: gr.skip() if keep else gr.ImageEditor(value=background, visible=paint),
            repaint: gr.Button(visible=paint),
            painting_now: paint,
        }

    def chosen(mode: ModeName, source: str | None, was_masked: bool) -> dict[Any, Any]:
        background = canvas(source, studio) if mode in MASKED and source else None
        strength = {fields["strength"]: gr.Slider(value=STRENGTHS[mode])} if mode in STRENGTHS else {}
        return mode_updates(mode, asking) | strength | boxes(background, background is not None and was_masked)

    def uploaded(mode: ModeName, path: str | None) -> dict[Any, Any]:
        path = taken(path, studio.limits, studio.cache)
        shown = boxes(canvas(path, studio) if mode in MASKED and path else None)
        return shown | {source: gr.Image(value=path, visible=not shown[painting_now])}

    painting_now = gr.State(False)
    changed = [source, painting, repaint, painting_now]
    knobs = [mode, fields["prompt"], fields["strength"], *asking.groups.values()]
    mode.input(chosen, [mode, source, painting_now], [*knobs, *changed], **QUIET | DECODING)
    source.upload(uploaded, [mode, source], changed, **QUIET | DECODING)
    repaint.click(lambda: boxes(None) | {source: gr.Image(value=None, visible=True)}, outputs=changed, **QUIET)


def canvas(source: str, studio: Studio) -> Any:
    """The picture to paint on, no larger than the canvas, as the paint box takes it; None, with a message on the page, if it
    cannot be read."""
    try:
        with errors_in_words("Opening the picture"):
            image = read_picture(source, studio.limits)
    except gr.Error as error:
        gr.Warning(str(error.message), title=error.title)
        return None
    # Small ones grow: one brush fits all.
    return {
        "background": ImageOps.contain(image, (CANVAS, CANVAS), Image.Resampling.LANCZOS),
        "layers": [],
        "composite": None,
    }
