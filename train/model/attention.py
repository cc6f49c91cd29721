"""Joint attention over image and text tokens: one place that chooses the kernel, for texts of one length or of several."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from data_prep.errors import InputError

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Softmax attention of query, key and value, each (B, S, heads, head_dim), to (B, S of the query, heads, head_dim)."""

FLASH3_HUB = "kernels-community/flash-attn3"


def torch_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's, which takes the fastest kernel that it has for the device."""
    q, k, v = (each.transpose(1, 2) for each in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def find_attention(name: Literal["auto", "flash3"], device: torch.device, dtype: torch.dtype) -> tuple[Kernel, str]:
    """The kernel to use, and its name.

    Args:
        name: `auto` for PyTorch's choice, `flash3` for FlashAttention-3 (Shah et al., arXiv 2407.08608) from the package
            `flash-attn` (its Hopper build), or through the package `kernels` from the hub.

    Raises:
        InputError: FlashAttention-3 is not installed, or cannot run on this device.
    """
    if name == "flash3":
        return _flash3(device), "FlashAttention-3"
    query = torch.empty(1, 8, 256, 128, device=device, dtype=dtype, requires_grad=True)
    choice = SDPBackend(torch._fused_sdp_choice(query, query, query))  # pyright: ignore[reportPrivateImportUsage]
    return torch_attention, f"{choice.name.removesuffix('_ATTENTION').lower()} (PyTorch's choice on {device.type})"


def _flash3(device: torch.device) -> Kernel:
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        raise InputError("train.attention=flash3 needs a Hopper GPU (H100, H200): use train.attention=auto")
    try:
        from flash_attn_interface import flash_attn_func  # pyright: ignore[reportMissingImports]
    except ImportError:
        try:
            from kernels import get_kernel  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise InputError(
                "train.attention=flash3 needs FlashAttention-3: install flash-attn's Hopper build, or `uv pip install kernels`"
            ) from error
        flash_attn_func = get_kernel(FLASH3_HUB).flash_attn_func

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = flash_attn_func(query, key, value)
        return output[0] if isinstance(output, tuple) else output

    return attention


def attend(kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int] | None) -> Tensor:
    """Each sample's tokens attend to each other.

    Samples whose texts are shorter are padded at their ends. Then each sample is attended by itself and without a mask:
    kernels that take a mask are slower than the samples one after another.

    Args:
        kernel: computes it.
        query, key, value: (B, S, heads, head_dim); the query may end before the keys do.
        lengths: how many tokens each sample has, or None where all have S.

    Returns:
        (B, S of the query, heads, head_dim), zero where a sample has no token.
    """
    if lengths is None:
        return kernel(query, key, value)
    samples = []
    for sample, length in enumerate(lengths):
        q, k, v = (each[sample : sample + 1, :length] for each in (query, key, value))
        samples.append(F.pad(kernel(q, k, v), (0, 0, 0, 0, 0, query.shape[1] - q.shape[1])))
    return torch.cat(samples)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotary position embedding (Su et al., arXiv 2104.09864) of neighbouring pairs of channels, with real numbers.

    Args:
        x: (B, S, heads, head_dim).
        rope: from `rope_table`, its first S tokens are used.
    """
    cosine, sine = rope[: x.shape[1], None].unbind(-2)
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (x * cosine + swapped * sine).to(x.dtype)


def rope_table(factors: Tensor) -> Tensor:
    """Complex rotary factors (S, head_dim / 2) -> what `rotate` multiplies by, (S, 2, head_dim), float32.

    (a + ib)(c + is) = (ac - bs) + i(bc + as): every channel times c, and its neighbour times -s or s.
    """
    cosine = factors.real.repeat_interleave(2, dim=-1)
    sine = torch.stack([-factors.imag, factors.imag], dim=-1).flatten(-2)
    return torch.stack([cosine, sine], dim=-2).float()
