"""Quantised layers: rounding, products and gradients against formulas in float64, and nothing widened is kept."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from data_prep.errors import InputError
from losses.batch import Condition
from tests.train.model.layers.test_lora import (
    SMALL,
    condition_of,
    drawn,
    error,
    expected_gradients,
    gradients,
    small,
    worst,
)
from tests.train.model.test_execution import ONE, results, run_with, said  # noqa: F401
from train.config import DEFAULT_TARGETS
from train.model.adapter import Adapter, attach_lora
from train.model.denoiser import Denoiser, build_dit
from train.model.execution import RUNS, Compiled, Execution
from train.model.layers.lora import linear
from train.model.quantize import (
    FEWEST_ROWS,
    LARGEST,
    STORED,
    UNITS,
    QuantizedLinear,
    check_weights,
    describe_products,
    has_products,
    product,
    product_backward,
    quantize_blocks,
    round_rows,
    round_weight,
    scaled_product,
    widened,
)
from train.plan.memory import LiveBytes
from train.plan.quantised import Format, Layer

# PyTorch's tracer looks at `.grad` of tensors that have none, and warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

CPU, META = torch.device("cpu"), torch.device("meta")
F32, BF16 = torch.float32, torch.bfloat16
FORMATS = ["fp8", "int8", "nf4"]
EIGHT_BITS = ["fp8", "int8"]
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
NF4_LEVELS = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
"""arXiv 2305.14314, appendix E."""


@pytest.fixture
def in_8_bits(monkeypatch):
    """The CPU computes as if it had units for 8 bits."""
    monkeypatch.setattr("train.model.quantize.has_products", lambda device, stored, dtype: stored in UNITS)


def quantised(weights: str, dtype=F32, targets=tuple(DEFAULT_TARGETS), device=CPU) -> tuple[Denoiser, Adapter]:
    """The transformer of `small`, rounded as it is loaded, with the same LoRA on these layers."""
    full, lora = small(dtype)
    with META:
        dit = build_dit(SMALL)
    quantize_blocks(dit, weights, dtype)
    state = {n.replace(".base_layer", ""): t for n, t in full.dit.state_dict().items() if ".lora_" not in n}
    if device == CPU:
        dit.load_state_dict(state, assign=True)
    denoiser = Denoiser(dit.requires_grad_(False), True)
    with device:
        adapter = attach_lora(denoiser, 8, 8, list(targets))
    if device == CPU:
        for name, parameter in adapter.named_parameters().items():
            parameter.data.copy_(lora.named_parameters()[name])
    return denoiser, adapter


def layer_of(weights: str, dtype=F32, inputs: int = 96, outputs: int = 64, bias: bool = True) -> QuantizedLinear:
    layer = QuantizedLinear(nn.Linear(inputs, outputs, bias, device="meta"), weights, dtype)
    state = {"weight": drawn(outputs, inputs, seed=1, dtype=dtype), "bias": drawn(outputs, seed=2, dtype=dtype)}
    layer.load_state_dict({name: tensor for name, tensor in state.items() if bias or name == "weight"}, assign=True)
    return layer


def exact_weight(layer: nn.Linear) -> Tensor:
    """What the stored numbers mean, in float64."""
    stored, scale = layer.weight, layer.scale.double()
    if stored.dtype != torch.uint8:
        return stored.double() * scale[:, None]
    halves = torch.stack([stored.long() >> 4, stored.long() & 15], dim=-1).view(-1, 64)
    return (torch.tensor(NF4_LEVELS, dtype=torch.float64)[halves] * scale[:, None]).view(len(stored), -1)


def exact_rounding(numbers: Tensor, stored: torch.dtype) -> Tensor:
    """Rows in 8 bits, back in float64."""
    scale = numbers.abs().amax(dim=-1, keepdim=True) / LARGEST[stored]
    scaled = (numbers / scale).float()
    return (scaled.round() if stored == torch.int8 else scaled.to(stored)).double() * scale


@pytest.mark.parametrize(("weights", "bits"), [("int8", 8), ("fp8", 4)])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_rows_are_rounded_as_near_as_the_format_allows(weights, bits, dtype):
    """To half a step; the scale's own rounding is made good but in the largest numbers, which the format has."""
    stored = STORED[weights]
    sizes = torch.tensor([[1e-6], [0.1], [1], [30], [0]])
    numbers = (drawn(5, 64, seed=0, dtype=F32) * sizes).to(dtype)
    values, scale = round_rows(numbers, stored, scale_dtype=dtype)
    assert torch.equal(scale, scale.to(dtype).float())
    assert values.element_size() == 1
    step = scale / 2 if weights == "int8" else (numbers.float().abs() / 2**bits).clamp_min(scale * 2**-10)
    assert ((values.float() * scale - numbers.float()).abs() <= step * 1.001).all()
    assert values.float().abs().amax(dim=1).tolist() == [LARGEST[stored]] * 4 + [0]
    columns = torch.linspace(0.1, 3, 64)
    assert torch.equal(round_rows(numbers, stored, columns).values, round_rows(numbers * columns, stored).values)


