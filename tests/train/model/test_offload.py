"""Offloaded blocks: the same numbers bit for bit, and an order of copies and computing that holds on any two streams."""

import contextlib
import gc
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data_prep.errors import InputError
from data_prep.model.directory import ModelDirectory
from tests.train.model.layers.test_lora import SMALL, small
from tests.train.model.test_adapter import inputs, trained
from tests.train.model.test_execution import ONE, SEVERAL, said  # noqa: F401
from train.model import offload as module
from train.model.denoiser import build_dit, load_denoiser
from train.model.execution import RUNS, Compiled
from train.model.offload import InOrder, Layout, Offload, Streams, offload_sizes, offloaded

pytestmark = pytest.mark.slow

NUM_BLOCKS = 4
CONFIG = SMALL | {"num_layers": NUM_BLOCKS}
CPU, STILL = torch.device("cpu"), InOrder()


class Line:
    """A stream that may be ahead of the other, or behind it, by anything that events allow.

    Attributes:
        clock: of each stream, how much of its work is done before this one's next (Lamport, Fidge and Mattern's vectors).
    """

    def __init__(self, number: int):
        self.number, self.clock = number, [0, 0]

    def record_event(self) -> list[int]:
        return list(self.clock)

    def wait_event(self, event: list[int]) -> None:
        self.clock = [max(pair) for pair in zip(self.clock, event, strict=True)]

    def synchronize(self) -> None:
        pass


class TooEarly(Exception):
    pass


class Watched(TorchDispatchMode):
    """Sees every operation on a slot, and that what it must come after is done, whatever the streams' speeds."""

    def __init__(self):
        super().__init__()
        self.copying, self.computing = Line(0), Line(1)
        self.present = self.computing
        self.streams = Streams(self.copying, lambda: self.computing, self.on, self.share)
        self.slots: list[Tensor] = []
        self.written: dict[int, tuple[int, int]] = {}
        self.read: dict[int, list[tuple[int, int]]] = {}
        self.copied, self.uses = [], 0

    def share(self, memory: Tensor) -> Tensor:
        self.slots.append(memory.fill_(255))  # 255 in every byte is NaN
        return memory

    @contextlib.contextmanager
    def on(self, stream: Line):
        before, self.present = self.present, stream
        yield
        self.present = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        addresses = {memory.data_ptr() for memory in self.slots}
        touched = [tensor.untyped_storage().data_ptr() for tensor in tree_leaves(args) if isinstance(tensor, Tensor)]
        if not func.is_view:
            for address in addresses.intersection(touched):
                self._access(address, writes=touched[0] == address and func is torch.ops.aten.copy_.default)
        return func(*args, **(kwargs or {}))

    def _access(self, address: int, writes: bool) -> None:
        line = self.present
        line.clock[line.number] += 1
        now = line.number, line.clock[line.number]
        before = [self.written[address]] if address in self.written else []
        before += self.read.get(address, []) if writes else []
        for stream, time in before:
            if time > line.clock[stream]:
                raise TooEarly(f"a slot is {'written' if writes else 'read'} before that is safe")
        if writes:
            self.written[address], self.read[address] = now, []
            self.copied.append(address)
        else:
            self.read[address].append(now)
            self.uses += 1


def offload(denoiser, count: int, streams: Streams | None = None) -> None:
    denoiser.offload = Offload(denoiser.dit.transformer_blocks, count, CPU, streams=streams)
    denoiser.offload.start()


def forward(denoiser, case) -> Tensor:
    return denoiser(*case).square().mean()


def steps(denoiser) -> list[Tensor]:
    for case in ONE[:2]:
        forward(denoiser, case).backward()
        yield


def accumulation(denoiser):
    for case in (ONE[0], SEVERAL[1], ONE[2]):
        forward(denoiser, case).backward()
    yield


def two_forwards_before_a_backward(denoiser):
    """As of a loss that adds up its two streams."""
    (forward(denoiser, ONE[0]) + forward(denoiser, ONE[1])).backward()
    yield


def validation_between(denoiser):
    forward(denoiser, ONE[0]).backward()
    with torch.no_grad():
        forward(denoiser, ONE[1])
        forward(denoiser, ONE[0])
    loss = forward(denoiser, ONE[0])
    with torch.no_grad():
        forward(denoiser, ONE[1])
    loss.backward()
    yield


