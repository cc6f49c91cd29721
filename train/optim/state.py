"""What the loop and checkpoints need of an optimizer."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Optimizer(Protocol):
    """What the loop needs."""

    torch_optimizer: torch.optim.Optimizer

    def clip_gradients(self) -> Tensor:
        """Scales the gradients down to the run's `max_grad_norm`, if it has one. Returns the norm of all together before,
        shape ()."""
        ...

    def step(self, step: int) -> None:
        """Updates the parameters from their gradients and clears them; `step` counts from 0."""
        ...

    def numbers(self) -> dict[str, float]:
        """What to log: `lr`, and `d` for Prodigy."""
        ...

    def averaged(self) -> Any:
        """A context in which the parameters hold what should be validated and exported."""
        ...


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float | None) -> Tensor:
    """As `Optimizer.clip_gradients`; None leaves the gradients as they are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


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
    """The inverse, bit for bit: unlike `Optimizer.load_state_dict`, no tensor changes its dtype.

    Tensors go to their parameter's device; AdamW's `step` only when fused, else it belongs on the CPU. Whether it is fused
    is the present machine's matter, not the checkpoint's.
    """
    fused = bool(optimizer.param_groups[0].get("fused"))
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
            name: value.to(device) if isinstance(value, Tensor) and (fused or name != "step") else value
            for name, value in entries.items()
        }
    for number, (group, plain) in enumerate(zip(optimizer.param_groups, values["param_groups"], strict=True)):
        stored = {name.split("/", 1)[1]: t for name, t in tensors.items() if name.startswith(f"group{number}/")}
        for name, value in {**plain, **stored}.items():
            if name not in ("params", "fused"):
                group[name] = tuple(value) if isinstance(group.get(name), tuple) else value
