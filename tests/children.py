"""The processes that tests start: with the signals of a foreground job, in a session of their own, and ended whatever
happens."""

import ctypes
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 1500
"""Seconds that a test waits for what must come. It measures nothing: a busy machine takes its time."""
GRACE = 60
"""Seconds in which what a test has left must end by itself, as a pool does whose main process is gone."""
SET_CHILD_SUBREAPER = 36
"""Of Linux' prctl."""
kept: set[int] = set()
"""Processes that serve a whole session."""


def take_charge() -> None:
    """Makes this process one whose children have a foreground job's signals, and that finds whatever they leave behind.

    A shell ignores Ctrl-C in what it starts in the background, and so does all that is started from there. Processes whose
    parent has ended become children of this one. SIGTERM ends the session in order, so that they are ended too.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, _: pytest.exit("ended by SIGTERM", returncode=128 + number))
    ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@contextmanager
def started(command: Sequence[str | Path], **options: Any) -> Iterator[subprocess.Popen]:
    """A process in a session of its own, from the repository's root. It is killed with all that it started when the block
    is left.

    Args:
        options: of `subprocess.Popen`.
    """
    words = [str(word) for word in command]
    with subprocess.Popen(words, **{"cwd": ROOT, "start_new_session": True} | options) as process:
        try:
            yield process
        finally:
            running = process.poll() is None
            family = psutil.Process(process.pid).children(recursive=True) if running else []
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            end(family)


def run(command: Sequence[str | Path], timeout: float = PATIENCE, **options: Any) -> subprocess.CompletedProcess:
    """`subprocess.run` with captured text, of a process that is `started`."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with started(command, **pipes | options) as process:
        stdout, stderr = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def wait_until(condition: Callable[[], Any], process: subprocess.Popen | None = None) -> None:
    """Returns as soon as the condition is true, which the process must live to see.

    Raises:
        TimeoutError: it does not become true.
    """
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process is None or process.poll() is None, f"{process.args} has ended too early"
        if time.monotonic() > deadline:
            raise TimeoutError(f"still waiting after {PATIENCE} s")
        time.sleep(0.005)


def descendants() -> list[psutil.Process]:
    """All that this process and its children have started and that still runs, but what serves the whole session."""
    forkserver, tracker = multiprocessing.forkserver._forkserver, multiprocessing.resource_tracker._resource_tracker
    known = kept | {forkserver._forkserver_pid, tracker._pid}
    return [
        process for process in psutil.Process().children(recursive=True) if process.pid not in known and runs(process)
    ]


def runs(process: psutil.Process) -> bool:
    """Whether it has not ended; a zombie has."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def left_running(grace: float = GRACE) -> list[str]:
    """The command lines of all that does not end by itself. It is ended here."""
    deadline = time.monotonic() + grace
    while (left := descendants()) and time.monotonic() < deadline:
        time.sleep(0.05)
    said = [f"{process.pid}: {words(process)}" for process in left]
    end(left)
    return said


def words(process: psutil.Process) -> str:
    """Its command line."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return "has just ended"


def end(processes: list[psutil.Process]) -> None:
    """Kills them, and returns when they are gone."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    for process in processes:
        wait_until(lambda process=process: not runs(process))
