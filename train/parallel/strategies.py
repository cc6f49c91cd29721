"""How gradients come from the model to the adapter, and weights from the adapter to the model, on one process or many.

The optimizer always sees the same: full-shape float32 weights and the gradient of the whole global batch, identical on
every rank. On one process, under `ddp` and under ZeRO-3 these are the model's own LoRA parameters: ZeRO-3 cuts the frozen
weights alone. Under ZeRO-2 the model's LoRA is cut into flat shards, which ProdigyPlusScheduleFree must not see (each rank
would estimate another step size); there the adapter holds replicated masters.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from train.model.adapter import Adapter
from train.model.block import Block
from train.model.denoiser import Denoiser
from train.optim.state import Optimizer
from train.parallel.processes import Processes

IN_USE = -1
"""DeepSpeed releases a parameter when no module's number is in its set of users: this number of none never leaves."""
REDUCED_TOGETHER = 50_000_000
"""Numbers of one reduction: few calls, and 200 MB."""


class Parallel(Protocol):
    """What the loop needs."""

    @property
    def denoiser(self) -> nn.Module:
        """What the loss calls."""
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Back-propagates what one micro-batch adds to the loss of the step.

        After the `last` one of a step, the adapter's gradients are those of the sum over all micro-batches of all ranks.
        Every rank must call it equally often.
        """
        ...

    def step(self, optimizer: Optimizer, step: int) -> None:
        """Makes optimizer step `step`, counted from 0; the model computes with the new weights."""
        ...

    def averaged(self, optimizer: Optimizer) -> AbstractContextManager[None]:
        """A context in which the model computes with the averaged weights that are validated and exported."""
        ...


class _AdapterUpdates:
    """Brings the adapter's weights to the model wherever the optimizer changes them. Without communication: every rank
    holds them whole."""

    adapter: Adapter

    def step(self, optimizer: Optimizer, step: int) -> None:
        """As `Parallel.step`."""
        optimizer.step(step)
        self.adapter.refresh()

    @contextmanager
    def averaged(self, optimizer: Optimizer) -> Iterator[None]:
        """As `Parallel.averaged`; the training weights come back exactly."""
        try:
            with optimizer.averaged():
                self.adapter.refresh()
                yield
        finally:
            self.adapter.refresh()


class Replicas(_AdapterUpdates):
    """The whole model on every process, or on the one there is; gradients are added up once per step."""

    def __init__(self, denoiser: Denoiser, adapter: Adapter, processes: Processes):
        self.denoiser: nn.Module = denoiser
        self.adapter, self.world_size = adapter, processes.world_size
        adapter.copy_for_products(denoiser.dit.transformer_blocks, denoiser.dit.img_in.weight.dtype)

    def backward(self, loss: Tensor, last: bool) -> None:
        """As `Parallel.backward`."""
        loss.backward()
        if last and self.world_size > 1:
            add_up([p.grad for p in self.adapter.layer_parameters().values() if p.grad is not None])


class Zero3(Replicas):
    """DeepSpeed ZeRO-3 of the frozen weights: each rank keeps a part of them, and whole blocks are gathered.

    The LoRA weights stay whole on every rank, because every rank makes the same step, and so does what is around the blocks,
    0.2 % of the model, which would take more calls than the blocks do.

    Args:
        denoiser: with LoRA attached; its frozen weights are sharded already, by `shard`.
        adapter, processes: as of `Replicas`.
        settings: DeepSpeed's configuration, from `train.parallel.settings.zero_settings`.
        offload: keep masters of the LoRA weights, and so the optimizer, in CPU memory.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        adapter: Adapter,
        processes: Processes,
        settings: dict[str, Any],
        offload: bool,
    ):
        join(processes)
        import deepspeed

        lora = list(adapter.layer_parameters().values())
        for parameter in lora:
            parameter.requires_grad_(False)  # frozen, DeepSpeed leaves the gradients to us
        deepspeed.utils.set_z3_leaf_modules(
            denoiser, [Block, BaseTunerLayer]
        )  # gathered whole: their parts are not called
        self.engine, *_ = deepspeed.initialize(
            model=denoiser, config=settings
        )  # we call the model, which it gave hooks
        in_blocks = {*denoiser.dit.transformer_blocks.parameters()} - {*lora}
        whole: list[Any] = [parameter for parameter in denoiser.parameters() if parameter not in in_blocks]
        whole[0].all_gather(param_list=whole)
        for parameter in whole:
            parameter.ds_active_sub_modules.add(IN_USE)
        for parameter in lora:
            parameter.requires_grad_(True)
        super().__init__(denoiser, adapter, processes)
        if offload:
            adapter.detach("cpu")

    def backward(self, loss: Tensor, last: bool) -> None:
        """As `Parallel.backward`."""
        super().backward(loss, last)
        if last:
            self.adapter.take_gradients()


