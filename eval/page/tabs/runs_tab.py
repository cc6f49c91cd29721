"""The third tab: how a training run went, from its loss to its validation pictures."""

from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup
from PIL import Image

from eval.page.jobs import errors_in_words
from eval.page.studio import QUIET, Studio
from eval.page.tabs.runs import (
    HISTORY,
    Validation,
    chosen_run,
    curves_html,
    find_runs,
    read_history,
    read_validations,
    scores_html,
    summary_html,
)

NONE_FOUND = "There are no runs here yet: train/run.py makes one."


def build_runs_tab(studio: Studio, page: gr.Blocks) -> None:
    """Lays out the tab inside the page that is being built, and connects it."""
    with gr.Row():
        runs = gr.Dropdown(label="Run", elem_id="run-name", scale=4, choices=[], value=None)
        again = gr.Button("Refresh", elem_id="runs-refresh", scale=0, min_width=110, elem_classes="beside-field")
    summary = gr.HTML(elem_id="run-summary")
    charts = gr.HTML(elem_id="run-charts")
    steps = gr.Dropdown(label="Validation at step", elem_id="run-step", visible=False, choices=[], value=None)
    scores = gr.HTML(elem_id="run-scores")
    grid = gr.Image(
        label="Validation pictures",
        format="png",
        interactive=False,
        visible=False,
        elem_id="run-grid",
        buttons=["fullscreen", "download"],
    )

    def look(name: str | None) -> list[Any]:
        try:
            with errors_in_words("Looking for runs"):
                found = list(find_runs(studio.runs))
        except gr.Error as error:
            return [gr.Dropdown([], value=None), *_failed(error)]
        chosen = name if name in found else (found[0] if found else None)
        return [gr.Dropdown(found, value=chosen, info="" if found else NONE_FOUND), *show_run(chosen, studio.runs)]

    def choose(name: str | None, step: int | None) -> list[Any]:
        try:
            with errors_in_words("Reading the run"):
                validations = read_validations(chosen_run(name, studio.runs)) if name else []
                return _shown(name or "", next((each for each in validations if each.step == step), None))
        except gr.Error as error:
            return [_in_red(error), gr.Image(visible=False)]

    parts = [summary, charts, steps, scores, grid]
    page.load(look, runs, [runs, *parts], **QUIET)
    again.click(look, runs, [runs, *parts], **QUIET)
    runs.input(lambda name: show_run(name, studio.runs), runs, parts, **QUIET)
    steps.input(choose, [runs, steps], [scores, grid], **QUIET)


def show_run(name: str | None, folder: Path) -> list[Any]:
    """Numbers, charts, steps, table and pictures of the run of that name. If it cannot be read, words say so in their place:
    nothing of the run before stays."""
    if not name:
        return _nothing()
    try:
        with errors_in_words("Reading the run"):
            return _panels(name, chosen_run(name, folder))
    except gr.Error as error:
        return _failed(error)


def _nothing() -> list[Any]:
    return ["", "", gr.Dropdown(visible=False), "", gr.Image(visible=False)]


def _panels(name: str, folder: Path) -> list[Any]:
    history, validations = read_history(folder / HISTORY), read_validations(folder)
    numbers = [validation.step for validation in validations]
    return [
        summary_html(history, len(list(folder.glob("checkpoints/step-*")))),
        curves_html(Path(name).name, history),
        gr.Dropdown(numbers, value=numbers[-1] if numbers else None, visible=bool(numbers)),
        *_shown(name, validations[-1] if validations else None),
    ]


def _failed(error: gr.Error) -> list[Any]:
    return [_in_red(error), *_nothing()[1:]]


def _in_red(error: gr.Error) -> Markup:
    # The message is HTML already.
    return Markup('<p class="problem">{}</p>').format(Markup(str(error.message)))


def _shown(name: str, validation: Validation | None) -> list[Any]:
    """A validation's table and pictures."""
    if validation is None:
        return [Markup('<p class="quiet">This run has not validated.</p>'), gr.Image(visible=False)]
    if validation.grid is None:
        return [scores_html(name, validation), gr.Image(visible=False)]
    with Image.open(validation.grid) as opened:
        picture = opened.convert("RGB")
    return [scores_html(name, validation), gr.Image(picture, visible=True)]
