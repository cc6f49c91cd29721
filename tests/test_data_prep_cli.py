"""The command line of data preparation: help that is quick, and mistakes answered in one sentence."""

import pytest

from tests.commands import run_script

COMMANDS = ("pairs", "table", "hf", "coco", "overlay", "synth", "mask", "split", "check")


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
