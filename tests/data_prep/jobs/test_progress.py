"""The live bar needs a terminal; the lines for a file are tested with the cache."""

import pty
import sys
from contextlib import suppress
from os import close, read

import pytest

from data_prep.jobs.progress import step_progress
from tests.children import PATIENCE, started

SHOW = """
from data_prep.jobs.progress import progress, step_progress
with step_progress("steps") as show:
    for step in range(1, 8):
        show(step, 7)
with progress("caching", 4) as advance:
    for _ in range(4):
        advance(1)
"""


@pytest.mark.slow
def test_a_terminal_gets_a_bar_with_the_rate():
    ours, theirs = pty.openpty()
    shown = b""
    with started([sys.executable, "-c", SHOW], stderr=theirs, env={"TERM": "xterm"}) as process:
        close(theirs)
        with suppress(OSError):  # Linux: the other end is closed
            while chunk := read(ours, 4096):
                shown += chunk
        close(ours)
        assert process.wait(PATIENCE) == 0
    assert b"4/4" in shown
    assert b"samples/s" in shown
    assert b"left" in shown
    assert b"7/7" in shown


def test_steps_in_a_file_are_a_line_now_and_then_with_the_time_that_is_left(monkeypatch, capsys):
    """Loading takes 100 seconds here, and each step 4: the first step says nothing, and what came before it does not count."""
    now = 0.0
    monkeypatch.setattr("data_prep.jobs.progress.time.monotonic", lambda: now)
    with step_progress("steps") as show:
        for step in range(1, 8):
            now = 100 + 4.0 * step
            show(step, 7)
    assert capsys.readouterr().err == "steps 4/7, 00:00:12 left\nsteps 7/7, 00:00:00 left\n"


def test_a_short_edit_says_nothing_in_a_file(capsys):
    with step_progress("steps") as show:
        for step in range(1, 5):
            show(step, 4)
    assert capsys.readouterr().err == ""
