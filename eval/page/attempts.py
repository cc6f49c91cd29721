"""Guessing is slow: who names a wrong password or a wrong key too often waits, with the right one too.

Where all together have named too many, who named the right one of late does not wait for the others.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

WINDOW = 60.0
"""Seconds in which wrong attempts are counted."""
MOST_OF_ONE = 10
"""Wrong attempts of one address in a window."""
MOST_OF_ALL = 100
"""Of all addresses together: one may pose as many, or stand behind a proxy as all."""
KNOWN = 24 * 3600.0
"""Seconds for which an address that named the right password or key does not wait for the wrong attempts of others."""
MOST_KNOWN = 10_000
"""Addresses that are kept as known; beyond it the one that was right longest ago is forgotten."""


@dataclass
class Attempts:
    """Wrong attempts of late, by the address that they came from.

    An attempt counts as wrong from its beginning until it has turned out to be right, so that many at once gain nothing.
    """

    window: float = WINDOW
    of_one: int = MOST_OF_ONE
    of_all: int = MOST_OF_ALL
    clock: Callable[[], float] = time.monotonic
    _wrong: deque[tuple[float, str]] = field(default_factory=deque, init=False, repr=False)
    _right: dict[str, float] = field(default_factory=dict, init=False, repr=False)
    """Address -> when it was last right, the latest at the end."""
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def begin(self, address: str) -> float:
        """Counts an attempt, unless this address has to wait. Returns the seconds that it has to wait: 0 for none."""
        with self._lock:
            now = self.clock()
            while self._wrong and self._wrong[0][0] <= now - self.window:
                self._wrong.popleft()
            own = [moment for moment, other in self._wrong if other == address]
            ends = [own[0]] if len(own) >= self.of_one else []
            known = now - self._right.get(address, -math.inf) < KNOWN
            ends += [self._wrong[0][0]] if len(self._wrong) >= self.of_all and not known else []
            if ends:
                return max(ends) + self.window - now
            self._wrong.append((now, address))
            return 0.0

    def was_right(self, address: str) -> None:
        """Takes the latest attempt of an address back, and knows it."""
        with self._lock:
            self._right.pop(address, None)
            self._right[address] = self.clock()
            if len(self._right) > MOST_KNOWN:
                del self._right[next(iter(self._right))]
            for place in range(len(self._wrong) - 1, -1, -1):
                if self._wrong[place][1] == address:
                    del self._wrong[place]
                    return


def address_of(scope: Scope) -> str:
    """Where a request comes from."""
    client = scope.get("client")
    return str(client[0]) if client else ""


class ThrottledLogin:
    """Answers 429 in place of Gradio's `/login` to who has to wait."""

    def __init__(self, app: ASGIApp, attempts: Attempts):
        self.app, self.attempts = app, attempts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, or hands on and watches what the answer is."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"].rstrip("/") != "/login":
            await self.app(scope, receive, send)
            return
        address = address_of(scope)
        if wait := self.attempts.begin(address):
            seconds = max(1, round(wait))
            said = {"detail": f"Too many wrong attempts: wait {seconds} seconds."}
            await JSONResponse(said, 429, {"Retry-After": str(seconds)})(scope, receive, send)
            return

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] < 400:
                self.attempts.was_right(address)
            await send(message)

        await self.app(scope, receive, watched)
