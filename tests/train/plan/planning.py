"""Plans of the published model, for tests."""

import importlib

from torch import nn

from data_prep.cache.sizes import DatasetSizes, RowSize
from data_prep.model.directory import ModelDirectory
from data_prep.model.geometry import Size
from train.config import Config, compose
from train.optim import Optimizer

MEGAPIXEL = DatasetSizes((RowSize(Size(1024, 1024), (Size(1024, 1024),), 250),), 1000, "a test")
"""Pictures of 1024 x 1024 with one reference each."""


def build_optimizer(node: dict, parameters: list[nn.Parameter]) -> Optimizer:
    """As of an `optim` node."""
    module, _, name = node["_target_"].rpartition(".")
    options = {key: value for key, value in node.items() if key != "_target_"}
    return getattr(importlib.import_module(module), name)(parameters, **options)


def published_model() -> ModelDirectory:
    """The sizes of Qwen-Image-Edit-2511, and no weights."""
    return ModelDirectory.resolve("Qwen/Qwen-Image-Edit-2511", weights=False)


def configure(*overrides: str) -> Config:
    """The experiment `lbm_2511` with these overrides, on one process unless they say otherwise."""
    chosen = [] if any(override.startswith("parallel=") for override in overrides) else ["parallel=single"]
    return compose(["+exp=lbm_2511", "data.dataset=rows.json", *chosen, *overrides])
