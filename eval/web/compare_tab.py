"""The second tab: two adapters side by side, blind, and how people voted."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup, escape
from PIL import Image

from data_prep.errors import InputError
from data_prep.images import file_digest
from eval.metadata import adapter_file
from eval.request import AdapterUse, EditRequest
from eval.web.fields import MAX_SEED, adapter_names
from eval.web.form import BASE_MODEL, chosen_adapters
from eval.web.jobs import DEVICE_QUEUE, Cancelled, errors_in_words, say_stopped
from eval.web.limits import read_picture
from eval.web.studio import Studio, picture_input, session_of
from eval.web.votes import Choice, Contestant, Standing, Vote, append_vote, read_votes, standings

FILE = "votes.jsonl"
DRAWN = -1
"""In the seed's field: draw one."""
CHOICES: dict[str, Choice] = {"A is better": "A", "No difference": "tie", "B is better": "B"}
EXPLANATION = (
    "Two adapters make the same edit from the same seed. Which is A and which is B is drawn anew each time, and told "
    "only after the vote."
)
COUNTED = (
    "The win rate is the first adapter's share of the votes that decided; “no difference” counts for neither. "
    "The interval is Wilson's, 95 %: the smaller it is, and the farther from 50 %, the surer the result."
)


@dataclass(frozen=True)
class Pair:
    """What is on display, as the server keeps it: everything of a vote but the choice."""

    a: Contestant
    b: Contestant
    prompt: str
    seed: int
    source: str
    images: tuple[str, str]

    def vote(self, choice: Choice, voter: str) -> Vote:
        """The vote, made now."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return Vote(now, self.a, self.b, choice, self.prompt, self.seed, self.source, self.images, voter)

    @property
    def names(self) -> str:
        """Which was which, in words."""
        return f"A was {self.a.name}, B was {self.b.name}."


def make_pair(
    studio: Studio, values: dict[str, Any], on_progress: Any, order: random.Random
) -> tuple[Image.Image, Image.Image, Pair]:
    """Both edits, in an order drawn by `order`.

    Raises:
        InputError: something is missing, or both are the same.
    """
    first, second = values["first"], values["second"]
    if first == second:
        raise InputError("choose two different adapters to compare")
    if not values["source"]:
        raise InputError("choose a source picture first")
    if not (values["prompt"] or "").strip():
        raise InputError("write an instruction: what should change?")
    found = studio.adapters()
    seed = order.randint(0, MAX_SEED) if values["seed"] in (None, DRAWN) else int(values["seed"])
    source = read_picture(values["source"], studio.limits)
    sides = [(name, chosen_adapters(name, 1.0, found)) for name in (first, second)]
    order.shuffle(sides)
    base = EditRequest(values["prompt"].strip(), [source], seed=seed, steps=values["steps"] or None)
    requests = [replace(base, adapters=uses) for _, uses in sides]
    for request in requests:
        studio.editor.check(request)
    images = [
        studio.editor.edit(request, _part_of(on_progress, number, len(requests)))[0].image
        for number, request in enumerate(requests)
    ]
    a, b = (_contestant(name, uses) for name, uses in sides)
    digests = (_pixels_digest(images[0]), _pixels_digest(images[1]))
    pair = Pair(a, b, base.prompt, seed, file_digest(values["source"]), digests)
    return images[0], images[1], pair


def _part_of(on_progress: Any, number: int, parts: int) -> Any:
    """Progress of one of several edits as progress of all, which says nothing about each."""
    return lambda done, total: on_progress(number * total + done, parts * total)


def _contestant(name: str, uses: Sequence[AdapterUse]) -> Contestant:
    return Contestant(name, file_digest(adapter_file(uses[0].path)) if uses else "")


def _pixels_digest(image: Image.Image) -> str:
    return hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest()


def standings_html(tables: Sequence[Standing]) -> Markup:
    """Who won against whom, with the interval drawn on a line from 0 to 100 %."""
    if not tables:
        return Markup('<p class="quiet">No votes yet.</p>')
    head = (
        "<tr><th>adapter</th><th>against</th><th>wins</th><th>losses</th><th>ties</th><th>win rate</th><th></th></tr>"
    )
    return Markup(f'<table class="standings"><thead>{head}</thead><tbody>{"".join(map(_row, tables))}</tbody></table>')


def _row(table: Standing) -> str:
    rate, interval = table.win_rate, table.interval
    if rate is None or interval is None:
        shown, bar = "–", ""
    else:
        shown = f"{rate:.0%} <small>({interval.low:.0%} – {interval.high:.0%})</small>"
        place = f"left:{interval.low:.1%};width:{interval.high - interval.low:.1%}"
        bar = f'<div class="interval"><i style="{place}"></i><b style="left:{rate:.1%}"></b></div>'
    names = "".join(f"<td>{_name(each, table)}</td>" for each in (table.first, table.second))
    counts = "".join(f"<td>{count}</td>" for count in (table.wins, table.losses, table.ties))
    return f"<tr>{names}{counts}<td>{shown}</td><td>{bar}</td></tr>"


def _name(contestant: Contestant, table: Standing) -> Markup:
    """With the digest's beginning where two trainings of one name meet."""
    same = table.first.name == table.second.name
    return escape(f"{contestant.name} ({contestant.digest[:6]})" if same else contestant.name)


