"""The left column of the first tab: what is asked for."""

import random
from typing import Any, NamedTuple, get_args

import gradio as gr
from PIL import Image, ImageOps

from eval.page.jobs import errors_in_words
from eval.page.limits import CANVAS, read_picture
from eval.page.studio import QUIET, Studio, picture_input
from eval.page.tabs.form import (
    AS_SOURCE,
    BASE_MODEL,
    BY_DEFAULT,
    CONTROL_NAMES,
    EXACT,
    MODE_HINTS,
    MODE_NAMES,
    SHAPES,
    STRENGTHS,
)
from eval.request.knobs import ModeName, SizingName
from eval.request.request import CONTROLLED, MASKED, MAX_CFG_SCALE, MAX_PROMPT, MAX_STEPS

MAX_SEED = 2**31 - 1
"""Of a drawn one; any may be typed."""

Fields = dict[str, Any]
"""Name -> Gradio component."""


class Buttons(NamedTuple):
    """That begin an edit, and end it."""

    run: gr.Button
    cancel: gr.Button


def build_form(studio: Studio) -> tuple[Fields, Buttons]:
    """The left column; names as `form.make_request` reads them."""
    modes = studio.editor.abilities.modes
    fields: Fields = {}
    fields["mode"] = gr.Dropdown(
        [(MODE_NAMES[mode], mode) for mode in modes],
        label="Mode",
        value=modes[0],
        info=MODE_HINTS[modes[0]],
        elem_id="mode",
        filterable=False,
    )
    fields["source"] = picture_input("Source", 330, "source")
    fields["painting"] = gr.ImageEditor(
        label="Paint what may change",
        elem_id="painting",
        type="pil",
        image_mode="RGBA",
        format="png",
        sources=(),
        transforms=(),
        layers=False,
        brush=gr.Brush(default_size=60, colors=["#e5484d"], color_mode="fixed"),
        height=460,
        visible=False,
    )
    repaint = gr.Button("Take another picture", size="sm", visible=False, elem_id="another")
    groups = _build_knobs(fields)
    fields["prompt"] = gr.Textbox(
        label="Instruction",
        lines=2,
        max_lines=6,
        max_length=MAX_PROMPT,
        placeholder="Remove the sticker from the photograph.",
        elem_id="instruction",
    )
    with gr.Row():
        run = gr.Button("Edit (Ctrl+Enter)", variant="primary", elem_id="run", scale=3)
        cancel = gr.Button("Cancel", variant="stop", elem_id="cancel", scale=1, min_width=90)
    _build_adapter(studio, fields)
    _build_seed(studio, fields)
    _build_references(fields, studio.editor.abilities.max_images)
    _build_advanced(studio, fields)
    _connect_mode(fields, groups, repaint, studio)
    return fields, Buttons(run, cancel)


def _build_seed(studio: Studio, fields: Fields) -> None:
    with gr.Row():
        fields["seed"] = gr.Number(label="Seed", value=0, precision=0, elem_id="seed", min_width=100)
        new_seed = gr.Button("New seed", elem_id="new-seed", min_width=90, scale=0, elem_classes="beside-field")
        most = studio.limits.max_count
        fields["count"] = gr.Slider(1, most, 1, step=1, label="Pictures", elem_id="count", min_width=200)
    new_seed.click(lambda: random.randint(0, MAX_SEED), outputs=fields["seed"], **QUIET)


def _build_knobs(fields: Fields) -> dict[str, gr.Group]:
    """Those of single modes, hidden until their mode is chosen."""
    groups: dict[str, gr.Group] = {}
    with gr.Group(visible=False) as groups["strength"]:
        fields["strength"] = gr.Slider(
            0.05,
            1,
            0.6,
            step=0.05,
            label="Strength",
            info="How far from the source; 1 starts anew.",
            elem_id="strength",
        )
    with gr.Group(visible=False) as groups["mask"]:
        fields["feather"] = gr.Slider(
            0, 64, 8, step=1, label="Soft rim", info="Pixels of the result around what is painted.", elem_id="feather"
        )
    with gr.Group(visible=False) as groups["focus"], gr.Row():
        for name, label, value in (("x", "Across", 0.5), ("y", "Down", 0.5), ("radius", "Radius", 0.25)):
            least = 0.01 if name == "radius" else 0
            fields[f"focus_{name}"] = gr.Slider(
                least, 1, value, step=0.01, label=label, elem_id=f"focus-{name}", min_width=120
            )
    with gr.Group(visible=False) as groups["controls"]:
        fields["controls"] = gr.CheckboxGroup(
            [(label, kind) for kind, label in CONTROL_NAMES.items()],
            value=["canny"],
            label="Maps of the source",
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
            label="Adapter",
            elem_id="adapter",
            scale=3,
        )
        again = gr.Button("Look again", elem_id="refresh", min_width=100, scale=0, elem_classes="beside-field")
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


