"""The line of edits for the one device, each to be stopped by whoever started it, and errors said in words."""

import contextvars
import html
import logging
import math
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import gradio as gr
from markupsafe import Markup

from data_prep.errors import InputError, is_out_of_memory
from data_prep.jobs.progress import TimeLeft
from eval.request.request import OnProgress

MAX_WAITING = 64
"""Edits in the line; who comes then is told to try again."""
EVERY = 0.25
"""Seconds between two looks at how far an edit is."""
Stopped = Literal["running", "waiting", "none"]
STOPPED: dict[Stopped, str] = {
    "running": "It stops at its next step.",
    "waiting": "It left the queue.",
    "none": "No edit of this tab is running or waiting.",
}

OnStatus = Callable[[tuple[int, int] | None, str], None]
"""Told of an edit's steps, done and in all (None: there is nothing to count), and of what it does."""
Result = TypeVar("Result")

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
        self, session: str, tab: str, on_status: OnStatus, label: str, counted: bool = True
    ) -> Iterator[OnProgress]:
        """Waits for the device. Yields what an editor calls after each step: it ends the edit once it is cancelled.

        Args:
            session: whose edit it is.
            tab: where it was asked for; each tab has its own button to cancel.
            on_status: is told how it goes.
            label: what the edit does.
            counted: whether its steps are told.

        Raises:
            LineIsFull: too many wait.
            Cancelled: while it waits, or from inside the edit.
        """
        job = self._join(session, tab)
        try:
            self._wait(job, on_status)
            on_status(None, "Preparing" if counted else label)

            def on_progress(done: int, total: int) -> None:
                if job.stop.is_set():
                    raise Cancelled
                if counted:
                    on_status((done, total), label)

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

    def _wait(self, job: _Job, on_status: OnStatus) -> None:
        with self._moved:
            while before := self._line.index(job):
                if job.stop.is_set():
                    raise Cancelled
                on_status(None, f"Waiting: {before} before this one")
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


@dataclass
class Status:
    """What an edit last said of itself, and that as a line with a bar."""

    words: str = ""
    steps: tuple[int, int] | None = None
    """Done and in all."""
    left: TimeLeft = field(default_factory=TimeLeft)

    def __call__(self, steps: tuple[int, int] | None, words: str) -> None:
        """An `OnStatus`."""
        if steps:
            self.left.told(steps[0])
        self.words, self.steps = words, steps

    def html(self) -> Markup:
        """For the page."""
        if not self.steps:
            return Markup('<div class="status told">{}<progress></progress></div>').format(self.words)
        done, total = self.steps
        line = f"{self.words}: step {done:,} of {total:,}{_time_left(self.left.seconds(done, total))}"
        bar = Markup('<progress value="{}" max="{}"></progress>').format(done, total)
        return Markup('<div class="status told">{}{}</div>').format(line, bar)


def _time_left(left: float | None) -> str:
    if left is None:
        return ""
    return f", {math.ceil(left)} s left" if left < 100 else f", {math.ceil(left / 60)} min left"


def follow(work: Callable[[OnStatus], Result]) -> Generator[Markup, None, Result]:
    """Runs `work` in a thread of its own. Yields what to show of it whenever that has changed; returns its result, or raises what
    it raises.

    Gradio's own bar cannot do without a share ("Waiting - 0.0%") and shortens counts ("413/1.0k").
    """
    status = Status()
    pool = ThreadPoolExecutor(1, "edit")
    try:
        future = pool.submit(contextvars.copy_context().run, work, status)  # the context knows to whom messages go
        shown = Markup()
        while wait([future], timeout=EVERY).not_done:
            if (now := status.html()) != shown and status.words:
                shown = now
                yield shown
        return future.result()
    finally:
        pool.shutdown(wait=False)


def problem_html(error: gr.Error) -> Markup:
    """An error where the progress was: it stays until the next edit begins."""
    # The message is HTML already.
    return Markup('<p class="problem told" role="alert"><b>{}:</b> {}</p>').format(
        error.title, Markup(str(error.message))
    )


def shown_edit(doing: str, work: Callable[[OnStatus], list[Any]], count: int) -> Generator[list[Any], None, None]:
    """What a button's handler yields: updates of `count` components that show the result, and of the line with the progress.

    Args:
        doing: as `errors_in_words` has it.
        work: makes the edit; returns the components' values.
        count: of them.
    """
    kept = [gr.skip()] * count
    line: Markup | str = ""
    try:
        with errors_in_words(doing):
            steps = follow(work)
            while True:
                try:
                    yield [*kept, next(steps)]
                except StopIteration as end:
                    kept = end.value
                    break
    except Cancelled:
        pass
    except gr.Error as error:
        line = problem_html(error)
    yield [*kept, line]


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
