"""What all tabs of the page share."""

from abc import ABCMeta
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.component_meta import ComponentMeta
from gradio.data_classes import ImageData

from eval.page.jobs import Jobs
from eval.page.limits import Limits
from eval.request.base import BaseEditor
from eval.request.provenance import without_places
from eval.request.request import EditRequest, EditResult, OnProgress
from train.model.adapter_files import adapter_file
from train.record.lookup import FoundAdapter, found_adapters

QUIET: dict[str, Any] = {"concurrency_limit": None, "api_visibility": "private", "show_progress": "hidden"}
"""For handlers that take a moment. They too go through Gradio's queue: without it, their errors never reach the page."""

EDITING: dict[str, Any] = QUIET | {"trigger_mode": "once"}
"""For handlers that edit: they wait for the device in `Studio.jobs`, and show by themselves how far they are."""
ZOOM_HINT = "Scroll or pinch to zoom both pictures, drag to move them."


@dataclass(frozen=True)
class Example:
    """A source and its instruction, from the data set of a user study."""

    image: Path
    prompt: str


@dataclass
class Studio:
    """One editor, and where its pictures, votes, adapters and runs are."""

    editor: BaseEditor
    title: str
    """Model and device, shown under the heading."""
    out: Path
    """The folder of everything that the page writes; nothing else is served."""
    runs: Path
    """Where adapters and training runs are found."""
    limits: Limits = field(default_factory=Limits)
    examples: list[Example] = field(default_factory=list)
    """What comparisons may be drawn from; may be empty."""
    first_adapter: str | None = None
    """Chosen when the page opens; by default none."""

    @property
    def cache(self) -> Path:
        """Uploads and pictures on display."""
        return self.out / "cache"

    @property
    def votes_file(self) -> Path:
        """Not served."""
        return self.out / "votes.jsonl"

    @cached_property
    def jobs(self) -> Jobs:
        """Edits in progress."""
        return Jobs()

    def adapters(self) -> list[FoundAdapter]:
        """Those that are there now."""
        return found_adapters(self.runs)

    def edit(self, request: EditRequest, on_progress: OnProgress) -> list[EditResult]:
        """The editor's results, whose settings call models and adapters by their names: what leaves this machine says nothing of
        its folders."""
        names = {str(adapter_file(each.path).resolve()): each.name for each in self.adapters()}
        results = self.editor.edit(request, on_progress)
        return [replace(each, settings=without_places(each.settings, names)) for each in results]


class Unstubbed(ComponentMeta):
    """Gradio's own metaclass writes a `.pyi` file beside the module of every new component."""

    def __new__(cls, name: str, bases: tuple[type, ...], attributes: dict[str, Any]) -> type:
        return ABCMeta.__new__(cls, name, bases, attributes)


class PictureInput(gr.Image, metaclass=Unstubbed):
    """An upload of which the page gets the file itself, untouched, whatever is inside.

    `gr.Image` opens the file before the page sees it, and answers a wrong one with an error of its own.
    """

    is_template = True

    def preprocess(self, payload: ImageData | None) -> str | None:
        """The path of the uploaded file."""
        return payload.path if payload else None


def picture_input(label: str, height: int, elem_id: str, **options: Any) -> PictureInput:
    """A box to drop a picture into, or to paste one."""
    buttons: Any = ["fullscreen"]
    return PictureInput(
        label=label, height=height, elem_id=elem_id, sources=["upload", "clipboard"], buttons=buttons, **options
    )


def session_of(request: gr.Request) -> str:
    """Whose click it is."""
    return request.session_hash or ""