@pytest.mark.parametrize("weights", EIGHT_BITS)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(weights, wrong):
    """A run asks its losses for it."""
    values, scale = round_rows(torch.tensor([[1.0, wrong], [1.0, 2.0]]), STORED[weights])
    assert (values.float() * scale).sum(dim=1).isfinite().tolist() == [False, True]


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_nf4_takes_the_nearest_level(dtype):
    """Rows that are no whole number of blocks; the block's size is kept in bfloat16 (8 bits: 2**-8)."""
    weight = drawn(6, 96, seed=0, dtype=dtype)
    packed, scale = round_weight(weight, torch.uint8)
    blocks = weight.double().view(-1, 64)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float64)
    nearest = levels[((blocks / largest)[..., None] - levels).abs().argmin(dim=-1)] * largest
    assert (packed.shape, packed.dtype, scale.shape, scale.dtype) == ((6, 48), torch.uint8, (9,), BF16)
    actual = widened(packed, scale, F32).double().view(-1, 64)
    assert ((actual - nearest).abs() <= 2**-8 * nearest.abs()).all()


# One rounding of the weight to bfloat16 (8 bits: 2**-8 at most, some 2**-9.8 in the mean square), one of the output.
@pytest.mark.parametrize(("dtype", "tolerance"), [(F32, 1e-6), (BF16, 4e-3)])
@pytest.mark.parametrize("weights", FORMATS)
def test_products_with_widened_weights(weights, dtype, tolerance):
    layer = layer_of(weights, dtype)
    x = drawn(2, 5, 96, seed=3, dtype=dtype).requires_grad_()
    gradient = drawn(2, 5, 64, seed=4, dtype=dtype)
    output = layer(x)
    output.backward(gradient)
    exact = exact_weight(layer)
    assert error(output, x.double() @ exact.t() + layer.bias.double()) < tolerance
    assert error(x.grad, gradient.double() @ exact) < tolerance
    assert output.dtype == x.grad.dtype == dtype


