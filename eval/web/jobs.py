"""Edits in progress, so that each can be stopped by whoever started it, and errors said in words."""

import html
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr

from data_prep.errors import InputError
from eval.request import OnProgress

DEVICE_QUEUE = "device"
"""The queue that all edits wait in, whatever tab they come from: one at a time."""

logger = logging.getLogger("page")


class Cancelled(Exception):
    """The edit was stopped by the person who asked for it."""


class Jobs:
    """Who is editing. A person (a session of the page) has at most one edit running, because the device has one."""

    def __init__(self):
        self._lock = threading.Lock()
        self._running: dict[str, threading.Event] = {}

    @contextmanager
    def running(self, session: str, progress: gr.Progress, label: str) -> Iterator[OnProgress]:
        """Yields what an editor calls after each step: it shows the progress, and ends the edit once it is cancelled.

        Args:
            session: whose edit it is.
            progress: the bar.
            label: written beside it.

        Raises:
            Cancelled: from inside the edit.
        """
        stop = threading.Event()
        with self._lock:
            self._running[session] = stop

        def on_progress(done: int, total: int) -> None:
            if stop.is_set():
                raise Cancelled
            progress((done, total), desc=label)

        try:
            progress(0, desc="Preparing")
            yield on_progress
        finally:
            with self._lock:
                self._running.pop(session, None)

    def cancel(self, session: str) -> bool:
        """Ends a session's edit at its next step. Returns whether one was running."""
        with self._lock:
            stop = self._running.get(session)
        if stop:
            stop.set()
        return stop is not None

    def cancel_all(self) -> None:
        """For the end of the program."""
        with self._lock:
            for stop in self._running.values():
                stop.set()


def say_stopped(was_running: bool) -> None:
    """The answer to the cancel button."""
    gr.Info(
        "It stops at its next step." if was_running else "None of your edits is running.", title="Cancel", duration=4
    )


@contextmanager
def errors_in_words(doing: str) -> Iterator[None]:
    """What goes wrong is a sentence on the page; what is not the user's to mend is also in the log, with its traceback.

    Args:
        doing: what failed, as the beginning of a sentence: "The edit".
    """
    try:
        yield
    except (Cancelled, gr.Error):
        raise
    except InputError as error:
        # The page renders messages as HTML, and this one may hold a file's name.
        raise gr.Error(html.escape(str(error)), title="Please check", print_exception=False) from None
    except Exception as error:
        logger.exception("%s failed", doing)
        raise gr.Error(f"{doing} failed: {_in_words(error)}", title="Failed", print_exception=False) from None


def _in_words(error: Exception) -> str:
    if type(error).__name__ == "OutOfMemoryError":
        return "there is not enough memory on the device. A smaller result, fewer references or a count of 1 need less."
    return f"{type(error).__name__}. The log of the program says more."