class Zero2(_AdapterUpdates):
    """DeepSpeed ZeRO-2: gradients are sharded while they accumulate.

    Args:
        denoiser: with LoRA attached.
        adapter: its weights become masters, replicated on every rank.
        processes: processes of the run.
        settings: DeepSpeed's configuration, from `train.parallel.settings.zero_settings`.
    """

    def __init__(self, denoiser: Denoiser, adapter: Adapter, processes: Processes, settings: dict[str, Any]):
        join(processes)
        import deepspeed

        adapter.copy_for_products(denoiser.dit.transformer_blocks, denoiser.dit.img_in.weight.dtype)
        self.adapter, self.shards = adapter, adapter.parameters()
        adapter.detach(processes.device)
        self.masters = adapter.parameters()
        idle = Idle(self.shards)
        self.denoiser, *_ = deepspeed.initialize(model=denoiser, optimizer=idle, config=settings)
        self.divisor = settings["gradient_accumulation_steps"] * processes.world_size

    def backward(self, loss: Tensor, last: bool) -> None:
        """As `Parallel.backward`."""
        from deepspeed.utils import safe_get_full_grad

        self.denoiser.set_gradient_accumulation_boundary(last)  # steps differ in their number of micro-batches
        self.denoiser.backward(loss * self.divisor)  # it divides by the accumulation steps, and averages over ranks
        if last:
            for shard, master in zip(self.shards, self.masters, strict=True):
                gradient = safe_get_full_grad(shard)
                assert gradient is not None, "every trained weight takes part in every forward pass"
                master.grad = gradient.to(master.device)
        self.denoiser.step()  # updates nothing: clears the gradients after the last


@torch.no_grad()
def add_up(tensors: list[Tensor]) -> None:
    """Replaces each tensor by its sum over ranks, in few flat pieces."""
    start = 0
    while start < len(tensors):
        end, size = start + 1, tensors[start].numel()
        while end < len(tensors) and size + tensors[end].numel() <= REDUCED_TOGETHER:
            size += tensors[end].numel()
            end += 1
        part = tensors[start:end]
        flat = torch.cat([tensor.flatten() for tensor in part])
        dist.all_reduce(flat)
        pieces = flat.split([tensor.numel() for tensor in part])
        views = [piece.view_as(tensor) for piece, tensor in zip(pieces, part, strict=True)]
        torch._foreach_copy_(part, views)  # pyright: ignore
        start = end


class Idle(torch.optim.Optimizer):
    """DeepSpeed's optimizer: it marks the parameters whose gradients are wanted, and moves nothing."""

    def __init__(self, parameters: list[nn.Parameter]):
        super().__init__(parameters, {"lr": 0.0})

    def step(self, closure: Any = None) -> None:
        """Nothing."""


def join(processes: Processes) -> None:
    """Gives a process that was launched alone the group of one that DeepSpeed needs; and DeepSpeed a quieter voice."""
    os.environ.setdefault("DS_ACCELERATOR", processes.device.type)
    if not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")
        backend = "nccl" if processes.device.type == "cuda" else "gloo"
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)  # it warns of Idle, and of what needs no attention


def shard(settings: dict[str, Any], processes: Processes) -> Callable[[nn.Module, str], None]:
    """Cuts a loaded parameter over the ranks (ZeRO-3) as soon as it is there, so that no rank holds all of them. One that is
    trained comes to all of them."""
    join(processes)
    import deepspeed

    def cut(owner: nn.Module, name: str) -> None:
        if name in getattr(owner, "in_full", ()):  # of `mark_trained`
            dist.broadcast(owner.get_parameter(name).data, src=0)
            return
        deepspeed.zero.Init(module=nn.ParameterList([owner.get_parameter(name)]), config_dict_or_path=settings)

    return cut
