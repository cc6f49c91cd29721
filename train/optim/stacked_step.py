"""ProdigyPlusScheduleFree on many tensors at once: the library's step in some 1,000 kernels instead of 50,000.

The library updates one tensor after the other. LoRA has over a thousand, of very few shapes, so tensors of one shape are
stacked for the time of their update. State, groups, step size and all formulas without a reduction over a whole tensor
stay the library's: its methods are called with stacks of shape (N, *shape) in place of tensors of that shape. What it
reduces per tensor is written here: the statistics of the step size (Prodigy: Mishchenko & Defazio, arXiv 2306.06101) and
the clipping by root mean square (StableAdamW: Wortsman et al., arXiv 2304.13013).
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from prodigyplus import ProdigyPlusScheduleFree
from torch import Tensor, nn

NUMBERS_TOGETHER = 2**25
"""Numbers in one stack, which bounds what a step needs beyond the state to some 5 x 128 MiB."""
NUMBERS_IN_CACHE = 2**20
"""Numbers in one stack on a CPU, where memory, not the number of operations, is what takes time."""
EVERY = 11
"""The library estimates the step size from every 11th number of a tensor."""
ONE_BY_ONE = ("use_bias_correction", "use_speed", "use_cautious", "use_adopt", "use_orthograd")
"""Options with rules per tensor that are not written here."""


def why_one_by_one(library: ProdigyPlusScheduleFree) -> str | None:
    """What the library must compute tensor by tensor for, or None if `step` does the same."""
    group = library.param_groups[0]
    reasons = [f"{name}=true" for name in ONE_BY_ONE if group[name]]
    if not group["use_schedulefree"]:
        reasons.append("use_schedulefree=false")
    if any(p.dtype != torch.float32 for group in library.param_groups for p in group["params"]):
        reasons.append("parameters not in float32")
    return ", ".join(reasons) or None


@torch.no_grad()
def step(library: ProdigyPlusScheduleFree) -> None:
    """One step of `library` for which `why_one_by_one` knows no reason, equal to its own to float32 rounding."""
    library.on_start_step()
    for group in library.param_groups:
        assert group["train_mode"], "the parameters hold averages: leave `averaged` before a step"
        for parameters in _batches(library, group):
            _update(library, group, parameters)
    library.parameters_to_process = 1  # it counts tensors, and estimates the next step size after the last
    library.on_end_step()


def _batches(library: ProdigyPlusScheduleFree, group: dict[str, Any]) -> Iterator[list[nn.Parameter]]:
    """Parameters that have a gradient, in lists of one shape and one form of state."""
    alike: dict[Any, list[nn.Parameter]] = defaultdict(list)
    for parameter in group["params"]:
        if parameter.grad is not None:
            state = library.state[parameter] or library.initialise_state(parameter, group)
            start = state["p0"].shape if "p0" in state else None  # one zero stands for a tensor of zeros
            alike[parameter.shape, parameter.device, start].append(parameter)
    for (shape, device, _), parameters in alike.items():
        length = max(1, (NUMBERS_IN_CACHE if device.type == "cpu" else NUMBERS_TOGETHER) // shape.numel())
        for first in range(0, len(parameters), length):
            yield parameters[first : first + length]


def _update(library: ProdigyPlusScheduleFree, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
    """Updates N parameters of one shape, and their state."""
    states = [library.state[parameter] for parameter in parameters]
    if group["prodigy_steps"] > 0 and group["k"] >= group["prodigy_steps"]:  # the step size stays as it is
        for state in states:
            state.pop("s", None)
            state.pop("p0", None)
    names = [name for name, value in states[0].items() if isinstance(value, Tensor)]
    stacks: dict[str, Any] = {name: torch.stack([state[name] for state in states]) for name in names}
    y, z = torch.stack([parameter.data for parameter in parameters]), stacks["z"]
    gradient = torch.stack([parameter.grad for parameter in parameters if parameter.grad is not None])
    if "s" in stacks:
        _estimate(library, group, stacks, gradient)
    if "exp_avg_sq_metadata" in states[0]:  # the two dimensions that the second moment is factored over
        stacks["exp_avg_sq_metadata"] = [dimension + 1 for dimension in states[0]["exp_avg_sq_metadata"]]
    beta2 = library.get_betas(group)[1]
    denominator = library.update_second_moment(stacks, group, gradient, beta2, z)
    update = library.update_(gradient.mul_(group["d"]), denominator, group, z)
    if group["use_stableadamw"]:
        rms = torch.linalg.vector_norm(_rows(update), dim=1, keepdim=True) / _rows(update).shape[1] ** 0.5
        _rows(update).mul_(rms.clamp_min(1.0).rsqrt())
    library.update_params(y, z, update, group, library.get_dlr(group))
    copy_all(parameters, y.unbind())
    for name in names:
        if name != "p0":
            copy_all([state[name] for state in states], stacks[name].unbind())


def _estimate(library: ProdigyPlusScheduleFree, group: dict[str, Any], stacks: dict[str, Tensor], gradient: Tensor):
    """Adds N tensors to the step size's statistics (arXiv 2306.06101, algorithm 4, with z for x).

    Numerator += d^2 <g, p0 - z>, s <- beta3 s + d^2 g, denominator += |s|_1, on every 11th number and divided by sqrt(d0).
    """
    numerator, denominator = library.get_running_values_for_group(group)
    factor = group["d"] ** 2 / group["d0"] ** 0.5
    g, z = _rows(gradient)[:, ::EVERY], _rows(stacks["z"])[:, ::EVERY]
    numerator.add_((_rows(stacks["p0"]) - z).mul_(g).sum(), alpha=factor)
    s = _rows(stacks["s"]).mul_(library.get_betas(group)[2]).add_(g, alpha=factor)
    denominator.add_(s.abs().sum(dim=1).sum(dtype=torch.float32))  # s is bfloat16, and so is each tensor's own sum


@torch.no_grad()
def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies each source into its target, a hundred with one kernel."""
    torch._foreach_copy_(targets, sources)  # pyright: ignore


def _rows(stack: Tensor) -> Tensor:
    """(N, *shape) -> (N, numbers), the same memory."""
    return stack.view(len(stack), -1)


@torch.no_grad()
def show_average(library: ProdigyPlusScheduleFree) -> None:
    """The library's `eval()`: x from y = (1 - beta1) z + beta1 x (Schedule-Free: Defazio et al., arXiv 2405.15682)."""
    for group in library.param_groups:
        held = [parameter for parameter in group["params"] if "z" in library.state.get(parameter, {})]
        if group["use_schedulefree"] and held:
            z = [library.state[parameter]["z"] for parameter in held]
            torch._foreach_lerp_(held, z, weight=1 - 1 / group["betas"][0])  # pyright: ignore
        group["train_mode"] = False