def _build_references(fields: Fields, max_images: int) -> None:
    with gr.Accordion("Reference pictures", open=False, visible=max_images > 1), gr.Row():
        for number in (1, 2):
            fields[f"reference_{number}"] = picture_input(
                f"Reference {number}", 170, f"reference-{number}", visible=number < max_images, min_width=140
            )


def _build_advanced(studio: Studio, fields: Fields) -> None:
    samplers = studio.editor.abilities.samplers
    with gr.Accordion("Size and sampling", open=False, elem_id="advanced"):
        with gr.Row():
            fields["shape"] = gr.Dropdown(list(SHAPES), value=AS_SOURCE, label="Shape", elem_id="shape", min_width=140)
            fields["width"] = gr.Number(
                label="Width", value=0, precision=0, step=32, visible=False, min_width=100, elem_id="width"
            )
            fields["height"] = gr.Number(
                label="Height", value=0, precision=0, step=32, visible=False, min_width=100, elem_id="height"
            )
        with gr.Row():
            # Gradio sends 0 for a field that nobody filled in, so 0 has to be what stands for nothing.
            unset: dict[str, Any] = {"value": 0, "info": "0: what suits.", "min_width": 140}
            fields["steps"] = gr.Number(label="Steps", precision=0, maximum=MAX_STEPS, elem_id="steps", **unset)
            fields["cfg_scale"] = gr.Number(
                label="Guidance", step=0.5, maximum=MAX_CFG_SCALE, elem_id="cfg-scale", **unset
            )
        fields["sampler"] = gr.Dropdown(
            [BY_DEFAULT, *samplers], value=BY_DEFAULT, label="Sampler", elem_id="sampler", visible=bool(samplers)
        )
        fields["geometry"] = gr.Dropdown(
            [BY_DEFAULT, *get_args(SizingName)],
            value=BY_DEFAULT,
            label="Sizes of images",
            info="As this project trains (own), or as diffusers' pipeline (upstream).",
            elem_id="geometry",
            visible=bool(samplers),
        )
        fields["negative_prompt"] = gr.Textbox(
            label="Negative instruction",
            info="What guidance leads away from.",
            max_length=MAX_PROMPT,
            elem_id="negative",
        )
    fields["shape"].change(
        lambda shape: [gr.Number(visible=shape == EXACT)] * 2,
        fields["shape"],
        [fields["width"], fields["height"]],
        **QUIET,
    )


def _connect_mode(fields: Fields, groups: dict[str, gr.Group], repaint: gr.Button, studio: Studio) -> None:
    """Shows what the mode asks for; in masked modes the source is what is painted on."""

    def shown(mode: ModeName, source: str | None, was_masked: bool) -> list[Any]:
        masked = mode in MASKED
        background = canvas(source, studio) if masked and source else None
        paint = background is not None
        return [
            gr.Dropdown(info=MODE_HINTS[mode]),
            gr.Textbox(visible=mode != "variation"),
            gr.Group(visible=mode in STRENGTHS),
            gr.Slider(value=STRENGTHS[mode]) if mode in STRENGTHS else gr.skip(),
            gr.Group(visible=masked),
            gr.Group(visible=mode == "focus"),
            gr.Group(visible=mode in CONTROLLED),
            gr.Image(visible=not paint),
            gr.skip() if paint and was_masked else gr.ImageEditor(value=background, visible=paint),
            gr.Button(visible=paint),
            paint,
        ]

    def uploaded(mode: str, source: str | None) -> list[Any]:
        background = canvas(source, studio) if mode in MASKED and source else None
        paint = background is not None
        return [
            gr.Image(visible=not paint),
            gr.ImageEditor(value=background, visible=paint),
            gr.Button(visible=paint),
            paint,
        ]

    painting_now = gr.State(False)
    source, mode = fields["source"], fields["mode"]
    boxes = [source, fields["painting"], repaint, painting_now]
    knobs = [mode, fields["prompt"], groups["strength"], fields["strength"], groups["mask"], groups["focus"]]
    mode.change(shown, [mode, source, painting_now], [*knobs, groups["controls"], *boxes], **QUIET)
    source.upload(uploaded, [mode, source], boxes, **QUIET)
    repaint.click(
        lambda: [
            gr.Image(value=None, visible=True),
            gr.ImageEditor(value=None, visible=False),
            gr.Button(visible=False),
            False,
        ],
        outputs=boxes,
        **QUIET,
    )


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
