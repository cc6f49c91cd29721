"""The one kind of error that is the user's to mend, and the exit codes of every entry point."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """The configuration or the input is wrong. The message says in one or two sentences what, where, and the way out."""


@contextmanager
def exit_codes() -> Iterator[None]:
    """Ends the process with code 2 and a plain message on `InputError`; any other exception keeps its traceback and code 1."""
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
