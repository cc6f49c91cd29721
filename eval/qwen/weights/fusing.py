"""Adapters inside a transformer's plain weights, so that they cost a step nothing, and the weights as they were afterwards.

A changed weight is always made of the base model's own and of the adapters that are wanted, never of what an earlier adapter
left: it is the same bit for bit whatever was there before.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from train.model.adapter_reader import LowRank, fused_weight, linear_modules
from train.model.denoiser import Denoiser


class FusedAdapters:
    """Puts adapters into the weights of a transformer, and takes them out again.

    The weights of blocks that wait in CPU memory stay the base model's; they are changed on the device, whenever they have come.

    Args:
        denoiser: as it was loaded, with plain weights.
        restore: gives the modules of these names the base model's weights back, in their place.
    """

    def __init__(self, denoiser: Denoiser, restore: Callable[[Sequence[str]], None]):
        self.restore, self.offload = restore, denoiser.offload
        self.linear = linear_modules(denoiser.dit)
        streamed = {module for block in (self.offload.blocks if self.offload else ()) for module in block.modules()}
        self._resident = {name for name, module in self.linear.items() if module not in streamed}
        self._changed: list[str] = []

    @torch.no_grad()
    def use(self, parts: Mapping[str, LowRank]) -> None:
        """From now on the transformer computes with these adapters and no others."""
        self.clear()
        self._changed = [name for name in parts if name in self._resident]
        for name in self._changed:
            self._fuse(self.linear[name], parts[name])
        if self.offload:
            self._change_what_comes({name: part for name, part in parts.items() if name not in self._resident})

    def clear(self) -> None:
        """The weights that do not wait are the base model's own again."""
        if self._changed:
            self.restore(self._changed)
        self._changed = []

    def forget(self) -> None:
        """The weights are the base model's again, by another's doing."""
        self._changed = []

    def _change_what_comes(self, parts: Mapping[str, LowRank]) -> None:
        assert self.offload
        waiting: dict[nn.Module, LowRank] = {
            self.linear[name]: part.to(self.offload.device) for name, part in parts.items()
        }

        @torch.no_grad()
        def change(block: nn.Module) -> None:
            for module in block.modules():
                if module in waiting:
                    self._fuse(module, waiting[module])

        self.offload.change_on_arrival(change if waiting else None)

    @staticmethod
    def _fuse(module: nn.Module, part: LowRank) -> None:
        assert isinstance(module.weight, Tensor)
        module.weight.copy_(fused_weight(module.weight, part))  # the one rounding
