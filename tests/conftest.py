"""Shared by the whole suite: one thread per process, and one tiny model for the session."""

import os
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # two processes of two threads on two cores are seven times slower than of one

import pytest
import torch
from hypothesis import settings

from tests.children import left_running, take_charge
from tests.commands import run_script

take_charge()

torch.set_num_threads(1)
settings.register_profile("suite", deadline=None)  # an example may take its time on a busy machine
settings.load_profile("suite")


LONGEST = [
    *("train/parallel/test_strategies.py", "train/test_run.py", "test_readme.py", "train/test_sweep.py"),
    *("train/parallel/test_stopping.py", "eval/test_app.py", "data_prep/jobs/test_ray_engine.py"),
]
"""A minute and more, the longest first."""
OF_A_MODEL = {"tiny_model_dir", "tiny_pairs", "tiny_cache"}
"""Making these, and every test that uses them, takes seconds."""


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """`-m gpu` is one process, which has the GPU to itself, and asks no hub."""
    if config.option.markexpr == "gpu":
        config.option.numprocesses = 0
        os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a model or several processes is slow; and files with the longest tests come first, so that no worker begins
    one when the others are done."""
    for item in items:
        if item.get_closest_marker("distributed") or OF_A_MODEL & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    first = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (first.get(item.path, len(first)), -slow[item.path]))


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left_running():
    """After each file's tests; what is left would slow all others."""
    yield
    assert left_running() == []


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory) -> Path:
    """The tiny model, as `scripts/make_tiny_model.py` writes it; TINY_MODEL may name one that was made before."""
    if made := os.environ.get("TINY_MODEL"):
        return Path(made)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    run_script("scripts/make_tiny_model.py", "--out", folder)
    return folder


@pytest.fixture(scope="session")
def tiny_pairs(tmp_path_factory) -> Path:
    """A folder of 64-pixel pairs cut from photographs: train.json (12 rows) and validation.json (4 rows)."""
    folder = tmp_path_factory.mktemp("pairs")
    run_script("scripts/make_demo_data.py", "--out", folder, "--train", 6, "--validation", 2, "--size", 64)
    return folder


@pytest.fixture(scope="session")
def tiny_cache(tiny_model_dir, tiny_pairs, tmp_path_factory) -> Path:
    """The cache of `tiny_pairs`, by the real command."""
    folder = tmp_path_factory.mktemp("cache")
    data = [f"data.dataset={tiny_pairs}/train.json", f"data.validation={tiny_pairs}/validation.json"]
    paths = [f"model.path={tiny_model_dir}", f"cache.dir={folder}", f"run_dir={folder}/run"]
    run_script("train/run.py", "+exp=tiny_lbm", *data, *paths, "phases=[cache]")
    return folder
