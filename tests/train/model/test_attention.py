"""Attention against a mask in float64, rotary factors against upstream's complex ones, and how the kernel is chosen."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from diffsynth.models.qwen_image_dit import QwenEmbedRope, apply_rotary_emb_qwen

from data_prep.errors import InputError
from train.model.attention import attend, find_attention, rope_table, rotate, torch_attention

CPU = torch.device("cpu")


def drawn(*shape: int, seed: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("queries", [11, 6])
def test_each_sample_by_itself_equals_a_mask(queries):
    """Also the gradients, and none reaches padding. 1e-6: float32 sums of 11."""
    lengths = [11, 7, 9]
    q, k, v = (drawn(3, n, 2, 8, seed=i).requires_grad_() for i, n in enumerate((queries, 11, 11)))
    output = attend(torch_attention, q, k, v, lengths)
    weight = drawn(*output.shape, seed=4)
    (output * weight).sum().backward()

    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    mask = torch.arange(11) < torch.tensor(lengths)[:, None]
    heads_first = [t.transpose(1, 2) for t in exact]
    expected = F.scaled_dot_product_attention(*heads_first, attn_mask=mask[:, None, None, :]).transpose(1, 2)
    expected = expected * mask[:, :queries, None, None]
    (expected * weight.double()).sum().backward()
    assert torch.allclose(output.double(), expected, atol=1e-6)
    for mine, theirs in zip((q, k, v), exact, strict=True):
        assert torch.allclose(mine.grad.double(), theirs.grad, atol=1e-5)
    assert not k.grad[1, 7:].any()
    assert not v.grad[1, 7:].any()


def test_one_length_needs_no_pieces():
    q, k, v = (drawn(2, 5, 2, 8, seed=i) for i in range(3))
    assert torch.equal(attend(torch_attention, q, k, v, None), torch_attention(q, k, v))
    assert torch.allclose(attend(torch_attention, q, k, v, [5, 5]), torch_attention(q, k, v), atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0)])
def test_real_rotary_factors_equal_complex_ones(dtype, tolerance):
    """Both compute in float32 and round once."""
    image, text = QwenEmbedRope(10_000, [8, 12, 12], scale_rope=True)([(1, 3, 4), (1, 2, 2)], [5], CPU)
    factors = torch.cat([image, text])
    x = drawn(2, len(factors), 3, 32, seed=0, dtype=dtype)
    expected = apply_rotary_emb_qwen(x.transpose(1, 2), factors).transpose(1, 2)
    actual = rotate(x, rope_table(factors))
    assert actual.dtype == dtype
    difference = (actual.float() - expected.float()).abs().max()
    assert difference <= tolerance * expected.float().abs().max() if tolerance else difference <= 2**-7 * 4
    assert torch.equal(rotate(x[:, :4], rope_table(factors)), actual[:, :4])


def test_says_what_runs():
    kernel, name = find_attention("auto", CPU, torch.float32)
    assert kernel is torch_attention
    assert name == "flash (PyTorch's choice on cpu)"


def test_flash3_needs_hopper_and_a_package(monkeypatch):
    with pytest.raises(InputError, match="needs a Hopper GPU"):
        find_attention("flash3", CPU, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    monkeypatch.setitem(sys.modules, "kernels", None)
    with pytest.raises(InputError, match="install flash-attn's Hopper build"):
        find_attention("flash3", torch.device("cuda"), torch.bfloat16)


@pytest.mark.parametrize("as_tuple", [True, False])
@pytest.mark.parametrize("package", ["flash_attn_interface", "kernels"])
def test_flash3_is_called_with_its_layout(monkeypatch, package, as_tuple):
    """Either package's function takes (B, S, heads, head_dim); some versions return the softmax's sums too."""

    def flash_attn_func(q, k, v):
        output = torch_attention(q, k, v)
        return (output, None) if as_tuple else output

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    interface = types.SimpleNamespace(flash_attn_func=flash_attn_func)
    kernels = types.SimpleNamespace(get_kernel=lambda name: interface)
    for name, module in {"flash_attn_interface": interface, "kernels": kernels}.items():
        monkeypatch.setitem(sys.modules, name, module if name == package else None)
    kernel, name = find_attention("flash3", torch.device("cuda"), torch.bfloat16)
    assert name == "FlashAttention-3"
    q, k, v = (drawn(1, 5, 2, 8, seed=i) for i in range(3))
    assert torch.equal(kernel(q, k, v), torch_attention(q, k, v))