class Interrupted(Exception):
    pass


@contextlib.contextmanager
def failing(block):
    """Its forward pass, in the middle."""
    run = block.run

    def fail(*args):
        run(*args)
        raise Interrupted

    block.run = fail
    with contextlib.suppress(Interrupted):
        yield
    block.run = run


class FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, gradient):
        raise Interrupted


@contextlib.contextmanager
def failing_backward(block):
    """Its backward pass, before it begins."""
    run = block.run
    block.run = lambda *args: tuple(FailingBackward.apply(output) for output in run(*args))
    with contextlib.suppress(Interrupted):
        yield
    block.run = run


def an_exception_in_the_middle(denoiser):
    blocks = denoiser.dit.transformer_blocks
    for broken in (failing(blocks[2]), failing_backward(blocks[1])):
        with broken:
            forward(denoiser, ONE[1]).backward()
        for parameter in denoiser.parameters():
            parameter.grad = None
        forward(denoiser, ONE[0]).backward()
    with torch.no_grad(), failing(blocks[3]):
        forward(denoiser, ONE[1])
    forward(denoiser, ONE[0]).backward()
    yield


SCENARIOS = [steps, accumulation, two_forwards_before_a_backward, validation_between, an_exception_in_the_middle]


def results(keep: str, count: int, streams: Streams | None, scenario) -> list[Tensor]:
    """The velocity before, and all gradients after each step."""
    denoiser, adapter = small(torch.float32, CONFIG)
    for block in denoiser.dit.transformer_blocks:
        block.run = RUNS[keep]
    if count:
        offload(denoiser, count, streams)
    with torch.no_grad():
        found = [denoiser(*ONE[0])]
    for _ in scenario(denoiser):
        found += [parameter.grad.clone() for parameter in adapter.parameters()]
    return found


def equal(mine: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(mine, theirs, strict=True))


@pytest.mark.parametrize(
    ("keep", "scenario", "counts"),
    [
        *(("nothing", scenario, (1, 2, 3, 4)) for scenario in SCENARIOS),
        *(("all", scenario, (3, 4)) for scenario in SCENARIOS),
        *((keep, scenario, (3,)) for keep in ("products", "attention") for scenario in SCENARIOS[2:4]),
    ],
)
def test_same_numbers_in_a_safe_order(keep, scenario, counts):
    expected = results(keep, 0, None, scenario)
    for count in counts:
        with Watched() as watched:
            found = results(keep, count, watched.streams, scenario)
        assert equal(found, expected), count
        assert watched.uses > len(watched.copied) >= count
        assert len(watched.slots) == min(2, count)


def without_waiting(streams: Streams, slot: Tensor, memory: Tensor):
    with streams.on(streams.copying):
        slot.copy_(memory)
    return streams.copying.record_event()


def one_slot(offload: Offload) -> None:
    for waiting in offload.waiting.values():
        waiting.layout.point_to(offload.slots[0])


