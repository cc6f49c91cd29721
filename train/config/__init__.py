"""What a run is configured with: sections and their checks, composed from `configs/` by Hydra. Imports nothing heavy, so that a
mistake is answered at once.
"""

from train.config.compose import MOVED, as_given, compose, from_hydra, read_yaml, to_yaml
from train.config.keys import CONFIGS
from train.config.sections import (
    DEFAULT_TARGETS,
    Config,
    DatasetConfig,
    ParallelConfig,
    TrainConfig,
    check_whole_blocks,
)

__all__ = [
    "CONFIGS",
    "DEFAULT_TARGETS",
    "MOVED",
    "Config",
    "DatasetConfig",
    "ParallelConfig",
    "TrainConfig",
    "as_given",
    "check_whole_blocks",
    "compose",
    "from_hydra",
    "read_yaml",
    "to_yaml",
]
