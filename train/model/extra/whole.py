"""Modules of the transformer that are trained in full: which they are, and how they compute.

Their parameters keep their names, stay whole under every strategy and unrounded in every format, and are kept in float32. Who
reads one, be it the module itself or a block around it, gets it in the model's dtype, and its gradient comes back in float32.
"""

import difflib
import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from data_prep.errors import InputError
from train.model.adapter_reader import ends_in
from train.model.block import UNUSED_IN_LAST_BLOCK


def trained_modules(dit: nn.Module, train_modules: Iterable[str]) -> list[str]:
    """Names of the transformer's modules that end in one of the given names, and have parameters.

    Raises:
        InputError: a name matches none.
    """
    names = [name for name, module in dit.named_modules() if name and next(module.parameters(), None) is not None]
    matched = set()
    for wanted in train_modules:
        hits = {name for name in names if ends_in(name, wanted)}
        if not hits:
            valid = sorted({_in_block(name) for name in names} | {name.rsplit(".", 1)[-1] for name in names})
            nearest = difflib.get_close_matches(wanted, valid, n=1, cutoff=0.0)[0]
            raise InputError(
                f"adapter.train_modules names {wanted!r}, which is not a module with weights: did you mean {nearest!r}?"
            )
        matched |= hits
    return [name for name in names if name in matched]


def _in_block(name: str) -> str:
    return name.split(".", 2)[-1] if name.startswith("transformer_blocks.") else name


def trained_parameters(dit: nn.Module, train_modules: Iterable[str]) -> list[str]:
    """Names of all parameters of these modules, without those whose output nothing reads.

    Raises:
        InputError: as of `trained_modules`.
    """
    modules = trained_modules(dit, train_modules)
    if not modules:
        return []
    last = f"transformer_blocks.{len(dit.transformer_blocks) - 1}."  # pyright: ignore
    unused = tuple(f"{last}{suffix}." for suffix in (*UNUSED_IN_LAST_BLOCK, "attn.norm_added_q"))
    inside = tuple(f"{name}." for name in modules)
    return [name for name, _ in dit.named_parameters() if name.startswith(inside) and not name.startswith(unused)]


def mark_trained(dit: nn.Module, train_modules: Iterable[str]) -> None:
    """Says of a transformer's modules, before they are read, which parameters of theirs are trained: `module.in_full` names them.

    Such a parameter is not rounded, does not wait in CPU memory, and is not cut over the ranks.
    """
    for owner, leaves in _by_owner(trained_parameters(dit, train_modules)).items():
        dit.get_submodule(owner).in_full = leaves  # pyright: ignore


def _by_owner(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Name of a module -> its own parameters among these."""
    owners: dict[str, tuple[str, ...]] = {}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        owners[owner] = (*owners.get(owner, ()), leaf)
    return owners


def keep_in_float32(root: nn.Module, names: Iterable[str], dtype: torch.dtype, device: torch.device | str) -> None:
    """From now on these parameters of a module are trained in float32, and read in another dtype.

    Args:
        names: names of parameters.
        dtype: in which they are read.
        device: where they are.
    """
    for owner, leaves in _by_owner(names).items():
        module = root.get_submodule(owner)
        for leaf in leaves:
            parameter: Any = module._parameters[leaf]
            parameter.data = parameter.data.to(device, torch.float32)
            parameter.requires_grad_(True)
        module.__class__ = reading(type(module), leaves)
        module.compute_dtype = dtype  # pyright: ignore


@functools.cache
def reading(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """A subclass that reads parameters of these names in `compute_dtype`. There is one for all modules of a kind: each new class
    would have `torch.compile` begin anew."""

    def reader(name: str) -> property:
        def read(self: Any) -> Tensor:
            return self._parameters[name].to(self.compute_dtype)

        return property(read)

    return type(f"{kind.__name__}InFull", (kind,), {name: reader(name) for name in names})