def build_compare_tab(studio: Studio, page: gr.Blocks) -> None:
    """Lays out the tab inside the page that is being built, and connects it."""
    names, votes_file = adapter_names(studio), studio.out / FILE
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
            fields["prompt"] = gr.Textbox(label="Instruction", lines=2, max_length=4000, elem_id="compare-instruction")
            draw = gr.Button(
                f"Draw one of {len(studio.examples)} examples", visible=bool(studio.examples), elem_id="draw"
            )
            with gr.Row():
                number: dict[str, Any] = {"precision": 0, "min_width": 120}
                fields["seed"] = gr.Number(DRAWN, label="Seed", info="-1: drawn.", elem_id="compare-seed", **number)
                fields["steps"] = gr.Number(
                    0, label="Steps", info="0: what suits each.", elem_id="compare-steps", **number
                )
            with gr.Row():
                run = gr.Button("Make the pair", variant="primary", elem_id="pair", scale=3)
                cancel = gr.Button("Cancel", variant="stop", elem_id="compare-cancel", scale=1, min_width=90)
        with gr.Column(scale=7, min_width=320):
            with gr.Row(elem_id="sides"):
                side: dict[str, Any] = {"format": "png", "interactive": False, "buttons": ["fullscreen"], "height": 380}
                left = gr.Image(label="A", elem_id="side-a", min_width=160, **side)
                right = gr.Image(label="B", elem_id="side-b", min_width=160, **side)
            with gr.Row():
                buttons = [
                    gr.Button(label, interactive=False, elem_id=f"vote-{choice.lower()}", min_width=100)
                    for label, choice in CHOICES.items()
                ]
            told = gr.HTML(elem_id="told")
            gr.HTML("<h3>Results</h3>")
            table = gr.HTML(elem_id="standings")
            gr.HTML(f'<p class="quiet">{COUNTED}</p>')
    state = gr.State(None)
    _connect_pair(studio, fields, (run, cancel), [left, right, state, told, *buttons])
    _connect_votes(votes_file, buttons, state, [told, table])
    plain: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
    draw.click(lambda: _draw(studio), outputs=[fields["source"], fields["prompt"]], **plain)
    page.load(
        lambda: [*[gr.Dropdown(adapter_names(studio))] * 2, standings_html(standings(read_votes(votes_file)))],
        outputs=[fields["first"], fields["second"], table],
        **plain,
    )


def _draw(studio: Studio) -> list[Any]:
    with errors_in_words("Drawing an example"):
        example = random.choice(studio.examples)
        return [read_picture(str(example.image), studio.limits), example.prompt]


def _connect_pair(studio: Studio, fields: dict[str, Any], buttons: tuple[gr.Button, gr.Button], outputs: list) -> None:
    run, cancel = buttons

    def pair(data: dict[Any, Any], request: gr.Request, progress: gr.Progress = gr.Progress()) -> Any:  # noqa: B008
        values = {name: data[field] for name, field in fields.items()}
        try:
            with (
                errors_in_words("The comparison"),
                studio.jobs.running(session_of(request), progress, "Making both") as on_progress,
            ):
                a, b, made = make_pair(studio, values, on_progress, random.SystemRandom())
                return [a, b, made, "", *[gr.Button(interactive=True)] * 3]
        except Cancelled:
            return gr.skip()

    def stop(request: gr.Request) -> None:
        say_stopped(studio.jobs.cancel(session_of(request)))

    started = run.click(
        pair,
        set(fields.values()),
        outputs,
        concurrency_limit=1,
        concurrency_id=DEVICE_QUEUE,
        trigger_mode="once",
        show_progress_on=outputs[:2],
        api_visibility="private",
    )
    cancel.click(stop, cancels=[started], concurrency_limit=None, show_progress="hidden", api_visibility="private")


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
