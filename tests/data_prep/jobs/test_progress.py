"""The live bar needs a terminal; the lines for a file are tested with the cache."""

import pty
import sys
from contextlib import suppress
from os import close, read

import pytest

from tests.children import PATIENCE, started

SHOW = """
from data_prep.jobs.progress import progress
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
