"""Counts what the ranks of a training step send each other, without a GPU."""

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SILENT = ("barrier", "monitored_barrier_")


class Collectives(TorchDispatchMode):
    """Counts the collectives that this rank calls inside it, by name, and the bytes of the tensors that they are given.

    Barriers, which carry nothing, are not counted. Work of other threads is not seen: on a CPU the backward pass runs in the
    thread that asks for it.
    """

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and (name := func._schema.name.removeprefix("c10d::")) not in SILENT:
            self.calls[name] += 1
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.bytes[name] += max((tensor.nbytes for tensor in given), default=0)
        return func(*args, **(kwargs or {}))
