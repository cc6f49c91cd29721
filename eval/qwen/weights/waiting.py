"""A part's weights in CPU memory, from which they come to the device; they never change there, so none go back."""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from data_prep.errors import InputError
from train.model.offload import Layout, unpin, waiting_memory


class WaitingWeights:
    """A copy of a module's weights and buffers in CPU memory, pinned where the device is a GPU.

    Args:
        module: on its device, without adapters.
        device: where it computes.

    Raises:
        InputError: there is no CPU memory for it, or none that can be pinned.
    """

    def __init__(self, module: nn.Module, device: torch.device):
        self.device, self.layout = device, Layout(module)
        try:
            self.memory = waiting_memory(self.layout.num_bytes, device)
        except (OSError, RuntimeError) as error:
            size = self.layout.num_bytes / 2**30
            raise InputError(f"no CPU memory for {size:.1f} GiB of waiting weights ({error}): free some") from error
        if device.type == "cuda":
            weakref.finalize(self, unpin, [self.memory], torch.cuda.current_stream(device)).atexit = False
        self.layout.copy_to(self.memory)

    def leave(self) -> None:
        """The device has none of them any more."""
        self.layout.point_to(self.memory)

    def come(self) -> None:
        """They are on the device, as they were at first."""
        for tensor, view in self.layout.views(self.memory):
            tensor.data = view.to(self.device, non_blocking=True, copy=True)

    def restore(self, tensors: Sequence[Tensor]) -> None:
        """The same for some that are on the device and were changed there, in their place."""
        wanted = set(map(id, tensors))
        for tensor, view in self.layout.views(self.memory):
            if id(tensor) in wanted:
                tensor.data.copy_(view, non_blocking=True)
