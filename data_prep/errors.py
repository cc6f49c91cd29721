"""The error for users' mistakes, and how every entry point ends."""

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """The configuration or the input is wrong. The message says in one or two sentences what, where, and the way out."""


class BadPrompt(InputError):
    """An instruction that the text encoder cannot take; the other rows are not concerned."""


class Interrupted(Exception):
    """Ctrl-C ended something that does not go on where it was. The message says what is left of it."""


NO_MEMORY = ("can't allocate memory", "not enough memory", "CUDA error: out of memory")
"""What torch says when the CPU's allocator fails, on Linux and elsewhere, and when pinned memory cannot be had."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the device or of the machine has run out; torch has no exception of its own for the latter."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


@contextmanager
def exit_codes() -> Iterator[None]:
    """Ends the process with code 2 and a plain message on `InputError`, with its traceback and code 1 on anything else.

    Among several processes the others may be waiting for this one: it leaves at once, without the goodbyes that would wait
    for them, and the launcher ends them. An error of the input is usually everybody's; ranks other than 0 wait a moment
    before they repeat it.
    """
    rank, several = os.environ.get("RANK", "0"), int(os.environ.get("WORLD_SIZE", "1")) > 1
    try:
        yield
    except InputError as error:
        if several and rank != "0":
            time.sleep(3)
        print(f"{f'rank {rank}: ' if several else ''}error: {error}", file=sys.stderr, flush=True)
        _leave(2, several)
    except Exception as error:
        if is_out_of_memory(error):
            error.add_note(
                "The same command with phases=[plan] shows what needs how much memory, and which settings need less."
            )
        if not several:
            raise
        traceback.print_exc()
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
        print(f"rank {rank} failed: {type(error).__name__}: {error}{notes}", file=sys.stderr, flush=True)
        _leave(1, several)


def _leave(code: int, at_once: bool) -> None:
    if at_once:
        os._exit(code)
    raise SystemExit(code) from None
