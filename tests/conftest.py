"""Shared by the whole suite: one thread per process, and one tiny model for the session."""

import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # two processes of two threads on two cores are seven times slower than of one

import pytest
import torch

from tests.commands import run_script

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory) -> Path:
    """The tiny model, as `scripts/make_tiny_model.py` writes it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    run_script("scripts/make_tiny_model.py", "--out", folder)
    return folder
