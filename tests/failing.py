"""A loss that fails on one rank, for the tests of what the others do."""

import os
from typing import Any

from losses.batch import Batch
from losses.flow_matching import FlowMatchingLoss
from losses.randomness import SampleRandom
from losses.terms import LossTerms


class FailsOnRank:
    """Flow matching that raises on `rank` at `step`, counted from 1."""

    objective = "flow"

    def __init__(self, rank: int, step: int, **options: Any):
        self.rank, self.left, self.loss = str(rank), step, FlowMatchingLoss(**options)

    def __call__(self, denoiser, batch: Batch, generator: SampleRandom) -> LossTerms:
        self.left -= 1
        if self.left == 0 and os.environ["RANK"] == self.rank:
            raise ArithmeticError("this rank fails at step 3")
        return self.loss(denoiser, batch, generator)
