"""The first tab: a picture, an instruction, and what became of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.components import Component
from PIL import Image

from data_prep.errors import InputError
from eval.page.jobs import OnStatus, errors_in_words, say_stopped, shown_edit
from eval.page.limits import read_picture
from eval.page.studio import EDITING, QUIET, ZOOM_HINT, Studio, session_of
from eval.page.tabs.fields import Buttons, Fields, build_asking, build_settings
from eval.page.tabs.form import make_request
from eval.page.tabs.kept import build_example, connect_kept, fill_example
from eval.page.tabs.results import Picture, beside, save_results, settings_html

TAB = "edit"


@dataclass(frozen=True)
class Outcome:
    """What the right column shows."""

    status: gr.HTML
    """How far the edit is, or why there is none."""
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
        """The result, in the order in which handlers return it."""
        return [self.slider, self.gallery, self.download, self.settings, self.details, self.pictures, self.source]


def build_edit_tab(studio: Studio, page: gr.Blocks) -> None:
    """Lays out the tab inside the page that is being built, and connects it."""
    # The style sheet puts the result beside both; on a narrow screen it stands between them.
    with gr.Row(equal_height=False, elem_id="edit-grid"):
        with gr.Column(elem_id="asking"):
            card, try_it = build_example(studio)
            asking = build_asking(studio)
        with gr.Column(elem_id="outcome"):
            outcome = build_outcome()
        with gr.Column(elem_id="settings-column"):
            build_settings(studio, asking)
    # Listeners are called one after the other: this one before the edit.
    gr.on([asking.buttons.run.click, try_it.click], None, js="() => editPage.show('#outcome')", show_progress="hidden")
    asking.buttons.run.click(lambda: gr.Group(visible=False), outputs=card, **QUIET)
    edit, shown = connect_edit(studio, asking.fields, outcome, asking.buttons)
    connect_kept(studio, asking, card, page)
    filled = [*asking.groups.values(), *(asking.fields[name] for name in ("mode", "prompt", "source")), card]
    begun = try_it.click(fill_example(studio, asking, card), outputs=filled, **QUIET)
    begun.then(edit, set(asking.fields.values()), shown, **EDITING)


def build_outcome() -> Outcome:
    """The right column."""
    status = gr.HTML(elem_id="status")
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
    gr.HTML(f'<p class="quiet hint">{ZOOM_HINT}</p>')
    download = gr.DownloadButton("Download PNG with settings", interactive=False, elem_id="download")
    with gr.Accordion("How it was made", open=False, visible=False, elem_id="details") as details:
        settings = gr.HTML(elem_id="settings")
    slider.change(None, js="() => editPage.closeErrors()", show_progress="hidden")
    return Outcome(status, slider, gallery, download, settings, details, gr.State([]), gr.State(None))


def connect_edit(
    studio: Studio, fields: Fields, outcome: Outcome, buttons: Buttons
) -> tuple[Callable[..., Iterator[list[Any]]], list[Component | gr.Accordion]]:
    """Buttons and what they do. Returns the handler that edits, and what it shows."""

    # Gradio passes a set of inputs as one dictionary, and finds the request by its annotation.
    def edit(data: dict[Any, Any], request: gr.Request) -> Iterator[list[Any]]:
        values = {name: data[field] for name, field in fields.items()}

        def work(on_status: OnStatus) -> list[Any]:
            with studio.jobs.running(session_of(request), TAB, on_status, "Editing") as on_progress:
                asked = make_request(values, studio.adapters(), studio.limits)
                studio.editor.check(asked.request)
                for note in studio.editor.notes(asked.request):
                    gr.Info(note)
                results = studio.edit(asked.request, on_progress)
            pictures = save_results(results, asked.sources, studio.out)
            return [*_show(pictures, 0, asked.request.images[0]), pictures, values["source"]]

        yield from shown_edit("The edit", work, len(outcome.parts))

    def choose(event: gr.SelectData, pictures: list[Picture], source: str) -> Any:
        with errors_in_words("Showing the picture"):
            index = event.index if isinstance(event.index, int) else 0
            if not 0 <= index < len(pictures):
                raise InputError("there is no such picture: make the edit again")
            slider, _, *others = _show(pictures, index, read_picture(source, studio.limits))
            return [slider, *others]

    def stop(request: gr.Request) -> None:
        say_stopped(studio.jobs.cancel(session_of(request), TAB))

    shown = [*outcome.parts, outcome.status]
    buttons.run.click(edit, set(fields.values()), shown, **EDITING)
    buttons.cancel.click(stop, **QUIET)
    picture = [outcome.slider, outcome.download, outcome.settings, outcome.details]
    outcome.gallery.select(choose, [outcome.pictures, outcome.source], picture, **QUIET)
    return edit, shown


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
