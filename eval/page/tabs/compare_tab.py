"""The second tab: two adapters side by side, blind, and how people voted."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup

from data_prep.errors import InputError
from eval.page.jobs import OnStatus, errors_in_words, say_stopped, shown_edit
from eval.page.studio import EDITING, QUIET, ZOOM_HINT, Studio, picture_input, session_of
from eval.page.tabs.blind_pair import DRAWN, Pair, draw_example, make_pair
from eval.page.tabs.fields import adapter_names, scale_uploads
from eval.page.tabs.form import BASE_MODEL
from eval.page.tabs.knob_fields import NumberInput, knob_field
from eval.page.tabs.votes import Choice, Contestant, Standing, append_vote, read_votes, standings

TAB = "compare"
MAKING = "Making both"
CHOICES: dict[str, Choice] = {"A is better": "A", "No difference": "tie", "B is better": "B"}
EXPLANATION = (
    "Two adapters make the same edit from the same seed. Which is A and which is B is drawn anew each time, and told "
    "only after the vote."
)
COUNTED = (
    "The win rate is the first adapter's share of the votes that decided; “no difference” counts for neither. "
    "The interval is Wilson's, 95 %: the smaller it is, and the farther from 50 %, the surer the result. It takes each vote "
    "for independent: many votes of one person, or on one picture, are worth less than it says."
)


def standings_html(tables: Sequence[Standing]) -> Markup:
    """Who won against whom, with the interval drawn on a line from 0 to 100 %."""
    if not tables:
        return Markup('<p class="quiet">No votes yet.</p>')
    head = "<tr><th>adapter</th><th>wins</th><th>losses</th><th>ties</th><th>win rate</th></tr>"
    return Markup(f'<table class="standings"><thead>{head}</thead><tbody>{"".join(map(_row, tables))}</tbody></table>')


def _row(table: Standing) -> str:
    rate, interval = table.win_rate, table.interval
    if rate is None or interval is None:
        shown = "–"
    else:
        place = f"left:{interval.low:.1%};width:{interval.high - interval.low:.1%}"
        bar = f'<div class="interval"><i style="{place}"></i><b style="left:{rate:.1%}"></b></div>'
        shown = f"{rate:.0%} <small>({interval.low:.0%} – {interval.high:.0%})</small>{bar}"
    names = f"{_name(table.first)}<div>against {_name(table.second)}</div>"
    counts = "".join(f"<td>{count}</td>" for count in (table.wins, table.losses, table.ties))
    return f"<tr><td>{names}</td>{counts}<td>{shown}</td></tr>"


def _name(contestant: Contestant) -> Markup:
    """With what tells it from others of its name."""
    steps = "" if contestant.steps is None else f"{contestant.steps} step{'' if contestant.steps == 1 else 's'}"
    parts = (contestant.digest[:6], steps, f"{contestant.base} {contestant.model[:6]}".strip())
    return Markup("{} <small>{}</small>").format(contestant.name, " · ".join(filter(None, parts)))


def build_compare_tab(studio: Studio, page: gr.Blocks) -> None:
    """Lays out the tab inside the page that is being built, and connects it."""
    names = adapter_names(studio)
    fields: dict[str, Any] = {}
    gr.HTML(f'<p class="quiet lead">{EXPLANATION}</p>')
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=300):
            with gr.Row():
                first = names[1] if len(names) > 1 else BASE_MODEL
                fields["first"] = gr.Dropdown(names, value=first, label="One adapter", elem_id="first", min_width=260)
                second = names[2] if len(names) > 2 else BASE_MODEL
                fields["second"] = gr.Dropdown(names, value=second, label="The other", elem_id="second", min_width=260)
            fields["source"] = picture_input("Source", 240, "compare-source")
            scale_uploads(fields["source"], studio)
            fields["prompt"] = knob_field("prompt", "", info=None, lines=2, elem_id="compare-instruction")
            draw = gr.Button(
                f"Draw one of {len(studio.examples)} examples", visible=bool(studio.examples), elem_id="draw"
            )
            with gr.Row():
                fields["seed"] = NumberInput(
                    DRAWN, label="Seed", info="-1: random.", elem_id="compare-seed", precision=0, min_width=120
                )
                steps: dict[str, Any] = {"info": "Automatic: each adapter's own number.", "elem_id": "compare-steps"}
                fields["steps"] = knob_field("steps", min_width=120, **steps)
            with gr.Row():
                run = gr.Button("Make the pair", variant="primary", elem_id="pair", scale=3)
                cancel = gr.Button("Cancel", variant="stop", elem_id="compare-cancel", scale=1, min_width=90)
        with gr.Column(scale=7, min_width=320, elem_id="compare-outcome"):
            status = gr.HTML(elem_id="compare-status")
            with gr.Row(elem_id="sides"):
                side: dict[str, Any] = {"format": "png", "interactive": False, "buttons": ["fullscreen"], "height": 380}
                left = gr.Image(label="A", elem_id="side-a", min_width=160, **side)
                right = gr.Image(label="B", elem_id="side-b", min_width=160, **side)
            gr.HTML(f'<p class="quiet hint">{ZOOM_HINT}</p>')
            with gr.Row():
                buttons = [
                    gr.Button(label, interactive=False, elem_id=f"vote-{choice.lower()}", min_width=100)
                    for label, choice in CHOICES.items()
                ]
            told = gr.HTML(elem_id="told")
            # Closed: who knows how others voted is not blind any more.
            with gr.Accordion("Results so far", open=False, elem_id="results-so-far"):
                table = gr.HTML(elem_id="standings")
                gr.HTML(f'<p class="quiet">{COUNTED}</p>')

    def drawn() -> tuple[str, str]:
        with errors_in_words("Drawing an example"):
            return draw_example(studio, random.SystemRandom())

    def opened() -> list[Any]:
        with errors_in_words("Reading the votes"):
            table = standings_html(standings(read_votes(studio.votes_file)))
            return [*[gr.Dropdown(adapter_names(studio))] * 2, table, None]

    state = gr.State(None)
    _connect_pair(studio, fields, (run, cancel), [left, right, state, told, *buttons], status)
    _connect_votes(studio.votes_file, buttons, state, [told, table])
    draw.click(drawn, outputs=[fields["source"], fields["prompt"]], **QUIET)
    page.load(
        opened,
        outputs=[fields["first"], fields["second"], table, fields["steps"]],
        **QUIET,
    )


def _connect_pair(
    studio: Studio, fields: dict[str, Any], buttons: tuple[gr.Button, gr.Button], outputs: list[Any], status: gr.HTML
) -> None:
    run, cancel = buttons

    def pair(data: dict[Any, Any], request: gr.Request) -> Iterator[list[Any]]:
        values = {name: data[field] for name, field in fields.items()}

        def work(on_status: OnStatus) -> list[Any]:
            # No counts: the numbers of steps would tell which is being made.
            with studio.jobs.running(session_of(request), TAB, on_status, MAKING, counted=False) as on_progress:
                a, b, made = make_pair(studio, values, on_progress, random.SystemRandom())
            return [a, b, made, "", *[gr.Button(interactive=True)] * 3]

        yield from shown_edit("The comparison", work, len(outputs))

    def stop(request: gr.Request) -> None:
        say_stopped(studio.jobs.cancel(session_of(request), TAB))

    run.click(None, js="() => editPage.show('#compare-outcome')", show_progress="hidden")
    run.click(pair, set(fields.values()), [*outputs, status], **EDITING)
    outputs[1].change(None, js="() => editPage.newPair()", show_progress="hidden")
    cancel.click(stop, **QUIET)


def _connect_votes(path: Path, buttons: list[gr.Button], state: gr.State, outputs: list) -> None:
    """Each pair is voted on once: a vote takes it off the server's state."""

    def vote(label: str, pair: Pair | None, request: gr.Request) -> list[Any]:
        with errors_in_words("The vote"):
            if pair is None:
                raise InputError("there is no pair to vote on: make one first")
            append_vote(path, pair.vote(CHOICES[label], request.username or ""))
            told = Markup('<p class="told">{}</p>').format(f"Thank you. {pair.names}")
            return [None, told, standings_html(standings(read_votes(path))), *[gr.Button(interactive=False)] * 3]

    for button in buttons:
        button.click(
            vote,
            [button, state],
            [state, *outputs, *buttons],
            # One at a time: a double click finds the pair gone.
            concurrency_limit=1,
            concurrency_id="votes",
            trigger_mode="once",
            show_progress="hidden",
            api_visibility="private",
        )
