"""Measures the milliseconds of an optimizer step on the LoRA weights of the real model: 471 million numbers in 1,440 tensors.

    python scripts/bench/optimizer.py --device cuda --json optimizer.json
    python scripts/bench/optimizer.py --tiny

A step is everything that the training loop's part `optimizer` does with these weights on one rank: the gradients' norm, the
check that it is finite, the update, clearing the gradients, and the numbers to log. The optimizers are ours, and for comparison
torch's AdamW without `fused` and the original ProdigyPlusScheduleFree, which works tensor by tensor. The medians are of 5 steps
after 2 that are not counted. `operations` counts torch's operations (one on a list of tensors is one, and launches a kernel for
about every hundred), and `gigabytes` what they read and write, in one more step. `--tiny` shrinks the tensors, not their number.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from prodigyplus import ProdigyPlusScheduleFree
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from train.optim import AdamW, Prodigy

WIDTH, RANK = 3072, 64
MODULES = [*[(WIDTH, WIDTH)] * 8, *[(4 * WIDTH, WIDTH)] * 2, *[(WIDTH, 6 * WIDTH)] * 2]
"""(in, out) of one block's modules: attention, the MLPs' second layers, modulation."""
WARM_UP, TIMED = 2, 5


class Traffic(TorchDispatchMode):
    """Counts operations that compute something, and the bytes of what they are given and return."""

    def __init__(self):
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if not func.is_view and func is not torch.ops.aten.empty_like.default:
            self.operations += 1
            self.bytes += sum(t.nbytes for t in tree_leaves((args, kwargs, output)) if isinstance(t, torch.Tensor))
        return output


class Library:
    """Prodigy as the library steps."""

    def __init__(self, params: list[nn.Parameter]):
        self.torch_optimizer = ProdigyPlusScheduleFree(params)

    def step(self, step: int) -> None:
        self.torch_optimizer.step()
        self.torch_optimizer.zero_grad()

    def numbers(self) -> dict[str, float]:
        return {"d": float(self.torch_optimizer.param_groups[0]["d"])}


class AdamWOfLists(AdamW):
    """Torch's default on a GPU: operations on lists."""

    def __init__(self, params: list[nn.Parameter]):
        super().__init__(params)
        self.torch_optimizer = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.01, foreach=True)


KINDS: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "adamw": AdamW,
    "adamw, not fused": AdamWOfLists,
    "prodigy": Prodigy,
    "prodigy, library": Library,
}


def shapes(num_tensors: int, shrink: int) -> list[tuple[int, int]]:
    """A (rank, in) and B (out, rank) of block after block."""
    rank = RANK // min(shrink, 16)
    block = [shape for a, b in MODULES for shape in ((rank, a // shrink), (b // shrink, rank))]
    return [block[i % len(block)] for i in range(num_tensors)]


def measure(build: Callable[[list[nn.Parameter]], Any], sizes: list[tuple[int, int]], device: str) -> dict[str, float]:
    """Milliseconds of a step, what it moves, and the most memory it took beyond weights and gradients."""
    generator = torch.Generator(device).manual_seed(0)
    start = [
        torch.randn(s, generator=generator, device=device) if s[0] < s[1] else torch.zeros(s, device=device)
        for s in sizes
    ]
    parameters = [nn.Parameter(value) for value in start]
    gradients = [torch.randn(s, generator=generator, device=device).mul_(1e-4) for s in sizes]
    optimizer = build(parameters)
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None

    def step(number: int) -> float:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        synchronize()
        begin = time.perf_counter()
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        assert bool(norm.isfinite().all())
        optimizer.step(number)
        optimizer.numbers()
        synchronize()
        return 1000 * (time.perf_counter() - begin)

    first = step(0)  # makes the state
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = [step(number) for number in range(1, WARM_UP + TIMED)][-TIMED:]
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    with Traffic() as traffic:
        step(WARM_UP + TIMED)
    return {
        "ms": statistics.median(times),
        "first_ms": first,
        "operations": traffic.operations,
        "gigabytes": traffic.bytes / 1e9,
        "temporary_gib": (peak - before) / 2**30,
    }


def main() -> None:
    """Prints a table and writes `--json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=1440)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="Use tensors with a 48th of each dimension.")
    parser.add_argument("--json", type=Path, help="JSON file to write the results to.")
    options = parser.parse_args()
    sizes = shapes(options.tensors, 48 if options.tiny else 1)
    device_name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    results: dict[str, Any] = {
        "device": device_name,
        "torch": torch.__version__,
        "numbers": sum(a * b for a, b in sizes),
    }
    for name, build in KINDS.items():
        results[name] = measure(build, sizes, options.device)
        print(f"{name:18}", *(f"{key} {value:10.3f}" for key, value in results[name].items()))
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
