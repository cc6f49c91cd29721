"""Compiled blocks: the same numbers, few graphs, and a compiler that fails costs nothing but speed."""

import pytest
import torch
from torch._dynamo.utils import counters

from losses.batch import Condition
from tests.train.model.layers.test_lora import SMALL, drawn, small
from train.model.execution import RUNS, Compiled, Execution
from train.plan.memory import LiveBytes

# PyTorch's tracer looks at `.grad` of tensors that have none, and warns of itself.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


def case(height: int, width: int, lengths: list[int], reference: tuple[int, int]):
    batch, longest = len(lengths), max(lengths)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    text = drawn(batch, longest, SMALL["joint_attention_dim"], seed=3, dtype=torch.float32)
    references = [drawn(batch, 16, *reference, seed=4, dtype=torch.float32)]
    latents = drawn(batch, 16, height, width, seed=5, dtype=torch.float32)
    return latents, torch.linspace(0.2, 0.9, batch), Condition(text, mask, references)


BUCKETS = [(8, 8, (8, 8)), (8, 12, (8, 12)), (12, 8, (4, 8))]
ONE = [case(h, w, [9 + place], reference) for place, (h, w, reference) in enumerate(BUCKETS)]
SEVERAL = [case(h, w, lengths, reference) for h, w, reference in BUCKETS for lengths in ([9, 9], [5, 11])]


def results(denoiser, adapter, cases):
    found = []
    for latents, sigma, condition in cases:
        velocity = denoiser(latents, sigma, condition)
        velocity.square().mean().backward()
        found += [velocity.detach(), *(parameter.grad for parameter in adapter.parameters())]
        for parameter in adapter.parameters():
            parameter.grad = None
    return found


@pytest.fixture
def said():
    torch._dynamo.reset()
    counters.clear()
    lines: list[str] = []
    yield lines
    torch._dynamo.reset()


def run_with(denoiser, run) -> None:
    for block in denoiser.dit.transformer_blocks:
        block.run = run


@pytest.mark.parametrize(
    ("keep", "cases", "graphs"), [*((keep, ONE, 2) for keep in RUNS), ("products", SEVERAL, 4)], ids=[*RUNS, "several"]
)
def test_few_graphs_with_the_same_numbers(said, keep, cases, graphs):
    """Over three buckets and text lengths: one graph, another for the last block, and both again for texts of
    different lengths. `aot_eager` runs the traced operations as they are, so nothing may differ."""
    denoiser, adapter = small(torch.float32)
    expected = results(denoiser, adapter, cases)
    run_with(denoiser, Compiled(RUNS[keep], said.append, backend="aot_eager"))
    actual = results(denoiser, adapter, cases)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(actual, expected, strict=True))
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    assert len(said) == graphs
    assert all(line.startswith("compiled a block in ") for line in said)


def broken_forward(graph, inputs):
    raise RuntimeError("no compiler here")


def broken_backward(graph, inputs):
    from torch._dynamo.backends.common import aot_autograd

    return aot_autograd(fw_compiler=lambda graph, inputs: graph.forward, bw_compiler=broken_forward)(graph, inputs)


@pytest.mark.parametrize("backend", [broken_forward, broken_backward])
def test_a_failing_compiler_is_named_and_left_aside(said, backend):
    """Also one that fails only at the backward pass, which PyTorch compiles when it runs."""
    denoiser, adapter = small(torch.float32)
    expected = results(denoiser, adapter, ONE[:2])
    run_with(denoiser, Compiled(RUNS["nothing"], said.append, backend=backend))
    actual = results(denoiser, adapter, ONE[:2])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(actual, expected, strict=True))
    [line] = said
    assert line.startswith("continuing without torch.compile, which failed")
    assert "no compiler here" in line


def test_kinds_of_batches_beyond_the_limit_are_computed_as_they_are(said, monkeypatch):
    """And the graphs that there are stay in use."""
    monkeypatch.setattr("train.model.execution.MAX_GRAPHS", 2)
    denoiser, adapter = small(torch.float32)
    cases = [ONE[0], SEVERAL[1], case(8, 8, [11], (8, 8)), SEVERAL[1]]
    expected = results(denoiser, adapter, cases)
    run_with(denoiser, Compiled(RUNS["nothing"], said.append, backend="aot_eager"))
    with torch._dynamo.config.patch(recompile_limit=2):
        actual = results(denoiser, adapter, cases)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(actual, expected, strict=True))
    assert counters["stats"]["unique_graphs"] == 2
    assert [line for line in said if "without torch.compile" in line] == [
        "a kind of batch runs without torch.compile, because there are already 2 graphs"
    ]


def test_our_own_errors_are_not_the_compilers(said):
    def run(block, *args):
        raise ValueError("ours")

    denoiser, _ = small(torch.float32)
    run_with(denoiser, Compiled(run, said.append, backend="eager"))
    with pytest.raises(Exception, match="ours"):
        denoiser(*ONE[0])


@pytest.mark.parametrize(
    ("setting", "kept"),
    [
        ("off", ["all"] * 3),
        ("selective", ["products"] * 3),
        ("full", ["nothing"] * 3),
        (2, ["attention", "attention", "products"]),
    ],
)
def test_settings(setting, kept):
    denoiser, _ = small(torch.float32)
    execution = Execution.of(setting)
    execution.apply(denoiser.dit.transformer_blocks)
    assert execution.kept(3) == kept
    assert [block.run for block in denoiser.dit.transformer_blocks] == [RUNS[keep] for keep in kept]


def test_what_is_kept_is_less_and_less():
    """In bytes that autograd holds after a forward pass, weights left out."""
    held = {}
    for setting in ("off", "selective", 2, 3, "full"):
        denoiser, _ = small(torch.float32)
        Execution.of(setting).apply(denoiser.dit.transformer_blocks)
        with LiveBytes() as live:
            velocity = denoiser(*ONE[0])
            held[setting] = live.now
        assert velocity.requires_grad
    assert held["full"] < held[3] < held[2] < held["selective"] < held["off"]
