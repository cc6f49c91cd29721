"""Blocks whose frozen weights wait in CPU memory and come to the device one block ahead. They never change, so none go back.

Each such block is one piece of CPU memory, pinned where a GPU can read it. On the device there are two slots of the largest
block's size; the weights of the blocks are views of them for good, every other block of the same slot. So addresses stay,
which compiled graphs rely on, and what autograd saves of a weight is a view too, which keeps nothing more alive.

The order: hooks run before a block's forward pass and before its backward pass, when all work of the blocks before it has been
asked for. (Backward too: of what is ready autograd runs what was made last, so nothing of a later block is left when an earlier
one's outputs get their gradients; recomputing a block is part of its backward pass.) There the computing stream is made to wait
for the block's copy, and the copy of the next into the other slot is asked for, which begins when all that is done.
"""

import contextlib
import functools
import itertools
import mmap
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from data_prep.errors import InputError

ALIGNMENT = 256
"""Alignment of each tensor in a piece of memory, in bytes."""
NUM_SLOTS = 2


def offloaded(num_blocks: int, count: int) -> list[int]:
    """Which blocks are offloaded: `count` of them, evenly spread, so that each copy has as much computing to hide behind.

    Raises:
        InputError: there are fewer blocks.
    """
    if not 0 <= count <= num_blocks:
        raise InputError(
            f"train.offload_blocks={count}, and the transformer has {num_blocks} blocks: set it to 0 … {num_blocks}"
        )
    return [index * num_blocks // count for index in range(count)]


def chosen(blocks: Iterable[nn.Module], count: int) -> list[nn.Module]:
    """The blocks that `offloaded` names."""
    every = list(blocks)
    return [every[index] for index in offloaded(len(every), count)]


class OffloadSizes(NamedTuple):
    """Bytes that offloading takes."""

    slots: int
    """On the device, instead of the offloaded blocks."""
    waiting: int
    """In CPU memory; as many are copied to the device in a forward pass, and again in a backward pass."""


def offload_sizes(blocks: Iterable[nn.Module], count: int) -> OffloadSizes:
    """What offloading `count` of a transformer's blocks takes. They may be on the meta device."""
    sizes = [Layout(block).num_bytes for block in chosen(blocks, count)]
    return OffloadSizes(max(sizes, default=0) * min(NUM_SLOTS, count), sum(sizes))


def aligned(num_bytes: int) -> int:
    """What a tensor takes in a piece of memory."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class Layout:
    """A block's frozen parameters and its buffers, one behind the other in one piece of memory."""

    def __init__(self, block: nn.Module):
        self.tensors = frozen(block)
        ends = itertools.accumulate(aligned(tensor.nbytes) for tensor in self.tensors)
        *self.starts, self.num_bytes = 0, *ends

    def point_to(self, memory: Tensor) -> None:
        """The tensors are views of `memory` (uint8) from now on."""
        for tensor, view in self.views(memory):
            tensor.data = view

    def copy_to(self, memory: Tensor) -> None:
        """Copies them into `memory` (uint8)."""
        for tensor, view in self.views(memory):
            view.copy_(tensor.data)

    def views(self, memory: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each tensor, and its place in `memory` (uint8)."""
        for tensor, start in zip(self.tensors, self.starts, strict=True):
            assert tensor.is_contiguous(), "weights are packed as they lie in memory"
            yield tensor, memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)


def frozen(block: nn.Module) -> list[Tensor]:
    """What a block computes with, but for what is trained."""
    trained = {
        id(module._parameters[name]) for module in block.modules() for name in getattr(module, "in_full", ())
    }  # of `mark_trained`
    named = itertools.chain(block.named_parameters(), block.named_buffers())
    return [tensor for name, tensor in named if ".lora_" not in name and id(tensor) not in trained]


@dataclass
class Waiting:
    """A block's weights in CPU memory."""

    layout: Layout
    memory: Tensor


class Offload:
    """Some of a transformer's blocks, offloaded.

    Made while they are on the meta device, it takes each away from the device as soon as it is read (`place`). `start`
    makes them work.

    Args:
        blocks: all blocks of the transformer, in order.
        count: how many are offloaded.
        device: where they compute.
        streams: streams of the device, by default.

    Raises:
        InputError: there are fewer blocks.
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        count: int,
        device: torch.device | str,
        streams: "Streams | None" = None,
    ):
        self.blocks = chosen(blocks, count)
        self.device = torch.device(device)
        self.streams = streams or streams_of(self.device)
        self.waiting: dict[int, Waiting] = {}
        self.slots: list[Tensor] = []
        self.held: list[int | None] = []
        """The block in each slot, or on its way there."""
        self.done: list[Any] = []
        """The end of its copy."""
        self._change: Callable[[nn.Module], None] | None = None
        self._unchanged: set[int] = set()
        self._of_module = {module: number for number, block in enumerate(self.blocks) for module in block.modules()}
        self._pinned: list[Tensor] = []
        weakref.finalize(self, unpin, self._pinned, self.streams.copying).atexit = False

    def place(self, owner: nn.Module, name: str) -> None:
        """To be called when a module of the transformer has got its tensor of this name: if it is to wait, it leaves the device.

        Raises:
            InputError: there is no CPU memory for its block, or none that can be pinned.
        """
        number = self._of_module.get(owner)
        if number is None or number in self.waiting:
            return
        tensors = frozen(self.blocks[number])
        with self._wanting_memory(number):
            for tensor in tensors:
                if not tensor.is_meta:
                    tensor.data = tensor.data.cpu()
        if not any(tensor.is_meta for tensor in tensors):
            self._pack(number)

    def start(self) -> None:
        """From now on the blocks compute with what is in the slots, and hooks bring it there.

        Raises:
            InputError: as of `place`.
        """
        for number in range(len(self.blocks)):
            if number not in self.waiting:
                self._pack(number)
        size = max((waiting.layout.num_bytes for waiting in self.waiting.values()), default=0)
        for _ in range(min(NUM_SLOTS, len(self.blocks))):
            self.slots.append(self.streams.share(torch.empty(size, dtype=torch.uint8, device=self.device)))
        self.held, self.done = [None] * len(self.slots), [None] * len(self.slots)
        self._point_to_slots()
        for number, block in enumerate(self.blocks):
            block.register_forward_pre_hook(functools.partial(self._before_forward, number))
            block.register_forward_hook(functools.partial(self._after_forward, number))

    def change_on_arrival(self, change: Callable[[nn.Module], None] | None) -> None:
        """From now on a block's weights are changed whenever they have come to the device, before it computes; those that wait
        stay as they are.

        Args:
            change: changes a block's weights in place; None to compute with the weights in CPU memory.
        """
        self._change = change
        self.held = [None] * len(self.slots)  # what is there was changed otherwise

    @contextlib.contextmanager
    def at_rest(self) -> Iterator[None]:
        """Inside, the blocks' weights are the waiting ones, in CPU memory: all of them can be read at once."""
        for waiting in self.waiting.values():
            waiting.layout.point_to(waiting.memory)
        try:
            yield
        finally:
            self._point_to_slots()

    def _point_to_slots(self) -> None:
        for number, waiting in self.waiting.items():
            waiting.layout.point_to(self.slots[self._slot(number)])

    def _pack(self, number: int) -> None:
        layout = Layout(self.blocks[number])
        with self._wanting_memory(number):
            memory = waiting_memory(layout.num_bytes, self.device)
            if self.device.type == "cuda":
                self._pinned.append(memory)
        layout.copy_to(memory)
        layout.point_to(memory)
        self.waiting[number] = Waiting(layout, memory)

    @contextlib.contextmanager
    def _wanting_memory(self, number: int) -> Iterator[None]:
        """What fails inside fails for want of CPU memory for this block."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            size = Layout(self.blocks[number]).num_bytes / 2**30
            raise InputError(
                f"no CPU memory for the weights of offloaded block {number + 1} of {len(self.blocks)}, "
                f"{size:.2f} GiB each ({error}): offload fewer blocks, or free CPU memory"
            ) from error

    def _before_forward(self, number: int, block: nn.Module, args: Any) -> None:
        self._bring(number)
        self._prepare(self._following(number), beside=number)

    def _after_forward(self, number: int, block: nn.Module, args: Any, outputs: tuple[Tensor, ...]) -> Any:
        if torch.is_grad_enabled():
            return BeforeBackward.apply(functools.partial(self._before_backward, number), *outputs)
        self._prepare(self._following(number))  # of an odd number of blocks the first goes where the last was
        return outputs

    def _before_backward(self, number: int) -> None:
        self._bring(number)
        self._prepare(number - 1 if number else None, beside=number)

    def _following(self, number: int) -> int | None:
        """The block after this one; without gradients, the next forward pass begins after the last."""
        following = number + 1
        if following < len(self.blocks):
            return following
        return None if torch.is_grad_enabled() else 0

    def _slot(self, number: int) -> int:
        return number % len(self.slots)

    def _bring(self, number: int) -> None:
        """What is computed from now on finds the block in its slot."""
        self._prepare(number)
        slot = self._slot(number)
        self.streams.wait(self.done[slot])
        if slot in self._unchanged and self._change:
            self.held[slot] = None  # half of a change is no block: it is copied again
            self._change(self.blocks[number])
            self.held[slot] = number
        self._unchanged.discard(slot)

    def _prepare(self, number: int | None, beside: int | None = None) -> None:
        """Begins to copy a block into its slot, unless it is there or on its way, or block `beside` needs the slot."""
        if number is None or (beside is not None and self._slot(number) == self._slot(beside)):
            return
        slot, waiting = self._slot(number), self.waiting[number]
        if self.held[slot] == number:
            return
        self.held[slot] = None  # until the copy has been asked for
        self.done[slot] = self.streams.copy(self.slots[slot][: waiting.layout.num_bytes], waiting.memory)
        self.held[slot] = number
        self._unchanged.add(slot)


class BeforeBackward(torch.autograd.Function):
    """Its inputs as they are; calls a function before their gradients go on."""

    @staticmethod
    def forward(ctx: Any, call: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.set_materialize_grads(False)  # nothing reads the last block's text and references
        return tensors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.call()
        return None, *gradients


@dataclass(frozen=True)
class Streams:
    """The order of copies and computing on a device.

    Attributes:
        copying: the stream of the copies.
        computing: returns the stream that computes now.
        on: makes a stream the present one.
        share: tells PyTorch of memory that the copying stream uses too.
    """

    copying: Any
    computing: Callable[[], Any]
    on: Callable[[Any], AbstractContextManager[Any]]
    share: Callable[[Tensor], Tensor] = lambda memory: memory

    def copy(self, slot: Tensor, memory: Tensor) -> Any:
        """Begins to copy, when all computing that was asked for before is done. Returns the copy's end."""
        self.copying.wait_event(self.computing().record_event())
        with self.on(self.copying):
            slot.copy_(memory, non_blocking=True)
        return self.copying.record_event()

    def wait(self, done: Any) -> None:
        """What is computed from now on begins after the copy's end."""
        self.computing().wait_event(done)


class InOrder:
    """The stream of a device that has but one: everything is done in the order in which it is asked for."""

    def record_event(self) -> None:
        """Nothing can be behind."""

    def wait_event(self, event: None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing is left to do."""


def streams_of(device: torch.device) -> Streams:
    """For a GPU, a separate stream for the copies; for other devices the one that they have."""
    if device.type != "cuda":
        stream = InOrder()
        return Streams(stream, lambda: stream, contextlib.nullcontext)
    copying = torch.cuda.Stream(device)

    def share(memory: Tensor) -> Tensor:
        memory.record_stream(copying)  # a copy may be on its way when the memory is given back
        return memory

    return Streams(copying, functools.partial(torch.cuda.current_stream, device), torch.cuda.stream, share)


def waiting_memory(num_bytes: int, device: torch.device) -> Tensor:
    """Memory of the CPU, uint8, pinned where the device is a GPU; then `unpin` must follow.

    Raises:
        OSError, RuntimeError: there is not as much, or it cannot be pinned.
    """
    memory = _memory(num_bytes)
    if device.type == "cuda":
        _pin(memory)
    return memory


def _memory(num_bytes: int) -> Tensor:
    """Memory for bytes, of whole pages."""
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)


def _pin(memory: Tensor) -> None:
    """Lets the GPU read it while others work. PyTorch's own pinned memory is rounded up to a power of two, and never returned."""
    runtime: Any = torch.cuda.cudart()
    torch.cuda.check_error(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))


def unpin(memories: list[Tensor], copying: Any) -> None:
    """Gives back what was pinned, when the copies on a stream are done."""
    copying.synchronize()
    for memory in memories:
        runtime: Any = torch.cuda.cudart()
        torch.cuda.check_error(runtime.cudaHostUnregister(memory.data_ptr()))
