"""Runs the project's commands as a user does."""

import atexit
import functools
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from tests.children import ROOT, kept, run


@functools.cache
def warm_python() -> list[str]:
    """A Python whose libraries are imported already: `tests/warm.py` says how. The first call, in each of pytest's
    workers, starts the server that it asks."""
    if torch.cuda.is_available():  # which forks cannot use
        return [sys.executable]
    path = tempfile.mkdtemp()
    command = [sys.executable, str(ROOT / "tests/warm_server.py"), f"{path}/socket"]
    quiet = {"stderr": subprocess.DEVNULL, "start_new_session": True}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **quiet)
    kept.add(server.pid)
    assert server.stdout
    atexit.register(shutil.rmtree, path)
    atexit.register(server.communicate)
    atexit.register(server.terminate)
    ready = any(line == "ready\n" for line in server.stdout)
    os.environ["WARM_SERVER"] = f"{path}/socket" if ready else ""
    return [sys.executable, "-SE", str(ROOT / "tests/warm.py")]


def warm_programs(folder: Path) -> dict[str, str]:
    """An environment in which bash scripts find a `python` and an `accelerate` whose processes are warm, except for those
    of `eval/` and `data_prep/`."""
    warm, stand_in = shlex.join(warm_python()), ROOT / "tests/warm.py"
    python = f'case "$1" in *train/*.py | *scripts/*.py) exec {warm} "$@" ;; *) exec {sys.executable} "$@" ;; esac'
    launch = f'for word; do [[ /$word != */train/run.py ]] || words+=({stand_in}); words+=("$word"); done'
    accelerate = f'{launch}\nexec {warm} -m accelerate.commands.accelerate_cli "${{words[@]}}"'
    (folder / "bin").mkdir(parents=True)
    for name, text in {"python": python, "accelerate": accelerate}.items():
        (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    path = f"{folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    server = {"WARM_SERVER": os.environ.get("WARM_SERVER", ""), "WARM_PREFIX": str(folder)}
    return server | {"VIRTUAL_ENV": str(folder), "PATH": path}


def run_script(
    *arguments: str | Path, check: bool = True, fresh: bool = False, **options
) -> subprocess.CompletedProcess:
    """Runs one of the project's commands with this Python, from the repository's root, and captures what it prints.

    Args:
        fresh: in a process that imports its libraries itself, as a user's does.
        options: of `tests.children.run`.
    """
    words = [str(argument) for argument in arguments]
    real = fresh or "preexec_fn" in options  # which a fork of another process would not see
    python = [sys.executable] if real else warm_python()
    done = run([*python, *words], **options)
    assert not check or done.returncode == 0, f"{words} gave {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done


def launcher(num_processes: int, *options: str) -> list[str]:
    """`accelerate launch` on CPU. Two processes there need --multi_gpu: --cpu would start one."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    several = ["--multi_gpu"] if num_processes > 1 and "--use_deepspeed" not in options else []
    plain = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port]
    return ["-m", "accelerate.commands.launch", *several, "--num_processes", str(num_processes), *plain, *options]


def launch(
    num_processes: int, *arguments: str | Path, options: tuple[str, ...] = (), **how
) -> subprocess.CompletedProcess:
    """Runs one of the project's commands on several CPU processes.

    Args:
        options: more of `accelerate launch`.
        how: as of `run_script`; `fresh` is about the processes that are launched too.
    """
    stand_in = [] if how.get("fresh") else [ROOT / "tests/warm.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return run_script(*launcher(num_processes, *options), *stand_in, *arguments, env=environment, **how)
