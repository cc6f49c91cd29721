"""Optimizers as the loop sees them: one object with a step, a learning rate to show, and averaged weights on request.

Imports torch and the optimizers' own packages, nothing of the project.
"""

from train.optim.adamw import AdamW
from train.optim.prodigy import Prodigy
from train.optim.state import Optimizer, optimizer_state, restore_optimizer_state

__all__ = ["AdamW", "Optimizer", "Prodigy", "optimizer_state", "restore_optimizer_state"]
