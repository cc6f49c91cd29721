"""The same job on Ray gives the same answers, and takes over what other processes have done."""

import subprocess
import sys

import pytest

from tests.commands import ROOT

JOB = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from data_prep.items import Done, make_engine, run_items
from tests.test_items import Shout, items
folder = Path(sys.argv[2])
for answer in run_items(items(60, {{7: "refuse"}}), Shout(folder), folder / ".parts", make_engine(sys.argv[1], 2), "shouting"):
    print(answer.value["text"] if isinstance(answer, Done) else answer)
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_ray_gives_what_processes_give(tmp_path):
    answers = {}
    for engine in ("local", "ray"):
        (tmp_path / engine).mkdir()
        command = [sys.executable, "-c", JOB.format(root=str(ROOT)), engine, str(tmp_path / engine)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=180)
        assert done.returncode == 0, done.stderr
        answers[engine] = done.stdout.splitlines()
    assert answers["ray"] == answers["local"]
    assert len(answers["ray"]) == 60
    command[3] = "local"
    (tmp_path / "ray" / "log").unlink()
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.splitlines() == answers["local"]
    assert len((tmp_path / "ray" / "log").read_text().split()) < 60
