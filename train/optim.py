"""Optimizers as the loop sees them: one object with a step, a learning rate to show, and averaged weights on request."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from prodigyplus import ProdigyPlusScheduleFree
from torch import Tensor, nn


class Optimizer(Protocol):
    """What the loop needs."""

    torch_optimizer: torch.optim.Optimizer

    def step(self, step: int) -> None:
        """Updates the parameters from their gradients and clears them; `step` counts from 0."""
        ...

    def numbers(self) -> dict[str, float]:
        """What to log: `lr`, and `d` for Prodigy."""
        ...

    def averaged(self) -> Any:
        """A context in which the parameters hold what should be validated and exported."""
        ...


class AdamW:
    """AdamW with warm-up and a constant or cosine schedule (Loshchilov & Hutter, arXiv 1711.05101).

    Args:
        lr: the peak.
        warmup_steps: linear rise from 0.
        schedule: "constant", or "cosine" down to 0 at `num_steps`.
        bits: of the two moments; 8 quantises them in blocks (Dettmers et al. 2022, arXiv 2110.02861) with bitsandbytes.
        num_steps: length of the run, given by it.

    Raises:
        ValueError: an argument is out of its range, or bitsandbytes is not installed.
    """

    def __init__(
        self,
        params: list[nn.Parameter],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        eps: float = 1e-8,
        warmup_steps: int = 0,
        schedule: Literal["constant", "cosine"] = "constant",
        bits: Literal[8, 32] = 32,
        num_steps: int = 1,
    ):
        if lr <= 0:
            raise ValueError(f"optim.lr must be positive, got {lr}")
        if schedule not in ("constant", "cosine"):
            raise ValueError(f"optim.schedule must be constant or cosine, got {schedule!r}")
        if bits not in (8, 32):
            raise ValueError(f"optim.bits must be 8 or 32, got {bits}")
        kind: Any = torch.optim.AdamW if bits == 32 else _adamw_8bit()
        self.torch_optimizer = kind(params, lr=lr, betas=(betas[0], betas[1]), eps=eps, weight_decay=weight_decay)
        self.peak, self.warmup_steps, self.schedule, self.num_steps = lr, warmup_steps, schedule, num_steps

    def lr_at(self, step: int) -> float:
        """A pure function of the step, so that resuming needs no scheduler state."""
        warmup = min(1.0, (step + 1) / (self.warmup_steps + 1))
        if self.schedule == "constant":
            return self.peak * warmup
        progress = max(0.0, step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps)
        return self.peak * warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def step(self, step: int) -> None:
        """One update at this step's learning rate."""
        for group in self.torch_optimizer.param_groups:
            group["lr"] = self.lr_at(step)
        self.torch_optimizer.step()
        self.torch_optimizer.zero_grad()

    def numbers(self) -> dict[str, float]:
        """The learning rate of the last step."""
        return {"lr": self.torch_optimizer.param_groups[0]["lr"]}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """AdamW keeps no average: the weights as they are."""
        yield


class Prodigy:
    """ProdigyPlusScheduleFree: no learning rate to choose, no schedule, no clipping.

    Args:
        lr: a factor on the estimated step size; leave it at 1.
        options: of `prodigyplus.ProdigyPlusScheduleFree`.

    Raises:
        ValueError: options that make it do nothing: `fused_back_pass` turns `step` into a no-op, and with the default
            `d_limiter` a `d_coef` of 0.84 or less never lets the step size grow.
    """

    def __init__(self, params: list[nn.Parameter], lr: float = 1.0, num_steps: int = 1, **options: Any):
        if options.get("fused_back_pass"):
            raise ValueError("optim.fused_back_pass=true makes Prodigy's step do nothing here: leave it out")
        d_coef = options.get("d_coef", 1.0)
        if d_coef <= 0.84 and options.get("d_limiter", True):
            raise ValueError(f"optim.d_coef={d_coef} with d_limiter never lets the step size grow: use more than 0.84")
        if "betas" in options:
            options["betas"] = tuple(options["betas"])
        self.torch_optimizer = ProdigyPlusScheduleFree(params, lr=lr, **options)

    def step(self, step: int) -> None:
        """One update."""
        self.torch_optimizer.step()
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
        before = [p.detach().clone() for p in parameters]
        self.torch_optimizer.eval()
        try:
            yield
        finally:
            self.torch_optimizer.train()
            for parameter, value in zip(parameters, before, strict=True):
                parameter.data.copy_(value)  # eval and train are inverse up to rounding only


def _adamw_8bit() -> Any:
    try:
        from bitsandbytes.optim.adamw import AdamW8bit
    except ImportError as error:
        raise ValueError(f"optim.bits=8 needs bitsandbytes ({error}): run `uv pip install bitsandbytes`") from error
    return AdamW8bit


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything the optimizer knows: tensors by name, and the rest as JSON values."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    tensors, values = {}, {}
    for index, parameter in enumerate(parameters):
        for name, value in optimizer.state.get(parameter, {}).items():
            (tensors if isinstance(value, Tensor) else values)[f"{index}/{name}"] = value
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        plain = {}
        for name, value in group.items():
            if isinstance(value, Tensor):
                tensors[f"group{number}/{name}"] = value
            elif name != "params":
                plain[name] = value
        groups.append(plain)
    return tensors, {"state": values, "param_groups": groups}


def restore_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], values: dict[str, Any]
) -> None:
    """The inverse, bit for bit: unlike `Optimizer.load_state_dict`, no tensor changes its dtype."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for source in (tensors, values["state"]):
        for name, value in source.items():
            index, _, entry = name.partition("/")
            if not index.startswith("group"):
                state.setdefault(int(index), {})[entry] = value
    for index, entries in state.items():
        device = parameters[index].device
        optimizer.state[parameters[index]] = {
            name: value.to(device) if isinstance(value, Tensor) and value.ndim else value
            for name, value in entries.items()
        }
    for number, (group, plain) in enumerate(zip(optimizer.param_groups, values["param_groups"], strict=True)):
        stored = {name.split("/", 1)[1]: t for name, t in tensors.items() if name.startswith(f"group{number}/")}
        for name, value in {**plain, **stored}.items():
            if name != "params":
                group[name] = tuple(value) if isinstance(group.get(name), tuple) else value