# As above; bfloat16 rounds int8's scales of rows as well.
@pytest.mark.parametrize(("dtype", "tolerance"), [(F32, 1e-6), (BF16, 6e-3)])
@pytest.mark.parametrize("rows", [3, FEWEST_ROWS + 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weights", EIGHT_BITS)
def test_products_in_8_bits(in_8_bits, monkeypatch, weights, dtype, tolerance, rows, bias):
    """Both operands rounded, each row by itself; in the backward pass the gradient times the weight's scale."""
    monkeypatch.setattr("train.model.quantize.SUMS_BYTES", 4 * 64 * (FEWEST_ROWS + 1))  # int8: a rest of two rows
    layer = layer_of(weights, dtype, bias=bias)
    x = drawn(1, rows, 96, seed=3, dtype=dtype).requires_grad_()
    gradient = drawn(1, rows, 64, seed=4, dtype=dtype)
    output = layer(x)
    output.backward(gradient)
    stored, scale = layer.weight.double(), layer.scale.double()
    expected = exact_rounding(x.detach().double(), layer.weight.dtype) @ exact_weight(layer).t()
    assert error(output, expected + (layer.bias.double() if bias else 0)) < tolerance
    assert error(x.grad, exact_rounding(gradient.double() * scale, layer.weight.dtype) @ stored) < tolerance
    assert not torch.equal(output, layer_output_without_rounding(layer, x, monkeypatch))


def layer_output_without_rounding(layer: nn.Linear, x: Tensor, monkeypatch) -> Tensor:
    monkeypatch.setattr("train.model.quantize.has_products", lambda *args: False)
    return layer(x)


# Rows of 96 normal numbers. Their largest is 2.6 of their root mean square, so that int8's step is 2.6 / 127 of it, and the
# error of one rounding that / sqrt(12) = 0.6 %. fp8 has 4 bits: 2**-4 / sqrt(12) of the numbers' power of two, some 2.6 %. nf4:
# the paper's levels in blocks of 64, 9 %. Both operands rounded: sqrt(2) times as much.
@pytest.mark.parametrize(("weights", "rounding"), [("int8", 0.0065), ("fp8", 0.026), ("nf4", 0.09)])
@pytest.mark.parametrize("operands", [1, 2])
def test_products_are_as_near_as_the_format_allows(monkeypatch, weights, rounding, operands):
    monkeypatch.setattr(
        "train.model.quantize.has_products", lambda device, stored, dtype: operands == 2 and stored in UNITS
    )
    layer = layer_of(weights)
    full, x = drawn(64, 96, seed=1), drawn(1, 20, 96, seed=3, dtype=F32).requires_grad_()
    gradient = drawn(1, 20, 64, seed=4, dtype=F32)
    output = layer(x)
    output.backward(gradient)
    expected = rounding * (operands**0.5 if weights != "nf4" else 1)
    assert error(output - layer.bias, x.double() @ full.t()) == pytest.approx(expected, rel=0.1)
    assert error(x.grad, gradient.double() @ full) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("weights", EIGHT_BITS)
def test_vectors_and_odd_sizes_are_not_rounded(in_8_bits, weights):
    for layer, shape in ((layer_of(weights), (2, 96)), (layer_of(weights, outputs=24), (1, 2, 96))):
        x = drawn(*shape, seed=3, dtype=F32)
        assert error(layer(x), x.double() @ exact_weight(layer).t() + layer.bias.double()) < 1e-6
    planned = Format(weights, True, False, 4)
    found = [planned.in_8_bits(Layer(*sizes)) for sizes in ((96, 64, 9), (96, 64, 2), (96, 24, 9), (24, 64, 9))]
    assert found == [True, False, False, False]


@pytest.mark.parametrize("weights", EIGHT_BITS)
def test_layouts_that_gpus_take(weights):
    """PyTorch checks `_scaled_mm`'s operands on the meta device as on CUDA, but not on the CPU."""
    x, gradient = torch.empty(5, 96, device=META, dtype=BF16), torch.empty(5, 64, device=META, dtype=BF16)
    weight, scale = torch.empty(64, 96, device=META, dtype=STORED[weights]), torch.empty(64, device=META)
    output, d_x = torch.empty(5, 64, device=META, dtype=BF16), torch.empty(5, 96, device=META, dtype=BF16)
    watched = Operands()
    with watched:
        product(x, round_rows(x, weight.dtype), weight, scale, None, output)
        for add in (False, True):
            product_backward(gradient, round_rows(gradient, weight.dtype, scale), weight, scale, d_x, add)
    rows = max(5, watched.fewest)
    assert watched.shapes == [((rows, 96), (96, 64)), *[((rows, 64), (64, 96))] * 2]
    assert all(first[1] == 1 and second[0] == 1 for first, second in watched.strides)
    assert watched.fast == ([True, False, False] if weights == "fp8" else [])


@pytest.mark.parametrize("weights", EIGHT_BITS)
def test_a_gradient_of_any_layout_is_rounded_to_whole_rows(in_8_bits, weights):
    """The CPU takes other layouts too, CUDA none."""
    layer, x = layer_of(weights), drawn(1, 20, 96, seed=3, dtype=F32).requires_grad_()
    gradient, layouts = drawn(1, 64, 20, seed=4, dtype=F32).transpose(1, 2), []

    class Layouts(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.qwen_edit.quantized_linear_backward.default:
                layouts.extend(operand.is_contiguous() for operand in args[:3])
            return func(*args, **(kwargs or {}))

    with Layouts():
        layer(x).backward(gradient)
    assert not gradient.is_contiguous()
    assert layouts == [True] * 3


@pytest.mark.parametrize("weights", EIGHT_BITS)
@pytest.mark.parametrize("part", ["output", "gradient", "added gradient"])
def test_what_a_product_holds_is_planned(monkeypatch, weights, part):
    """Sums of some rows at a time, which a GPU alone scales without a float32 copy of them, and a turned weight."""
    sums, stored = 2**14, STORED[weights]
    monkeypatch.setattr("train.model.quantize.SUMS_BYTES", sums)
    monkeypatch.setattr("train.plan.quantised.SUMS_BYTES", sums)
    weight, scale = round_weight(drawn(64, 96, seed=1, dtype=BF16), stored)
    rows, wide = (96, 64) if part == "output" else (64, 96)
    numbers, out = round_rows(drawn(1000, rows, seed=3, dtype=F32), stored), torch.zeros(1000, wide, dtype=BF16)
    with LiveBytes() as live:
        if part == "output":
            scaled_product(numbers, weight, scale, out)
        else:
            product_backward(out, numbers, weight, scale, out, add=part == "added gradient")
    copied = sums if weights == "int8" else 2 * sums
    expected = sums + copied + (0 if part == "output" else weight.nbytes)
    assert 0.95 * expected <= live.peak <= expected + 32
    planned = Format(weights, True, True, 2).workspace_bytes(Layer(96, 64, 1000), 1)
    assert live.peak - copied + numbers.values.nbytes <= planned


class Operands(torch.utils._python_dispatch.TorchDispatchMode):
    """The shapes and strides that products in 8 bits are given."""

    def __init__(self):
        super().__init__()
        self.shapes, self.strides, self.fewest, self.fast = [], [], 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten._scaled_mm, torch.ops.aten._int_mm):
            self.shapes.append(tuple(tuple(each.shape) for each in args[:2]))
            self.strides.append(tuple(each.stride() for each in args[:2]))
            self.fewest = FEWEST_ROWS if func.overloadpacket == torch.ops.aten._int_mm else 0
        if func.overloadpacket == torch.ops.aten._scaled_mm:
            self.fast.append(args[7] if len(args) > 7 else kwargs.get("use_fast_accum", False))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("lora", [True, False])
def test_autograd_keeps_the_stored_weight_alone(weights, lora):
    """Beside what LoRA wants: its input, the small product, and its weights."""
    denoiser, _ = quantised(weights, targets=["to_q"] if lora else ["to_k"])
    layer = denoiser.dit.transformer_blocks[0].attn.to_q
    base = layer.base_layer if lora else layer
    x = drawn(1, 40, 128, seed=3, dtype=F32).requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        linear(x, layer)[0].sum()
    own = {base.weight.data_ptr(), base.scale.data_ptr()}
    assert own <= {tensor.data_ptr() for tensor in saved}
    others = sum(tensor.nbytes for tensor in saved if tensor.data_ptr() not in own)
    assert others == (4 * (x.numel() + 40 * 8 + 8 * 128 + 128 * 8) if lora else 0)


@pytest.mark.parametrize("targets", [DEFAULT_TARGETS, ATTENTION], ids=["default", "attention"])
@pytest.mark.parametrize("weights", FORMATS)
def test_gradients_of_every_weight(weights, targets):
    """Against diffusers and PEFT in float64 with the weights that the rounded ones stand for: layers with LoRA, those that
    read one input together, and those without. Texts of different lengths."""
    denoiser, adapter = quantised(weights, targets=targets)
    assert {type(module) for module in denoiser.dit.modules() if isinstance(module, nn.Linear)} == {
        nn.Linear,
        QuantizedLinear,
    }
    velocity, expected = expected_gradients(denoiser, adapter, SMALL, [5, 9])
    found, mine = gradients(denoiser, adapter, SMALL, [5, 9])
    assert error(found, velocity) < 1e-5
    assert worst(mine, expected) < 1e-4


# Three blocks of the products above. The bounds are a half and twice what was measured.
@pytest.mark.parametrize(("weights", "low", "high"), [("int8", 4e-3, 0.022), ("fp8", 0.014, 0.062)])
def test_gradients_in_8_bits_are_near(in_8_bits, weights, low, high):
    denoiser, adapter = quantised(weights)
    velocity, expected = expected_gradients(denoiser, adapter, SMALL, [5, 9])
    found, mine = gradients(denoiser, adapter, SMALL, [5, 9])
    assert low < error(found, velocity) < high
    assert low < sum(error(mine[name], expected[name]) for name in expected) / len(expected) < high


@pytest.mark.parametrize("weights", FORMATS)
def test_every_way_of_keeping_has_the_same_gradients(in_8_bits, weights):
    denoiser, adapter = quantised(weights, targets=ATTENTION)
    expected = results(denoiser, adapter, ONE[:2])
    for keep in RUNS:
        run_with(denoiser, RUNS[keep])
        actual = results(denoiser, adapter, ONE[:2])
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(actual, expected, strict=True)), keep


@pytest.mark.parametrize("weights", FORMATS)
def test_compiled_without_a_break(in_8_bits, weights):
    """Layers with LoRA that read one input, and one without. `aot_eager` runs the traced operations as they are, so nothing
    may differ."""
    denoiser, adapter = quantised(weights, targets=ATTENTION)
    block = denoiser.dit.transformer_blocks[0]
    x = drawn(1, 20, 128, seed=3, dtype=F32).requires_grad_()

    def function(x: Tensor) -> Tensor:
        query, key, value = linear(x, block.attn.to_q, block.attn.to_k, block.attn.to_v)
        return linear(query * key + value, block.img_mlp.net[0].proj)[0]

    trained = [x, *(p for n, p in adapter.named_parameters().items() if n.startswith("transformer_blocks.0.attn.to_"))]
    found = []
    for run in (function, torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")):
        output = run(x)
        found.append([output, *torch.autograd.grad(output.square().sum(), trained, allow_unused=True)])
    assert all(mine is theirs or torch.equal(mine, theirs) for mine, theirs in zip(*found, strict=True))
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_blocks(said, in_8_bits):  # noqa: F811
    """`aot_eager` runs the traced operations as they are, so nothing may differ. The real compiler is the GPU tests' matter."""
    denoiser, adapter = quantised("int8")
    expected = results(denoiser, adapter, ONE[:1])
    run_with(denoiser, Compiled(RUNS["products"], said.append, backend="aot_eager"))
    actual = results(denoiser, adapter, ONE[:1])
    assert len(said) == 2
    assert all(line.startswith("compiled a block in ") for line in said), said
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(actual, expected, strict=True))


@pytest.mark.parametrize("weights", FORMATS)
def test_sizes_are_known_before_loading(weights):
    on_meta, loaded = (quantised(weights, BF16, device=device)[0].dit for device in (META, CPU))
    sizes = [
        {name: t.nbytes for name, t in (*dit.named_parameters(), *dit.named_buffers()) if ".lora_" not in name}
        for dit in (on_meta, loaded)
    ]
    assert sizes[0] == sizes[1]
    full = small(BF16)[0].dit
    assert sum(sizes[1].values()) < 0.6 * sum(t.nbytes for n, t in full.named_parameters() if ".lora_" not in n)


@pytest.mark.parametrize("weights", FORMATS)
def test_a_state_dict_is_the_full_layers(weights):
    """What a layer has rounded it rounds to the same again."""
    layer = layer_of(weights)
    state = layer.state_dict()
    assert {name: tensor.shape for name, tensor in state.items()} == {"weight": (64, 96), "bias": (64,)}
    assert error(state["weight"], exact_weight(layer)) < 1e-6
    again = QuantizedLinear(nn.Linear(96, 64, device="meta"), weights, F32)
    again.load_state_dict(state, assign=True)
    assert error(again.state_dict()["weight"], state["weight"].double()) < (4e-3 if weights == "nf4" else 1e-6)


def test_a_dry_run_counts_the_same_operations():
    """On the meta device, where runs are planned: as much to compute, and nothing of full weights to keep."""
    found = {}
    for weights in ("bf16", *FORMATS):
        denoiser, adapter = quantised(weights, BF16, device=META)
        adapter.copy_for_products(denoiser.dit.transformer_blocks, BF16)
        Execution("nothing").apply(denoiser.dit.transformer_blocks)
        condition = condition_of(SMALL, [9])[2]
        text = condition.prompt_emb.to(META)
        references = [each.to(META) for each in condition.edit_latents]
        with LiveBytes() as live, FlopCounterMode(display=False) as counter:
            velocity = denoiser(
                torch.empty(1, 16, 4, 8, device=META),
                torch.empty(1, device=META),
                Condition(text, condition.prompt_emb_mask, references),
            )
            velocity.square().mean().backward()
        found[weights] = counter.get_total_flops(), live.peak
    flops, peaks = ({weights: each[i] for weights, each in found.items()} for i in range(2))
    assert set(flops.values()) == {flops["bf16"]}
    assert peaks["nf4"] == peaks["bf16"]
    assert all(peaks["bf16"] <= peaks[weights] < 1.5 * peaks["bf16"] for weights in EIGHT_BITS)


def test_where_products_are_in_8_bits(monkeypatch):
    assert not has_products(CPU, torch.int8, BF16)
    cuda, both = torch.device("cuda", 0), set(UNITS)
    for capability, expected in (((7, 5), set()), ((8, 6), {torch.int8}), ((8, 9), both), ((9, 0), both)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        formats = {stored for stored in (*STORED.values(), BF16) if has_products(cuda, stored, BF16)}
        assert formats == expected
        assert not any(has_products(cuda, stored, F32) for stored in STORED.values())
    assert "multiplied in 8 bits" in describe_products("fp8", cuda, BF16)
    assert "dequantised to float32" in describe_products("fp8", cuda, F32)
    assert "dequantised to bfloat16" in describe_products("int8", CPU, BF16)


def test_a_missing_package_gets_a_sentence(monkeypatch):
    monkeypatch.setattr("train.model.quantize.find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"model\.weights=nf4 needs the package bitsandbytes: pip install bitsandbytes"
    ):
        check_weights("nf4")
    check_weights("int8")