PREPARE = Offload._prepare
FAULTS = {
    "copies_do_not_wait": (Streams, "copy", without_waiting),
    "computing_does_not_wait": (Streams, "wait", lambda self, done: None),
    "nothing_is_brought_back": (Offload, "_before_backward", lambda self, number: None),
    "wrong_slot": (Offload, "_point_to_slots", one_slot),
    "used_slot_is_filled": (Offload, "_prepare", lambda self, number, beside=None: PREPARE(self, number)),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_each_fault_is_found(fault, monkeypatch):
    """By the order of the streams, or by the numbers."""
    expected = results("all", 0, None, validation_between)
    monkeypatch.setattr(*FAULTS[fault])
    try:
        with Watched() as watched:
            found = results("all", 3, watched.streams, validation_between)
    except TooEarly:
        return
    assert not equal(found, expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled(said):  # noqa: F811
    """Weights in slots need no graphs of their own."""
    expected = results("nothing", 0, None, two_forwards_before_a_backward)
    denoiser, adapter = small(torch.float32, CONFIG)
    offload(denoiser, 2)
    run = Compiled(RUNS["nothing"], said.append, backend="aot_eager")
    for block in denoiser.dit.transformer_blocks:
        block.run = run
    for _ in two_forwards_before_a_backward(denoiser):
        found = [parameter.grad for parameter in adapter.parameters()]
    assert equal(found, expected[1:])
    assert [line.split(" in ")[0] for line in said] == ["compiled a block"] * 2


@pytest.mark.parametrize(
    ("count", "with_gradients", "without"),
    [(1, 0, 0), (2, 0, 0), (3, 2, 2), (4, 4, 4)],
)
def test_copies_of_a_step(count, with_gradients, without):
    """Each block once forward and once backward, but for those that are in the slots at either turn."""
    copies = []

    class Counted(Streams):
        def copy(self, slot: Tensor, memory: Tensor) -> None:
            copies.append(memory)
            return super().copy(slot, memory)

    denoiser, _ = small(torch.float32, CONFIG)
    offload(denoiser, count, Counted(STILL, lambda: STILL, contextlib.nullcontext))
    for _ in range(2):
        copies.clear()
        forward(denoiser, ONE[0]).backward()
    assert len(copies) == with_gradients
    with torch.no_grad():
        for _ in range(2):
            copies.clear()
            forward(denoiser, ONE[0])
    assert len(copies) == without


def test_the_device_holds_two_slots_and_what_is_not_offloaded(tiny_model_dir):
    """And their sizes are known before anything is loaded."""
    model = ModelDirectory.resolve(tiny_model_dir)
    for dtype, count in ((torch.bfloat16, 3), (torch.float32, 1)):
        denoiser = load_denoiser(model, dtype=dtype, offload_blocks=count)
        plain = load_denoiser(model, dtype=dtype)
        chosen = offloaded(len(plain.dit.transformer_blocks), count)
        with torch.device("meta"):
            meta = build_dit(model.config("transformer")).to(dtype)
        sizes = offload_sizes(meta.transformer_blocks, count)
        assert sizes.waiting == sum(waiting.memory.nbytes for waiting in denoiser.offload.waiting.values())
        assert sizes.waiting >= sum(t.nbytes for i in chosen for t in plain.dit.transformer_blocks[i].parameters())
        resident = on_device(plain) - sum(on_device(plain.dit.transformer_blocks[index]) for index in chosen)
        assert on_device(denoiser) == resident + sizes.slots
        assert sizes.slots == min(2, count) * sizes.waiting // count  # all blocks are alike
        with denoiser.weights_at_rest():
            assert equal(list(denoiser.parameters()), list(plain.parameters()))


def on_device(part: nn.Module) -> int:
    """Bytes of the memory that the module's tensors are views of."""
    memories = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in part.state_dict().values()}
    return sum(memory.nbytes() for memory in memories.values())


def test_blocks_leave_the_device_as_they_are_read(tiny_model_dir, monkeypatch):
    """Whenever the next tensor is read, all before it have been sent to the CPU, and whole blocks wait in one piece."""
    left, made, original, cpu = set(), [], ModelDirectory.tensors, Tensor.cpu

    def watched(self, component):
        for name, tensor in original(self, component):
            yield name, tensor
            for number, block in enumerate(made[0].blocks):
                tensors = Layout(block).tensors
                loaded = [tensor.data_ptr() for tensor in tensors if not tensor.is_meta]
                assert left.issuperset(loaded) or len(loaded) == len(tensors)
                assert (number in made[0].waiting) == (len(loaded) == len(tensors))

    def sent(self):
        left.add(self.data_ptr())
        return cpu(self)

    class Seen(Offload):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(ModelDirectory, "tensors", watched)
    monkeypatch.setattr(Tensor, "cpu", sent)
    monkeypatch.setattr("train.model.denoiser.Offload", Seen)
    load_denoiser(ModelDirectory.resolve(tiny_model_dir), offload_blocks=2)
    assert len(made[0].waiting) == 2


class Mixed(nn.Module):
    """Weights as quantised layers have them; returns copies of what it computes with."""

    def __init__(self, seed: int):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        numbers = torch.randint(0, 127, (7, 13 + seed), generator=draw)
        for name, dtype in {"a": torch.int8, "b": torch.uint8, "c": torch.float8_e4m3fn, "d": torch.bfloat16}.items():
            self.register_parameter(name, nn.Parameter(numbers.to(dtype), requires_grad=False))
        self.register_buffer("scale", torch.rand(3, generator=draw), persistent=False)
        self.register_buffer("one_scale", torch.rand((), generator=draw, dtype=torch.float64))
        self.layer = nn.ParameterDict({"lora_A": torch.zeros(2)})

    def forward(self) -> tuple[Tensor, ...]:
        return tuple(tensor.float() for tensor in Layout(self).tensors)


def test_tensors_of_any_dtype_and_blocks_of_different_sizes():
    blocks = [Mixed(seed) for seed in range(5)]
    expected = [block() for block in blocks]
    adapters = [block.layer.lora_A.data_ptr() for block in blocks]
    Offload(blocks, 5, CPU).start()
    with torch.no_grad():
        for block, tensors in [*zip(blocks, expected, strict=True)] * 2:
            assert equal(list(block()), list(tensors))
    assert [block.layer.lora_A.data_ptr() for block in blocks] == adapters


@pytest.mark.parametrize(
    ("count", "chosen"), [(0, []), (1, [0]), (2, [0, 5]), (4, [0, 2, 5, 7]), (10, list(range(10)))]
)
def test_blocks_are_spread(count, chosen):
    assert offloaded(10, count) == chosen


def test_more_than_there_are():
    with pytest.raises(
        InputError, match=r"train.offload_blocks=11, and the transformer has 10 blocks: set it to 0 … 10"
    ):
        offloaded(10, 11)


@pytest.mark.parametrize(
    ("owner", "step", "error"),
    [
        (module, "_memory", OSError(12, "Cannot allocate memory")),
        (module, "_pin", RuntimeError("no")),
        (Tensor, "cpu", RuntimeError("DefaultCPUAllocator: can't allocate memory")),
    ],
)
def test_too_little_cpu_memory(owner, step, error, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr(module, "_pin", lambda memory: None)
    monkeypatch.setattr(owner, step, fail)
    blocks = [Mixed(0), Mixed(1)]
    streams = Streams(STILL, lambda: STILL, contextlib.nullcontext)
    with pytest.raises(InputError, match=r"no CPU memory for the weights of offloaded block 1 of 2, .*: offload fewer"):
        Offload(blocks, 2, "cuda", streams=streams).place(blocks[0], "a")


def test_memory_is_pinned_as_it_is_and_given_back(monkeypatch):
    """One piece a block, of its size, while copies are on their way."""
    calls = []
    runtime = SimpleNamespace(
        cudaHostRegister=lambda *args: calls.append(("pin", *args)),
        cudaHostUnregister=lambda *args: calls.append(("unpin", *args)),
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "check_error", lambda result: None)
    blocks, stream = [Mixed(0), Mixed(1)], SimpleNamespace(synchronize=lambda: calls.append("finished"))
    made = Offload(blocks, 2, "cuda", streams=Streams(stream, lambda: stream, contextlib.nullcontext))
    for block in blocks:
        made.place(block, "a")
    pieces = [waiting.memory for waiting in made.waiting.values()]
    assert calls == [("pin", piece.data_ptr(), piece.nbytes, 0) for piece in pieces]
    assert [piece.nbytes for piece in pieces] == [Layout(block).num_bytes for block in blocks]
    addresses = [piece.data_ptr() for piece in pieces]
    calls.clear()
    del made, pieces
    gc.collect()
    assert calls == ["finished", *(("unpin", address) for address in addresses)]


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_are_put_on_offloaded_blocks(tiny_model_dir, dora):
    """DoRA's magnitudes begin as the lengths of the frozen weights."""
    model = ModelDirectory.resolve(tiny_model_dir)
    found = []
    for count in (0, 2):
        denoiser = load_denoiser(model, dtype=torch.float32, offload_blocks=count)
        adapter = trained(denoiser, dora=dora)
        denoiser(*inputs(denoiser)).square().mean().backward()
        found.append([*adapter.state_dict().values(), *(parameter.grad for parameter in adapter.parameters())])
    assert equal(*found)
