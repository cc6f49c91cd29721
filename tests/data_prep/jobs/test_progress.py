"""The live bar needs a terminal; the lines for a file are tested with the cache."""

import pty
import subprocess
import sys
from os import close, read
from pathlib import Path

SHOW = """
from data_prep.jobs.progress import progress
with progress("caching", 4) as advance:
    for _ in range(4):
        advance(1)
"""


def test_a_terminal_gets_a_bar_with_the_rate():
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SHOW], stderr=theirs, cwd=Path(__file__).parents[3], env={"TERM": "xterm"}
    )
    close(theirs)
    shown = b""
    try:
        while chunk := read(ours, 4096):
            shown += chunk
    except OSError:  # Linux: the other end is closed
        pass
    close(ours)
    assert process.wait() == 0
    assert b"4/4" in shown
    assert b"samples/s" in shown
    assert b"left" in shown
