"""Two edits to choose between: made blind, and kept on the server until the vote."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from gradio.processing_utils import save_file_to_cache
from PIL import Image

from data_prep.errors import InputError
from data_prep.rows.images import file_digest
from eval.page.limits import read_picture
from eval.page.studio import Studio
from eval.page.tabs.fields import MAX_SEED
from eval.page.tabs.form import chosen_adapters
from eval.page.tabs.knob_fields import BY_FIELD, knob_value, whole
from eval.page.tabs.votes import Choice, Contestant, Vote
from eval.request.request import EditRequest, EditResult, OnProgress

DRAWN = -1
"""In the seed's field: draw one."""


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
    studio: Studio, values: dict[str, Any], on_progress: OnProgress, order: random.Random
) -> tuple[Image.Image, Image.Image, Pair]:
    """Both edits. `order` draws which is A, and by itself which is made first: neither tells of the other.

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
    seed = order.randint(0, MAX_SEED) if values["seed"] in (None, DRAWN) else whole(values["seed"], "seed")
    source = read_picture(values["source"], studio.limits)
    sides = [(name, chosen_adapters(name, 1.0, found)) for name in (first, second)]
    order.shuffle(sides)
    steps = knob_value(BY_FIELD["steps"], values["steps"])
    base = EditRequest(values["prompt"].strip(), [source], seed=seed, steps=steps)
    requests = [replace(base, adapters=uses) for _, uses in sides]
    for request in requests:
        studio.editor.check(request)
    a, b = _edit_in_any_order(studio, requests, on_progress, order)
    contestants = [contestant(name, result) for (name, _), result in zip(sides, (a, b), strict=True)]
    digests = (_pixels_digest(a.image), _pixels_digest(b.image))
    pair = Pair(contestants[0], contestants[1], base.prompt, seed, file_digest(values["source"]), digests)
    return a.image, b.image, pair


def _edit_in_any_order(
    studio: Studio, requests: Sequence[EditRequest], on_progress: OnProgress, order: random.Random
) -> list[EditResult]:
    """In the order of the requests, whichever was made first."""
    results: dict[int, EditResult] = {}
    for number in order.sample(range(len(requests)), len(requests)):
        results[number] = studio.editor.edit(requests[number], on_progress)[0]
    return [results[number] for number in range(len(requests))]


def contestant(name: str, result: EditResult) -> Contestant:
    """As the result itself says that it was made: a file may have been replaced since."""
    made = result.settings
    adapter = made["adapters"][0] if made["adapters"] else {"digest": "", "weight": 1.0}
    sampler = ", ".join(f"{key}={value}" for key, value in sorted(made["sampler"].items()))
    return Contestant(
        name, adapter["digest"], adapter["weight"], made["base"], made["model_fingerprint"], made["steps"], sampler
    )


def _pixels_digest(image: Image.Image) -> str:
    return hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest()


def draw_example(studio: Studio, order: random.Random) -> tuple[str, str]:
    """One of the studio's examples: a copy of its file, byte for byte, where the page may show it; and its instruction.

    Raises:
        InputError: the picture cannot be read.
    """
    example = order.choice(studio.examples)
    read_picture(str(example.image), studio.limits)
    return save_file_to_cache(example.image, str(studio.cache)), example.prompt
