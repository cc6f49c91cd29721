"""A loss and a validation that fail, for the tests of what that costs."""

import os
from typing import Any

from eval.scores.validation import ValidationResult
from losses.batch import Batch
from losses.flow_matching import FlowMatchingLoss
from losses.randomness import SampleRandom
from losses.terms import LossTerms


class FailsToValidate:
    """A validation that fails after `step` steps."""

    def __init__(self, step: int, **context: Any):
        self.step = step

    def __call__(self, denoiser: Any, step: int) -> ValidationResult:
        if step == self.step:
            raise OSError("no space left for pictures")
        return ValidationResult({"steps_1/psnr": 20.0 + step}, {})


class FailsOnRank:
    """Flow matching that raises on `rank` at `step`, counted from 1."""

    objective = "flow"

    def __init__(self, rank: int, step: int, **options: Any):
        self.rank, self.left, self.loss = str(rank), step, FlowMatchingLoss(**options)

    def __call__(self, denoiser, batch: Batch, generator: SampleRandom) -> LossTerms:
        self.left -= 1
        if self.left == 0 and os.environ.get("RANK", "0") == self.rank:
            raise ArithmeticError("this rank fails at step 3")
        return self.loss(denoiser, batch, generator)
