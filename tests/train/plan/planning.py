"""Plans of the published model, for tests."""

import importlib

from torch import nn

from data_prep.cache.sizes import DatasetSizes, RowSize
from data_prep.model.geometry import Size
from train.config import Config, compose
from train.optim import Optimizer
from train.plan.gpus import find_gpu
from train.plan.planner import Planner

MEGAPIXEL = DatasetSizes((RowSize(Size(1024, 1024), (Size(1024, 1024),), 250),), 1000, "a test")
"""Pictures of 1024 x 1024 with one reference each."""


def build_optimizer(node: dict, parameters: list[nn.Parameter]) -> Optimizer:
    """As of an `optim` node."""
    module, _, name = node["_target_"].rpartition(".")
    options = {key: value for key, value in node.items() if key != "_target_"}
    return getattr(importlib.import_module(module), name)(parameters, **options)


def configure(*overrides: str) -> Config:
    """The experiment `lbm_2511` with these overrides, on one process and with one rank everywhere unless they say otherwise."""
    usual = {"parallel=": "single", "adapter=": "lora"}
    chosen = [key + usual[key] for key in usual if not any(override.startswith(key) for override in overrides)]
    return compose(["+exp=lbm_2511", "data.dataset=rows.json", *chosen, *overrides])


def resolved(planner: Planner, gpu: str, *overrides: str, world_size: int = 1) -> Config:
    """The same without `auto`."""
    return planner.without_auto(configure(*overrides), world_size, find_gpu(gpu))


def fits(planner: Planner, gpu: str, *overrides: str, world_size: int = 1) -> bool:
    """Whether training does."""
    return planner.fits(resolved(planner, gpu, *overrides, world_size=world_size), world_size, find_gpu(gpu))


def seconds(planner: Planner, gpu: str, *overrides: str, world_size: int = 1) -> float:
    """Of a step."""
    taken = planner.seconds(resolved(planner, gpu, *overrides, world_size=world_size), world_size, find_gpu(gpu))
    assert taken is not None
    return taken
