"""The low-rank operation against its formula in float64, PEFT's own layer, and diffusers' whole transformer."""

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as PeftLinear
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from losses.batch import Condition
from losses.patches import patchify, unpatchify
from train.config import DEFAULT_TARGETS
from train.model.adapter import Adapter, attach_lora
from train.model.denoiser import Denoiser, build_dit
from train.model.layers.lora import LoraLinear, linear, low_rank_linear

SCALES = [1.0, 0.5, 2.0]
PLAIN = [None] * 3
"""No scales: the weights are not quantised."""
REAL_WIDTH = {
    **{"num_layers": 1, "num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 3584},
    **{"in_channels": 64, "out_channels": 16, "axes_dims_rope": [16, 56, 56], "patch_size": 2, "zero_cond_t": True},
}
SMALL = REAL_WIDTH | {"num_layers": 3, "num_attention_heads": 4, "attention_head_dim": 32, "joint_attention_dim": 64}
SMALL |= {"axes_dims_rope": [8, 12, 12]}


def drawn(*shape: int, seed: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, in the 2-norm."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


def operands(dtype: torch.dtype, trained: torch.dtype):
    x = drawn(2, 7, 24, seed=0, dtype=dtype).requires_grad_()
    weights = [drawn(16, 24, seed=i + 1, dtype=dtype) for i in range(3)]
    biases = [drawn(16, seed=4, dtype=dtype), None, drawn(16, seed=5, dtype=dtype)]
    downs = [drawn(rank, 24, seed=6 + rank, dtype=trained).requires_grad_() for rank in (3, 4, 5)]
    ups = [drawn(16, rank, seed=20 + rank, dtype=trained).requires_grad_() for rank in (3, 4, 5)]
    return x, weights, biases, downs, ups


def apply(x, weights, biases, downs, ups):
    stack = torch.cat([down.detach() for down in downs]).to(x.dtype)
    work_ups = [up.detach().to(x.dtype) for up in ups]
    return low_rank_linear(x, None, None, weights, PLAIN, biases, downs, ups, SCALES, stack, work_ups)[:-1]


# float32: 1e-6 is some ten roundings of sums of 24. bfloat16 rounds each factor to 8 bits (0.4 %): 1e-2 is three roundings.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_equals_the_formula(dtype, tolerance):
    x, weights, biases, downs, ups = operands(dtype, torch.float32)
    outputs = apply(x, weights, biases, downs, ups)
    sum(output.float().square().sum() for output in outputs[:2]).backward()  # the third is not used
    exact = [t.detach().double().requires_grad_() for t in (x, *downs, *ups)]
    expected = [
        exact[0] @ w.double().t() + (0 if b is None else b.double()) + s * (exact[0] @ a.t()) @ u.t()
        for w, b, s, a, u in zip(weights, biases, SCALES, exact[1:4], exact[4:], strict=True)
    ]
    sum(output.square().sum() for output in expected[:2]).backward()
    assert max(error(*pair) for pair in zip(outputs, expected, strict=True)) < tolerance
    for mine, theirs in zip((x, *downs[:2], *ups[:2]), exact[:3] + exact[4:6], strict=True):
        assert error(mine.grad, theirs.grad) < tolerance
    assert all(t.grad.dtype == torch.float32 and t.dtype == torch.float32 for t in (*downs[:2], *ups[:2]))
    assert not downs[2].grad.any()


def test_gradients_are_derivatives():
    """Against finite differences, in float64."""
    x, weights, biases, downs, ups = operands(torch.float64, torch.float64)

    def function(x, *trained):
        return sum(
            output.pow(3).sum()
            for output in low_rank_linear(
                *(x, None, None, weights, PLAIN, biases, trained[:3], trained[3:], SCALES),
                *(torch.cat(trained[:3]), trained[3:]),
            )[:-1]
        )

    assert torch.autograd.gradcheck(lambda *args: function(*args), (x.detach().requires_grad_(), *downs, *ups))


def test_counts_its_operations():
    x, weights, biases, downs, ups = operands(torch.float32, torch.float32)
    with FlopCounterMode(display=False) as counter:
        outputs = apply(x, weights, biases, downs, ups)
    tokens, ranks = 14, 3 + 4 + 5
    forward = 2 * tokens * (3 * 24 * 16 + 24 * ranks + 16 * ranks)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        sum(output.sum() for output in outputs).backward()
    assert counter.get_total_flops() == forward + 2 * tokens * (24 * ranks + 16 * ranks)


@pytest.mark.parametrize("alpha", [8, 5.0])
def test_equals_pefts_layer(alpha):
    _, adapter = small(torch.float32, alpha=alpha)
    layer = adapter.layers["transformer_blocks.0.attn.to_q"]
    x = drawn(2, 5, 128, seed=1, dtype=torch.float32)
    results = []
    for forward in (LoraLinear.forward, PeftLinear.forward):
        given = x.clone().requires_grad_()
        output = forward(layer, given)
        output.square().sum().backward()
        results.append([output.detach(), given.grad, *(p.grad.clone() for p in parts(layer))])
        for parameter in parts(layer):
            parameter.grad = None
    assert max(error(mine, theirs.double()) for mine, theirs in zip(*results, strict=True)) < 1e-6


def parts(layer: LoraLinear) -> list[nn.Parameter]:
    return [layer.lora_A["default"].weight, layer.lora_B["default"].weight]


def small(dtype: torch.dtype, config: dict = SMALL, rank: int = 8, alpha: float = 8) -> tuple[Denoiser, Adapter]:
    """A transformer with random weights and a LoRA that does something."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        dit = build_dit(config)
    for module in dit.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            value = drawn / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 1 + 0.1 * drawn
            setattr(module, name, nn.Parameter(value.to(torch.bfloat16).to(dtype), requires_grad=False))
    denoiser = Denoiser(dit, True)
    adapter = attach_lora(denoiser, rank, alpha, DEFAULT_TARGETS)
    for name, parameter in adapter.named_parameters().items():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=generator)
    return denoiser, adapter


def condition_of(config: dict, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    batch, longest = len(lengths), max(lengths)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    text = drawn(batch, longest, config["joint_attention_dim"], seed=3)
    condition = Condition(text, mask, [drawn(batch, 16, 8, 4, seed=4)])
    return drawn(batch, 16, 4, 8, seed=5), torch.linspace(0.3, 0.9, batch), condition


def gradients(denoiser: Denoiser, adapter: Adapter, config: dict, lengths: list[int]):
    latents, sigma, condition = condition_of(config, lengths)
    velocity = denoiser(latents.float(), sigma, condition.to(dtype=torch.float32))
    velocity.square().mean().backward()
    found = {name: p.grad.double() for name, p in adapter.named_parameters().items()}
    for parameter in adapter.parameters():
        parameter.grad = None
    return velocity.detach(), found


def expected_gradients(denoiser: Denoiser, adapter: Adapter, config: dict, lengths: list[int]):
    """diffusers' transformer and PEFT's layers in float64."""
    names = {k: v for k, v in config.items() if k != "joint_attention_dim"}
    model = QwenImageTransformer2DModel(**names, joint_attention_dim=config["joint_attention_dim"]).double()
    frozen = {name.replace(".base_layer", ""): value.double() for name, value in denoiser.dit.state_dict().items()}
    model.load_state_dict({name: value for name, value in frozen.items() if ".lora_" not in name})
    model.requires_grad_(False)
    scale = next(iter(adapter.layers.values())).scaling["default"]
    rank = adapter.config.r
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank * scale, target_modules=list(adapter.layers)), model)
    trained = dict(model.named_parameters())
    named = {
        name: trained[name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")]
        for name in adapter.named_parameters()
    }
    for name, parameter in adapter.named_parameters().items():
        named[name].data = parameter.detach().double()
    latents, sigma, condition = condition_of(config, lengths)
    grids = [latents, *condition.edit_latents]
    output = model(
        hidden_states=torch.cat([patchify(g) for g in grids], dim=1),
        encoder_hidden_states=condition.prompt_emb,
        encoder_hidden_states_mask=None if condition.prompt_emb_mask.all() else condition.prompt_emb_mask,
        timestep=sigma.double(),
        img_shapes=[[(1, g.shape[-2] // 2, g.shape[-1] // 2) for g in grids]] * len(latents),
        return_dict=False,
    )[0]
    velocity = unpatchify(output[:, : latents.shape[-2] * latents.shape[-1] // 4], *latents.shape[-2:])
    velocity.square().mean().backward()
    return velocity.detach(), {name: parameter.grad for name, parameter in named.items()}


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return max(error(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("lengths", [[9], [5, 9]])
def test_gradients_of_every_weight(lengths):
    """Against diffusers and PEFT in float64. float32 comes within rounding; bf16 within what bf16 weights and activations
    cost anyway: PEFT's float32 branch beside bf16 layers is no nearer than 1.5 times."""
    denoiser, adapter = small(torch.float32)
    velocity, expected = expected_gradients(denoiser, adapter, SMALL, lengths)
    assert len(expected) == 2 * len(adapter.layers)
    found, mine = gradients(denoiser, adapter, SMALL, lengths)
    assert error(found, velocity) < 1e-5
    assert worst(mine, expected) < 1e-4

    denoiser, adapter = small(torch.bfloat16)
    found, fast = gradients(denoiser, adapter, SMALL, lengths)
    adapter.copy_for_products(denoiser.dit.transformer_blocks, torch.bfloat16)
    adapter.refresh()
    _, copied = gradients(denoiser, adapter, SMALL, lengths)
    assert all(torch.equal(fast[name], copied[name]) for name in fast)
    for layer in adapter.layers.values():
        layer.__class__ = PeftLinear
    _, slow = gradients(denoiser, adapter, SMALL, lengths)
    mean = {
        name: sum(error(g[key], expected[key]) for key in expected) / len(expected)
        for name, g in (("fast", fast), ("slow", slow))
    }
    assert mean["fast"] < 1.5 * mean["slow"]


@pytest.mark.slow
def test_real_width():
    """A block of 3,072 channels: as above, with less room for float32 to differ than bf16 would need."""
    denoiser, adapter = small(torch.float32, REAL_WIDTH)
    velocity, expected = expected_gradients(denoiser, adapter, REAL_WIDTH, [7])
    found, mine = gradients(denoiser, adapter, REAL_WIDTH, [7])
    assert error(found, velocity) < 1e-5
    assert worst(mine, expected) < 1e-4
    denoiser.dit.to(torch.bfloat16)
    for parameter in adapter.parameters():
        parameter.data = parameter.data.float()
    found, mine = gradients(denoiser, adapter, REAL_WIDTH, [7])
    assert error(found, velocity) < 0.02
    assert sum(error(mine[key], expected[key]) for key in expected) / len(expected) < 0.04


def test_copies_are_what_is_multiplied_by():
    denoiser, adapter = small(torch.bfloat16)
    latents, sigma, condition = condition_of(SMALL, [9])
    condition = condition.to(dtype=torch.float32)
    before = denoiser(latents.float(), sigma, condition)
    adapter.copy_for_products(denoiser.dit.transformer_blocks, torch.bfloat16)
    assert torch.equal(denoiser(latents.float(), sigma, condition), before)
    for parameter in adapter.parameters():
        parameter.data.mul_(2)
    assert torch.equal(denoiser(latents.float(), sigma, condition), before)
    adapter.refresh()
    changed = denoiser(latents.float(), sigma, condition)
    assert not torch.equal(changed, before)
    for layer in adapter.layers.values():
        layer.copies = None
    assert torch.equal(denoiser(latents.float(), sigma, condition), changed)


class Quantised(nn.Linear):
    pass


def test_layers_that_must_be_called_are_called():
    """Such as quantised ones."""
    _, adapter = small(torch.float32)
    layers = [adapter.layers[f"transformer_blocks.0.attn.{name}"] for name in ("to_q", "to_k", "to_v")]
    x = drawn(1, 3, 128, seed=1, dtype=torch.float32)
    expected = linear(x, *layers)
    called = []
    layers[1].base_layer.__class__ = Quantised
    layers[1].base_layer.register_forward_hook(lambda *_: called.append(1))
    for mine, theirs in zip(linear(x, *layers), expected, strict=True):
        assert error(mine, theirs.double()) < 1e-6
    assert called == [1]


def test_layers_without_lora_beside_those_with(monkeypatch):
    """Each by itself, through the one operation."""
    denoiser, _ = small(torch.float32)
    attn = denoiser.dit.transformer_blocks[0].attn
    x = drawn(1, 3, 128, seed=1, dtype=torch.float32)
    monkeypatch.setattr("train.model.layers.lora._beside", None)
    with_lora, without, _ = linear(x, attn.to_q, attn.to_k.base_layer, attn.to_v)
    assert torch.equal(without, attn.to_k.base_layer(x))
    assert torch.equal(with_lora, linear(x, attn.to_q)[0])


def test_dora_is_pefts(monkeypatch):
    with torch.device("meta"):
        dit = build_dit(SMALL)
    adapter = attach_lora(Denoiser(dit.to_empty(device="cpu"), True), 4, 4, ["to_q"], dora=True)
    called = []
    monkeypatch.setattr(PeftLinear, "forward", lambda self, x: called.append(self))
    layer = adapter.layers["transformer_blocks.0.attn.to_q"]
    linear(torch.zeros(1, 1, 128), layer)
    assert called == [layer]
