"""Runs the project's commands as a user does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_script(*arguments: str | Path, check: bool = True, **options) -> subprocess.CompletedProcess:
    """Runs one of the project's commands with this Python, from the repository's root, and captures what it prints."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)
    assert not check or done.returncode == 0, f"{command} gave {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done


def launcher(num_processes: int, *options: str) -> list[str]:
    """`accelerate launch` on CPU. Two processes there need --multi_gpu: --cpu would start one."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    several = ["--multi_gpu"] if num_processes > 1 and "--use_deepspeed" not in options else []
    plain = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port]
    return ["-m", "accelerate.commands.launch", *several, "--num_processes", str(num_processes), *plain, *options]


def launch(num_processes: int, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess:
    """Runs one of the project's commands on several CPU processes."""
    return run_script(
        *launcher(num_processes), *arguments, check=check, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
