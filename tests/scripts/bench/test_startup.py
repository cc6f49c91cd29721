"""`scripts/bench/startup.py` times real processes."""

import json

import pytest

from scripts.bench.startup import COMMANDS
from tests.commands import ROOT, run_script

pytestmark = pytest.mark.slow

BENCH = "scripts/bench/startup.py"


def test_help_and_import(tmp_path):
    file = tmp_path / "found.json"
    parts = ["--only", "help,import", "--commands", "data_prep/run.py"]
    done = run_script(BENCH, "--tiny", *parts, "--json", file)
    rows = json.loads(file.read_text())["rows"]
    assert list(rows) == ["data_prep/run.py --help", "import data_prep.check.check"]
    assert all(0.01 < row["fastest s"] <= row["median s"] for row in rows.values())
    assert "import data_prep.check.check" in done.stdout


def test_first_step(tmp_path):
    file = tmp_path / "found.json"
    run_script(BENCH, "--tiny", "--only", "first-step", "--json", file)
    rows = json.loads(file.read_text())["rows"]
    assert list(rows) == ["first step, with caching", "first step, cached"]  # on a busy machine either may be faster
    assert all(row["fastest s"] > 1 for row in rows.values())


def test_every_command_is_known():
    """The floors' entry points: files that run."""
    scripts = {
        f"{path.parent.name}/{path.name}"
        for floor in ("train", "eval", "data_prep")
        for path in (ROOT / floor).glob("*.py")
    }
    assert {name for name in scripts if '__name__ == "__main__"' in (ROOT / name).read_text()} == set(COMMANDS)
    for module in COMMANDS.values():
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or path.is_dir()


def test_unknown_parts_are_refused():
    assert "got nothing" in run_script(BENCH, "--only", "nothing", check=False).stderr
