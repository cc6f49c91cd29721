"""A wish that training stops early, from a signal or from the launcher."""

import os
import signal
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

FOLDER = "LAUNCH_FOLDER"
"""The environment variable with which `scripts/launch.sh` names a folder: a file `stop` in it is the wish, and a file for each
process that trains tells the launcher whom to wait for."""
IMPATIENCE = 2.0
"""Seconds after which a further Ctrl-C ends the process at once. One key press may arrive twice, through the launcher too."""


class StopRequest:
    """Whether training was asked to stop, by SIGTERM, SIGUSR1, Ctrl-C or the launcher, or has lost its launcher.

    A context, in which these signals ask instead of ending the process.

    Attributes:
        exit_code: exit code of a process that did as it was asked: 128 plus the signal's number, as in shells; 0 if the launcher
            asked, which knows.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self):
        self.exit_code = 0
        self._reason = ""
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}
        self._folder = Path(os.environ[FOLDER]) if FOLDER in os.environ else None
        launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
        self._launcher = os.getppid() if launched else None

    @property
    def reason(self) -> str:
        """Who asked, in words; empty if nobody did."""
        if not self._reason and self._folder and (self._folder / "stop").exists():
            self._reason = "the launcher"
        if not self._reason and self._launcher not in (None, os.getppid()):
            self._reason, self.exit_code = "the end of its launcher", 1
        return self._reason

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._reason and time.monotonic() - self._since > IMPATIENCE:
            raise KeyboardInterrupt
        if not self._reason:
            self._since = time.monotonic()
            self._reason, self.exit_code = signal.Signals(number).name, 128 + number

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._ask) for number in self.SIGNALS}
        if self._folder:
            self._sign().touch()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self._folder:
            self._sign().unlink(missing_ok=True)

    def _sign(self) -> Path:
        assert self._folder
        return self._folder / f"pid-{os.getpid()}"
