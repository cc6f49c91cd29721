"""The processes that `accelerate launch` started: who this one is, and how they agree."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object

from data_prep.errors import InputError

PATIENCE = timedelta(hours=2)
"""How long a rank waits for another: one may have many more images to cache. The launcher ends the job if one fails."""


@dataclass(frozen=True)
class Processes:
    """This process among those that run together. Nothing of DeepSpeed is active here, so that phase 1 can use it."""

    state: PartialState
    control: Any = None
    """A group of the same processes that talks over the CPU, so that a question does not wait for the GPU; None on one."""

    @classmethod
    def start(cls, device: str | None) -> "Processes":
        """Joins the others.

        Args:
            device: `cpu`, or None for what accelerate finds.

        CPU processes must be told to use gloo, or every one of them believes that it is rank 0 of 1.
        """
        cpu = device == "cpu" or not torch.cuda.is_available()
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        backend = {"backend": "gloo"} if cpu and several else {}
        state = PartialState(cpu=cpu, timeout=PATIENCE, **backend)
        if state.num_processes == 1:
            return cls(state)
        return cls(state, dist.group.WORLD if cpu else dist.new_group(backend="gloo", timeout=PATIENCE))

    @property
    def rank(self) -> int:
        """This process, from 0."""
        return self.state.process_index

    @property
    def world_size(self) -> int:
        """All of them."""
        return self.state.num_processes

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        assert self.state.device is not None
        return self.state.device

    @property
    def is_main(self) -> bool:
        """Rank 0: the one that prints and writes."""
        return self.rank == 0

    def barrier(self) -> None:
        """Returns when every process has called it."""
        self.state.wait_for_everyone()

    def gather(self, value: Any) -> list[Any]:
        """What every process passed, by rank, on every process."""
        return gather_object([value])

    def any(self, answer: bool) -> bool:
        """Whether some process says yes. The same on every process."""
        if self.world_size == 1:
            return answer
        answers = torch.tensor([answer], dtype=torch.int32)
        dist.all_reduce(answers, dist.ReduceOp.MAX, group=self.control)
        return bool(answers.item())

    def say(self, text: str) -> None:
        """Prints once, whatever the number of processes."""
        if self.is_main:
            print(text, file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Leaves together: a process that exits while another still talks to it may abort."""
        self.barrier()
        if dist.is_initialized():
            dist.destroy_process_group()


def check_launch(strategy: str, dtype: str, environment: Mapping[str, str]) -> None:
    """Refuses settings of `accelerate launch` that contradict the configuration.

    Args:
        strategy: `parallel.strategy`.
        dtype: `model.dtype`.
        environment: the process's environment, in which accelerate passes its settings.

    Raises:
        InputError: names both sides.
    """

    def given(name: str) -> bool:
        return environment.get(name, "false").lower() == "true"

    num_processes = int(environment.get("WORLD_SIZE", "1"))
    if strategy == "single" and num_processes > 1:
        raise InputError(
            f"parallel=single trains on one process, but {num_processes} were launched: use parallel=ddp or "
            "parallel=zero3, or --num_processes 1, or phases=[cache] to share out the caching"
        )
    for name, variable in (("FSDP", "ACCELERATE_USE_FSDP"), ("Megatron-LM", "ACCELERATE_USE_MEGATRON_LM")):
        if given(variable):
            raise InputError(
                f"accelerate was launched with {name}, but parallel={strategy}: remove it from accelerate's "
                "configuration or command line, and choose with parallel=NAME"
            )
    if given("ACCELERATE_USE_DEEPSPEED") and not strategy.startswith("zero"):
        raise InputError(
            f"accelerate was launched with DeepSpeed, but parallel={strategy}: use parallel=zero2 or parallel=zero3, "
            "or launch without DeepSpeed"
        )
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", {"bfloat16": "bf16"}.get(dtype)):
        raise InputError(
            f"accelerate was launched with mixed precision {precision}, but model.dtype={dtype} decides the precision: "
            "launch with --mixed_precision no"
        )
