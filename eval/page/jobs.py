"""The line of edits for the one device, each to be stopped by whoever started it, and errors said in words."""

import html
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import gradio as gr

from data_prep.errors import InputError, is_out_of_memory
from eval.request.request import OnProgress

MAX_WAITING = 64
"""Edits in the line; who comes then is told to try again."""
Stopped = Literal["running", "waiting", "none"]
STOPPED: dict[Stopped, str] = {
    "running": "It stops at its next step.",
    "waiting": "It left the queue.",
    "none": "No edit of this tab is running or waiting.",
}

logger = logging.getLogger("page")


class LineIsFull(InputError):
    """Too many edits are waiting; one that comes later may have a place."""


class Cancelled(Exception):
    """The edit was stopped by the person who asked for it."""


@dataclass(eq=False)
class _Job:
    session: str
    tab: str
    stop: threading.Event = field(default_factory=threading.Event)


class Jobs:
    """Edits in the order in which they came. The first has the device, the others wait, in threads of their own: a line of
    our own and not Gradio's, which cannot say of a cancelled edit whether it was running, and shows it as an error."""

    def __init__(self):
        self._moved = threading.Condition()
        self._line: list[_Job] = []

    @contextmanager
    def running(
        self, session: str, tab: str, progress: gr.Progress, label: str, counted: bool = True
    ) -> Iterator[OnProgress]:
        """Waits for the device. Yields what an editor calls after each step: it ends the edit once it is cancelled.

        Args:
            session: whose edit it is.
            tab: where it was asked for; each tab has its own button to cancel.
            progress: the bar.
            label: written beside it.
            counted: whether the bar shows the steps.

        Raises:
            LineIsFull: too many wait.
            Cancelled: while it waits, or from inside the edit.
        """
        job = self._join(session, tab)
        try:
            self._wait(job, progress)
            _say(progress, "Preparing" if counted else label)

            def on_progress(done: int, total: int) -> None:
                if job.stop.is_set():
                    raise Cancelled
                if counted:
                    progress((done, total), desc=label)

            yield on_progress
        finally:
            with self._moved:
                self._line.remove(job)
                self._moved.notify_all()

    def _join(self, session: str, tab: str) -> _Job:
        job = _Job(session, tab)
        with self._moved:
            if len(self._line) > MAX_WAITING:
                raise LineIsFull(f"{MAX_WAITING} edits are waiting already: try again later")
            self._line.append(job)
        return job

    def _wait(self, job: _Job, progress: gr.Progress) -> None:
        with self._moved:
            while before := self._line.index(job):
                if job.stop.is_set():
                    raise Cancelled
                _say(progress, f"Waiting: {before} before this one")
                self._moved.wait()
        if job.stop.is_set():
            raise Cancelled

    def cancel(self, session: str, tab: str) -> Stopped:
        """Ends that tab's edit at its next step, or takes it out of the line. Returns which of them."""
        with self._moved:
            ours = [(place, job) for place, job in enumerate(self._line) if (job.session, job.tab) == (session, tab)]
            self._stop([job for _, job in ours])
            if not ours:
                return "none"
            return "running" if ours[0][0] == 0 else "waiting"

    def leave(self, session: str) -> None:
        """The same for all of a session: its page was closed."""
        with self._moved:
            self._stop([job for job in self._line if job.session == session])

    @property
    def waiting(self) -> int:
        """How many wait for the one that has the device."""
        with self._moved:
            return max(len(self._line) - 1, 0)

    def cancel_all(self) -> None:
        """For the end of the program."""
        with self._moved:
            self._stop(self._line)

    def _stop(self, jobs: list[_Job]) -> None:
        for job in jobs:
            job.stop.set()
        self._moved.notify_all()


def _say(progress: gr.Progress, words: str) -> None:
    """Gradio shows no words without a share, "words - 0.0%". The style sheet hides the second line, where it comes to stand."""
    progress(0, desc=f"{words}\n")


def say_stopped(stopped: Stopped) -> None:
    """The answer to the cancel button."""
    gr.Info(STOPPED[stopped], title="Cancel", duration=4)


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
    if is_out_of_memory(error):
        return "there is not enough memory on the device. A smaller result, fewer references or a count of 1 need less."
    return f"{type(error).__name__}. The log of the program says more."
