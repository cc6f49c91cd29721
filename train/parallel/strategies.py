"""How gradients come from the model to the adapter, and weights from the adapter to the model, on one process or many.

The optimizer always sees the same: full-shape float32 weights and the gradient of the whole global batch, identical on
every rank. On one process and under `ddp` these are the model's own LoRA parameters. Under ZeRO the model's are cut into
flat shards, which ProdigyPlusScheduleFree must not see (each rank would estimate another step size); there the adapter
holds replicated masters, gradients are gathered into them and the weights written back.
"""

import logging
import os
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.model.adapter import Adapter
from train.parallel.processes import Processes

GATHERED_TOGETHER = 32
"""LoRA weights of one gathering: few calls, and little memory."""


class Parallel(Protocol):
    """What the loop needs."""

    @property
    def denoiser(self) -> nn.Module:
        """What the loss calls."""
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Back-propagates the mean loss of one micro-batch.

        After the `last` one of a step, the adapter's gradients are those of the mean over the global batch.
        """
        ...

    def publish(self) -> None:
        """Makes the model compute with the adapter's present weights. Every rank must call it."""
        ...


class Replicas:
    """The whole model on every process, or on the one there is; gradients are averaged once per step."""

    def __init__(self, denoiser: nn.Module, adapter: Adapter, processes: Processes, grad_accum_steps: int):
        self.denoiser = denoiser
        self.parameters = adapter.parameters()
        self.world_size = processes.world_size
        self.grad_accum_steps = grad_accum_steps

    def backward(self, loss: Tensor, last: bool) -> None:
        """As `Parallel.backward`."""
        (loss / self.grad_accum_steps / self.world_size).backward()
        if last and self.world_size > 1:
            gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
            for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
                work.wait()

    def publish(self) -> None:
        """The adapter's weights are the model's."""


class Zero:
    """DeepSpeed ZeRO-2 or ZeRO-3.

    Args:
        denoiser: with LoRA attached; under ZeRO-3 its frozen weights are sharded already, by `shard`.
        adapter: its weights become masters, replicated on every rank.
        processes: of the run.
        settings: DeepSpeed's configuration, from `train.parallel.settings.zero_settings`.
        offload: keep the masters, and so the optimizer, in CPU memory.
    """

    def __init__(
        self, denoiser: nn.Module, adapter: Adapter, processes: Processes, settings: dict[str, Any], offload: bool
    ):
        join(processes)
        import deepspeed

        self.sharded = settings["zero_optimization"]["stage"] == 3
        self.shards = adapter.parameters()
        adapter.detach("cpu" if offload else processes.device)
        self.masters = adapter.parameters()
        idle = Idle(self.shards)
        self.denoiser, *_ = deepspeed.initialize(model=denoiser, optimizer=idle, config=settings)

    def backward(self, loss: Tensor, last: bool) -> None:
        """As `Parallel.backward`."""
        from deepspeed.utils import safe_get_full_grad

        self.denoiser.backward(loss)  # divided by the accumulation steps and averaged over ranks
        if last:
            for shard, master in zip(self.shards, self.masters, strict=True):
                gradient = safe_get_full_grad(shard)
                assert gradient is not None, "every LoRA weight takes part in every forward pass"
                master.grad = gradient.to(master.device)
        self.denoiser.step()  # updates nothing: counts micro-batches, and clears the gradients after the last

    @torch.no_grad()
    def publish(self) -> None:
        """As `Parallel.publish`. Gathering and partitioning anew replaces what the last forward pass had gathered."""
        from deepspeed import zero

        for start in range(0, len(self.shards), GATHERED_TOGETHER):
            part = slice(start, start + GATHERED_TOGETHER)
            with zero.GatheredParameters(self.shards[part], modifier_rank=0, enabled=self.sharded):
                for shard, master in zip(self.shards[part], self.masters[part], strict=True):
                    shard.data.copy_(master)


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


def shard(settings: dict[str, Any], processes: Processes) -> Callable[[nn.Parameter], None]:
    """Cuts a loaded parameter over the ranks (ZeRO-3) as soon as it is there, so that no rank holds all of them."""
    join(processes)
    import deepspeed

    def cut(parameter: nn.Parameter) -> None:
        deepspeed.zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=settings)

    return cut
