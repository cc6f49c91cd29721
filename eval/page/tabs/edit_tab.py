"""The first tab: a picture, an instruction, and what became of it."""

from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.components import Component
from PIL import Image

from data_prep.errors import InputError
from eval.page.jobs import Cancelled, errors_in_words, say_stopped
from eval.page.limits import read_picture
from eval.page.studio import QUIET, Studio, session_of
from eval.page.tabs.fields import Buttons, Fields, build_form
from eval.page.tabs.form import make_request
from eval.page.tabs.results import Picture, beside, save_results, settings_html

TAB = "edit"


@dataclass(frozen=True)
class Outcome:
    """What the right column shows."""

    slider: gr.ImageSlider
    gallery: gr.Gallery
    download: gr.DownloadButton
    settings: gr.HTML
    details: gr.Accordion
    pictures: gr.State
    """The `Picture`s of the last edit."""
    source: gr.State
    """Path of the source that they were made of."""

    @property
    def parts(self) -> list[Component | gr.Accordion]:
        """In the order in which handlers return them."""
        return [self.slider, self.gallery, self.download, self.settings, self.details, self.pictures, self.source]


def build_edit_tab(studio: Studio) -> None:
    """Lays out the tab inside the page that is being built, and connects it."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320):
            fields, buttons = build_form(studio)
        with gr.Column(scale=6, min_width=320, elem_classes="result-column"):
            outcome = build_outcome()
    connect_edit(studio, fields, outcome, buttons)


def build_outcome() -> Outcome:
    """The right column."""
    slider = gr.ImageSlider(
        label="Before and after", format="png", height=520, elem_id="result", interactive=False, buttons=["fullscreen"]
    )
    gallery = gr.Gallery(
        label="All pictures",
        format="png",
        columns=4,
        height=150,
        allow_preview=False,
        object_fit="contain",
        show_label=False,
        visible=False,
        interactive=False,
        elem_id="gallery",
        buttons=[],
    )
    download = gr.DownloadButton("Download PNG with settings", interactive=False, elem_id="download")
    with gr.Accordion("How it was made", open=False, visible=False, elem_id="details") as details:
        settings = gr.HTML(elem_id="settings")
    return Outcome(slider, gallery, download, settings, details, gr.State([]), gr.State(None))


def connect_edit(studio: Studio, fields: Fields, outcome: Outcome, buttons: Buttons) -> None:
    """Buttons and what they do."""

    # Gradio passes a set of inputs as one dictionary, and finds the request and the progress by their annotations.
    def edit(data: dict[Any, Any], request: gr.Request, progress: gr.Progress = gr.Progress()) -> Any:  # noqa: B008
        values = {name: data[field] for name, field in fields.items()}
        try:
            with errors_in_words("The edit"):
                with studio.jobs.running(session_of(request), TAB, progress, "Editing") as on_progress:
                    asked = make_request(values, studio.adapters(), studio.limits)
                    studio.editor.check(asked.request)
                    for note in studio.editor.notes(asked.request):
                        gr.Info(note)
                    results = studio.edit(asked.request, on_progress)
                pictures = save_results(results, asked.sources, studio.out)
                return [*_show(pictures, 0, asked.request.images[0]), pictures, values["source"]]
        except Cancelled:
            return gr.skip()

    def choose(event: gr.SelectData, pictures: list[Picture], source: str) -> Any:
        with errors_in_words("Showing the picture"):
            index = event.index if isinstance(event.index, int) else 0
            if not 0 <= index < len(pictures):
                raise InputError("there is no such picture: make the edit again")
            slider, _, *others = _show(pictures, index, read_picture(source, studio.limits))
            return [slider, *others]

    def stop(request: gr.Request) -> None:
        say_stopped(studio.jobs.cancel(session_of(request), TAB))

    buttons.run.click(
        edit,
        set(fields.values()),
        outcome.parts,
        concurrency_limit=None,  # they wait for the device in `studio.jobs`
        trigger_mode="once",
        show_progress="full",
        show_progress_on=outcome.slider,
        scroll_to_output=True,  # on a telephone the result is far below
        api_visibility="private",
    )
    buttons.cancel.click(stop, **QUIET)
    shown = [outcome.slider, outcome.download, outcome.settings, outcome.details]
    outcome.gallery.select(choose, [outcome.pictures, outcome.source], shown, **QUIET)


def _show(pictures: list[Picture], index: int, source: Image.Image) -> list[Any]:
    """Slider, gallery, download, settings and their box for one of the pictures."""
    picture = pictures[index]
    return [
        beside(source, picture.path),
        gr.Gallery([str(each.path) for each in pictures], visible=len(pictures) > 1, selected_index=index),
        gr.DownloadButton(value=str(picture.path), interactive=True),
        settings_html(picture.settings),
        gr.Accordion(visible=True),
    ]
