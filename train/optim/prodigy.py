"""ProdigyPlusScheduleFree as the loop sees it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from prodigyplus import ProdigyPlusScheduleFree
from torch import Tensor, nn

from train.optim import stacked_step
from train.optim.state import clip_gradients

logger = logging.getLogger(__name__)


class Prodigy:
    """ProdigyPlusScheduleFree: no learning rate to choose, no schedule, no clipping.

    Many tensors are updated at once. Options that need the library's own step, tensor by tensor, get it, and a warning.

    Args:
        lr: factor on the estimated step size. Leave it at 1.
        num_steps: length of the run, given by it; the step size does not depend on it.
        max_grad_norm: `train.max_grad_norm`, given by the run: it must be None.
        options: options of `prodigyplus.ProdigyPlusScheduleFree`.

    Raises:
        ValueError: the run clips gradients, from which the step size is estimated; or an option makes it do nothing:
            `fused_back_pass` turns `step` into a no-op, and with the default `d_limiter` a `d_coef` of 0.84 or less never lets
            the step size grow.
    """

    def __init__(
        self,
        params: list[nn.Parameter],
        lr: float = 1.0,
        num_steps: int = 1,
        max_grad_norm: float | None = None,
        **options: Any,
    ):
        if max_grad_norm is not None:
            raise ValueError(
                f"train.max_grad_norm={max_grad_norm} does not work with Prodigy: clipping changes the gradients from which it "
                "estimates its step size; set train.max_grad_norm=null"
            )
        if options.get("fused_back_pass"):
            raise ValueError("optim.fused_back_pass=true makes Prodigy's step do nothing here: leave it out")
        d_coef = options.get("d_coef", 1.0)
        if d_coef <= 0.84 and options.get("d_limiter", True):
            raise ValueError(f"optim.d_coef={d_coef} with d_limiter never lets the step size grow: use more than 0.84")
        if "betas" in options:
            options["betas"] = tuple(options["betas"])
        self.torch_optimizer = ProdigyPlusScheduleFree(params, lr=lr, **options)
        if reason := stacked_step.why_one_by_one(self.torch_optimizer):
            logger.warning(f"Prodigy updates tensor by tensor, which is slow on a GPU, because of {reason}")

    def clip_gradients(self) -> Tensor:
        """The norm of all gradients together, which stay as they are."""
        return clip_gradients(self.torch_optimizer, None)

    def step(self, step: int) -> None:
        """One update."""
        if stacked_step.why_one_by_one(self.torch_optimizer):  # a checkpoint brings its own options
            self.torch_optimizer.step()
        else:
            stacked_step.step(self.torch_optimizer)
        self.torch_optimizer.zero_grad()

    def numbers(self) -> dict[str, float]:
        """The step size estimate d, and the learning rate that it makes."""
        group = self.torch_optimizer.param_groups[0]
        d = float(group["d"])
        return {"lr": d * float(group["lr"]), "d": d}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The weights that schedule-free training averages; the training weights come back exactly."""
        parameters = [p for group in self.torch_optimizer.param_groups for p in group["params"]]
        before = [torch.empty_like(p, requires_grad=False) for p in parameters]
        stacked_step.copy_all(before, parameters)
        stacked_step.show_average(self.torch_optimizer)
        try:
            yield
        finally:
            stacked_step.copy_all(parameters, before)  # the library's train() would be exact up to rounding only
            for group in self.torch_optimizer.param_groups:
                group["train_mode"] = True
