"""What is recorded of the code and the machine."""

import json
import shlex
import subprocess
import sys

import pytest
import torch

from train.record.provenance import git_state, provenance


@pytest.fixture
def repository(tmp_path):
    """A repository with one file, committed."""
    (tmp_path / "code.py").write_text("x = 1\n")
    who = ["-c", "user.name=n", "-c", "user.email=e"]
    for arguments in (["init", "-q"], ["add", "code.py"], [*who, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", tmp_path, *arguments], check=True)
    return tmp_path


def test_commit_and_changes(repository):
    head = subprocess.run(["git", "-C", repository, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert git_state(repository / "code.py") == {"commit": head, "dirty": False}
    (repository / "results.txt").write_text("not code")
    assert git_state(repository / "code.py") == {"commit": head, "dirty": False}
    (repository / "code.py").write_text("x = 2\n")
    assert git_state(repository / "code.py") == {"commit": head, "dirty": True}


def test_a_repository_around_the_code_is_not_its_own(repository):
    """Such as a home directory under git that the code was unpacked into."""
    (repository / "unpacked.py").write_text("x = 1\n")
    assert git_state(repository / "unpacked.py") is None


def test_no_repository_no_commit_no_git(tmp_path, monkeypatch):
    (tmp_path / "code.py").write_text("x = 1\n")
    assert git_state(tmp_path / "code.py") is None
    subprocess.run(["git", "-C", tmp_path, "init", "-q"], check=True)
    subprocess.run(["git", "-C", tmp_path, "add", "code.py"], check=True)
    assert git_state(tmp_path / "code.py") is None
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path / "code.py") is None


def test_another_users_repository(repository, monkeypatch):
    """As in a container, where git refuses by default."""
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert subprocess.run(["git", "-C", repository, "status"], capture_output=True).returncode != 0
    assert git_state(repository / "code.py") is not None


def test_the_record_is_json_and_names_what_runs():
    record = provenance(world_size=4)
    assert json.loads(json.dumps(record)) == record
    assert record["world_size"] == 4
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert None not in record["versions"].values()
    assert sum(record["gpus"].values()) == torch.cuda.device_count()
    assert record["command"] == shlex.join(sys.orig_argv)
