"""The command line of data preparation: help that is quick, and mistakes answered in one sentence."""

import os
import signal
import subprocess
import sys

import pytest
from PIL import Image

from scripts.photographs import SKIMAGE_DATA
from tests.children import PATIENCE, started, wait_until
from tests.commands import run_script

pytestmark = pytest.mark.slow

COMMANDS = ("pairs", "table", "hf", "coco", "overlay", "synth", "mask", "split", "cache", "check")


def test_help_lists_every_command():
    page = run_script("data_prep/run.py", "--help").stdout
    assert all(f" {name} " in page for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example_and_described_options(name):
    page = run_script("data_prep/run.py", name, "--help", env={"COLUMNS": "200", "PATH": ""}).stdout
    assert f"data_prep/run.py {name} " in page
    options = [line for line in page.splitlines() if "--" in line and line.startswith("│")]
    assert len(options) >= 5
    assert all(len(line.strip("│ ").split()) > 3 for line in options), page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pears"], "No such command 'pears'. Did you mean 'pairs'?"),
        (["check", "--datset", "x.json"], "No such option: --datset"),
        (["split", "--dataset"], "Option '--dataset' requires an argument"),
        (["pairs", "--folder", "nowhere"], "nowhere"),
        (
            ["pairs", "--folder", "tests", "--processes", "0"],
            "Invalid value for '--processes': Input should be greater than or equal to 1",
        ),
    ],
)
def test_a_wrong_command_is_one_sentence_and_exit_code_2(arguments, message):
    done = run_script("data_prep/run.py", *arguments, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) <= 2


def test_ctrl_c_is_answered_in_a_line(tmp_path):
    (tmp_path / "photos").mkdir()
    for name in ("coffee.png", "chelsea.png"):
        Image.open(SKIMAGE_DATA / name).save(tmp_path / "photos" / name)
    options = ["--images", tmp_path / "photos", "--out", tmp_path / "out", "--per-image", "900", "--processes", "2"]
    command = [sys.executable, "data_prep/run.py", "synth", *map(str, options)]
    with started(command, stderr=subprocess.PIPE, text=True) as running:
        wait_until(lambda: list(tmp_path.glob("out/target/*.png")), running)
        os.killpg(running.pid, signal.SIGINT)  # as a terminal does
        _, errors = running.communicate(timeout=PATIENCE)
    assert running.returncode == 130
    assert errors.splitlines()[-1] == "interrupted: the same command continues where it was"
    assert "Traceback" not in errors
