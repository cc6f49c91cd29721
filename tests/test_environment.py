"""Commands without their environment say how to enter it, and libraries keep to themselves what nobody can act upon."""

import subprocess
import sys

import pytest

from tests.children import ROOT, run

COMMANDS = ["train/run.py", "data_prep/run.py", "scripts/make_tiny_model.py", "scripts/make_demo_data.py"]
COMMANDS += [f"eval/{name}.py" for name in ("edit", "run", "app")]


@pytest.mark.parametrize("command", COMMANDS)
def test_without_packages_a_sentence(command):
    """`-S` leaves out what is installed."""
    done = subprocess.run([sys.executable, "-S", ROOT / command, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert not done.stdout
    assert "source .venv/bin/activate" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_libraries_are_quiet():
    """On a machine without a GPU DeepSpeed and bitsandbytes have something to say at import."""
    done = run([sys.executable, "-c", "import data_prep, deepspeed, bitsandbytes"], cwd=ROOT)
    assert done.returncode == 0
    assert done.stdout + done.stderr == ""
