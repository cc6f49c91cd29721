"""How far a long job is: a live bar on a terminal, a line now and then in a file."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0
SECONDS_ESTIMATED = 600.0
"""The time left is estimated by what was done in the last so many: a step of a large model may take a minute."""


@contextmanager
def progress(title: str, total: int | None, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Shows samples done, samples per second and the time left, on stderr.

    Args:
        title: what is being done, e.g. `caching`.
        total: samples to do; None if that is not known.
        shown: False on the ranks that keep quiet.

    Yields:
        `advance(n)`: n more samples are done.
    """
    console = Console(stderr=True)
    if not shown or total == 0:
        yield lambda _: None
    elif console.is_terminal:
        with _bar(console) as bar:
            yield _Bar(bar, bar.add_task(title, total=total, rate="")).advance
    else:
        yield _Lines(title, total, console).advance


@contextmanager
def step_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Shows the steps done, the steps in all and the time left of something that tells its length with its first step, on stderr.

    On a terminal there is a bar from the beginning; in a file there is a line now and then, and none for what is short.
    What comes before the first step, such as loading a model, does not count for the time left.

    Args:
        title: what the steps are of, e.g. `steps`.

    Yields:
        `show(done, total)`: so many steps are done.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _StepLines(title, console).show
        return
    with _bar(console) as bar:
        task = bar.add_task(title, total=None, rate="")
        yield lambda done, total: bar.update(task, total=total, completed=done)


@dataclass
class TimeLeft:
    """The time until the last step, by how long those since the first call of `told` took: what came before does not count."""

    first: tuple[int, float] | None = None
    """The steps done then, and when that was."""

    def told(self, done: int) -> None:
        """So many steps are done."""
        if self.first is None:
            self.first = done, time.monotonic()

    def seconds(self, done: int, total: int) -> float | None:
        """None while no step has been timed."""
        before, since = self.first or (done, 0.0)
        return (time.monotonic() - since) / (done - before) * (total - done) if done > before else None


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    left = (TextColumn("left"), TimeRemainingColumn())
    return Progress(*columns, *left, console=console, speed_estimate_period=SECONDS_ESTIMATED)


class _Bar:
    def __init__(self, bar: Progress, task: TaskID):
        self.bar, self.task, self.done, self.start = bar, task, 0, time.monotonic()

    def advance(self, count: int) -> None:
        self.done += count
        rate = self.done / max(time.monotonic() - self.start, 1e-9)
        self.bar.update(self.task, advance=count, rate=f"{rate:.1f} samples/s")


class _Lines:
    def __init__(self, title: str, total: int | None, console: Console):
        self.title, self.total, self.console = title, total, console
        self.done, self.start = 0, time.monotonic()
        self.last_line = self.start

    def advance(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if self.done != self.total and now - self.last_line < SECONDS_BETWEEN_LINES:
            return
        self.last_line = now
        rate = self.done / max(now - self.start, 1e-9)
        of, left = "", ""
        if self.total is not None:
            seconds = (self.total - self.done) / max(rate, 1e-9)
            of, left = f"/{self.total}", f", {time.strftime('%H:%M:%S', time.gmtime(seconds))} left"
        self.console.print(f"{self.title} {self.done}{of}, {rate:.1f} samples/s{left}", highlight=False, soft_wrap=True)


class _StepLines:
    def __init__(self, title: str, console: Console):
        self.title, self.console = title, console
        self.left, self.last_line = TimeLeft(), time.monotonic()

    def show(self, done: int, total: int) -> None:
        if self.left.first is None:
            self.last_line = time.monotonic()
        self.left.told(done)
        seconds = self.left.seconds(done, total)
        if seconds is None or time.monotonic() - self.last_line < SECONDS_BETWEEN_LINES:
            return
        self.last_line = time.monotonic()
        left = time.strftime("%H:%M:%S", time.gmtime(seconds))
        self.console.print(f"{self.title} {done}/{total}, {left} left", highlight=False, soft_wrap=True)
