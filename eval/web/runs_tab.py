"""The third tab: how a training run went, from its loss to its validation pictures."""

from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup
from PIL import Image

from eval.web.jobs import errors_in_words
from eval.web.runs import (
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
from eval.web.studio import Studio

NONE_FOUND = "There are no runs here yet: train/run.py makes one."


def build_runs_tab(studio: Studio, page: gr.Blocks) -> None:
    """Lays out the tab inside the page that is being built, and connects it."""
    with gr.Row():
        runs = gr.Dropdown(label="Run", elem_id="run-name", scale=4, choices=[], value=None)
        again = gr.Button("Look again", elem_id="runs-refresh", scale=0, min_width=110, elem_classes="beside-field")
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

    def look(name: str | None) -> Any:
        found = list(find_runs(studio.runs))
        chosen = name if name in found else (found[0] if found else None)
        return [gr.Dropdown(found, value=chosen, info="" if found else NONE_FOUND), *show(chosen)]

    def show(name: str | None) -> list[Any]:
        if not name:
            return ["", "", gr.Dropdown(visible=False), "", gr.Image(visible=False)]
        with errors_in_words("Reading the run"):
            folder = chosen_run(name, studio.runs)
            history, validations = read_history(folder / HISTORY), read_validations(folder)
            numbers = [validation.step for validation in validations]
            return [
                summary_html(history, len(list(folder.glob("checkpoints/step-*")))),
                curves_html(Path(name).name, history),
                gr.Dropdown(numbers, value=numbers[-1] if numbers else None, visible=bool(numbers)),
                *_shown(name, validations[-1] if validations else None),
            ]

    def choose(name: str | None, step: int | None) -> list[Any]:
        with errors_in_words("Reading the run"):
            validations = read_validations(chosen_run(name, studio.runs)) if name else []
            return _shown(name or "", next((each for each in validations if each.step == step), None))

    plain: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
    parts = [summary, charts, steps, scores, grid]
    page.load(look, runs, [runs, *parts], **plain)
    again.click(look, runs, [runs, *parts], **plain)
    runs.input(show, runs, parts, **plain)
    steps.input(choose, [runs, steps], [scores, grid], **plain)


def _shown(name: str, validation: Validation | None) -> list[Any]:
    """A validation's table and pictures."""
    if validation is None:
        return [Markup('<p class="quiet">This run has not validated.</p>'), gr.Image(visible=False)]
    if validation.grid is None:
        return [scores_html(name, validation), gr.Image(visible=False)]
    with Image.open(validation.grid) as opened:
        picture = opened.convert("RGB")
    return [scores_html(name, validation), gr.Image(picture, visible=True)]
