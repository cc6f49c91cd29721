"""Imports the libraries once, then forks a process for every command that `warm.py` asks for.

A start of `train/run.py` takes some eight seconds of one core, nearly all of it the import of libraries; a fork has them.
All else is as in a process of its own: the project's modules are forgotten before the first fork, so each command imports
them anew, and it has its own arguments, folder, environment, streams, seeds and exit code.

    python tests/warm_server.py SOCKET
"""

import atexit
import gc
import json
import os
import random
import resource
import runpy
import select
import signal
import socket
import struct
import sys
import threading
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
OWN = ("losses", "data_prep", "train", "eval", "scripts", "tests")
IMPORTED = (
    *("data_prep.run", "datasets", "pycocotools.mask", "train.phases", "train.sweep"),
    *("torchmetrics.functional.image", "accelerate.commands.launch"),
)
READ_ONCE = ("DS_", "HF_", "OMP_NUM_THREADS", "PYTHONHASHSEED", "PYTHONWARNINGS", "TRANSFORMERS_")
"""Environment variables that Python or a library reads when it is started or imported."""


def read_once(environment: dict[str, str]) -> dict[str, str]:
    """The part of an environment that a fork cannot have differently."""
    return {name: value for name, value in environment.items() if name.startswith(READ_ONCE)}


def import_libraries() -> None:
    """All that the commands import, and none of the project's own modules."""
    for name in IMPORTED:
        import_module(name)
    for name in [name for name in sys.modules if name.split(".")[0] in OWN]:
        del sys.modules[name]
    gc.freeze()


def receive(connection: socket.socket) -> tuple[dict, list[int]]:
    """A request, and the three standard streams of who asks."""
    head, streams, *_ = socket.recv_fds(connection, 4, 3)
    length, body = struct.unpack("<I", head)[0], b""
    while len(body) < length:
        body += connection.recv(length - len(body))
    return json.loads(body), streams


def keep(process: int, connection: socket.socket) -> None:
    """Passes signals on to the process and its group, kills it and all that it started when nobody waits any more, and sends
    the status."""
    ended = os.pidfd_open(process)
    while ended not in (ready := select.select([ended, connection], [], [])[0]):
        number = connection.recv(1) if ready else b""
        family = [] if number else psutil.Process(process).children(recursive=True)
        os.killpg(process, number[0] if number else signal.SIGKILL)
        for child in family:  # also one that has a session of its own
            with suppress(psutil.NoSuchProcess):
                child.kill()
        if not number:
            break
    status = os.waitpid(process, 0)[1]
    with suppress(BrokenPipeError):
        connection.sendall(struct.pack("<i", status))


def forked(connection: socket.socket) -> tuple[dict, list[int]] | None:
    """Answers one connection. Returns the request in the process that is to run it, None in the server."""
    request, streams = receive(connection)
    if read_once(request["environment"]) != read_once(dict(os.environ)):
        connection.sendall(b"n")
    elif os.fork() == 0:
        process = os.fork()
        with suppress(PermissionError):  # whichever of the two is first
            os.setpgid(process, process)
        if process == 0:
            return request, streams
        connection.sendall(b"y")
        keep(process, connection)
        os._exit(0)
    for stream in streams:
        os.close(stream)
    return None


def serve(path: str) -> tuple[dict, list[int]]:
    """Accepts requests until the process that started the server is gone. Returns in the forks alone."""
    parent = os.getppid()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        listener.settimeout(1)
        print("ready", flush=True)
        while os.getppid() == parent:
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:  # a keeper has ended; its processor time is the server's now
                    pass
            with suppress(TimeoutError):
                connection = listener.accept()[0]
                with connection:
                    if request := forked(connection):
                        return request
    raise SystemExit


def become(
    arguments: list[str], folder: str, environment: dict[str, str], largest_file: list[int], streams: list[int]
) -> None:
    """Is `python *arguments` up to its end, which `leave` is for."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    resource.setrlimit(resource.RLIMIT_FSIZE, largest_file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    random.seed()
    sys.modules["numpy"].random.seed()
    sys.prefix = environment.get("WARM_PREFIX", sys.prefix)  # where it looks for what it starts in turn
    sys.path[1:1] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.orig_argv = [sys.executable, *arguments]
    if arguments[0] == "-m":
        sys.argv, sys.path[0] = arguments[1:], folder
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).resolve().parent)
        runpy.run_path(arguments[0], run_name="__main__")


def leave(error: BaseException | None) -> None:
    """Ends as Python does after its main module, but for taking down a gigabyte of libraries, which costs seconds."""
    code = error.code if isinstance(error, SystemExit) else int(error is not None)
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    if error and not isinstance(error, SystemExit):
        sys.excepthook(type(error), error, error.__traceback__)
    threading._shutdown()  # waits for threads, and what they leave to the end
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    import_libraries()
    request, streams = serve(sys.argv[1])
    error = None
    try:
        become(**request, streams=streams)
    except BaseException as raised:
        error = raised
    leave(error)
