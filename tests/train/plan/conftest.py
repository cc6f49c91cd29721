"""One planner of the published model for all: what it has found for a batch it keeps."""

import pytest

from data_prep.model.directory import ModelDirectory
from tests.train.plan.planning import MEGAPIXEL, build_optimizer, configure
from train.plan.planner import Planner


@pytest.fixture(scope="session")
def real_model() -> ModelDirectory:
    """The sizes of Qwen-Image-Edit-2511, and no weights."""
    return ModelDirectory.resolve("Qwen/Qwen-Image-Edit-2511", weights=False)


@pytest.fixture(scope="session")
def planner(real_model) -> Planner:
    """Of pictures of 1024 x 1024 with one reference each."""
    return Planner(configure(), real_model, MEGAPIXEL, build_optimizer)
