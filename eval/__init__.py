"""What an adapter is good for: edits, tables of edits, scores, reports, the page. The files here are the commands.

Rooms, from the top: page; report; exports; scores; tables; bases; qwen; request. Imports train, data_prep and losses.

From Python, `from eval import AdapterUse, EditRequest, open_editor, open_image` is what an edit takes (docs/editing.md).
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_prep.rows.images import open_image as open_image
    from eval.bases.auto import open_editor as open_editor
    from eval.request.knobs import AdapterUse as AdapterUse
    from eval.request.request import EditRequest as EditRequest

PLACES = {
    "open_editor": "eval.bases.auto",
    "open_image": "data_prep.rows.images",
    "EditRequest": "eval.request.request",
    "AdapterUse": "eval.request.knobs",
}


def __getattr__(name: str) -> object:
    """These are imported when they are asked for: a command that checks its options first does not wait for torch."""
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(PLACES[name]), name)
