"""One dual-stream block: DiffSynth's modules, and our forward pass for a batch."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffsynth.models.qwen_image_dit import QwenDoubleStreamAttention, QwenImageTransformerBlock
from torch import Tensor, nn

from train.model.attention import Kernel, attend, rotate
from train.model.layers.lora import linear

UNUSED_IN_LAST_BLOCK = ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
"""Linear layers whose output nothing reads there."""


class Modulation(NamedTuple):
    """Adaptive shift, scale and gate of the attention and of the feed-forward part, each (B, 1, D)."""

    attn_shift: Tensor
    attn_scale: Tensor
    attn_gate: Tensor
    mlp_shift: Tensor
    mlp_scale: Tensor
    mlp_gate: Tensor

    @classmethod
    def of(cls, params: Tensor) -> "Modulation":
        """From (B, 6 D)."""
        return cls(*params.unsqueeze(1).chunk(6, dim=-1))


class Block(QwenImageTransformerBlock):
    """DiffSynth's block with a forward pass for a batch.

    Attributes:
        last: nothing reads text and references after it, so only their keys and values are computed.
        attention: the kernel of its attention.
        run: computes it, as `Execution` says. Hooks on the block stay outside.
    """

    attention: Kernel
    run: Callable[..., tuple[Tensor, Tensor, Tensor]]

    def __init__(self, width: int, num_heads: int, head_dim: int, last: bool = False):
        super().__init__(width, num_heads, head_dim)
        self.last = last

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        output: Tensor,
        reference: Tensor,
        text: Tensor,
        embedded: Tensor,
        rope: Tensor,
        lengths: Sequence[int] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens after the block.

        Args:
            output: tokens of the picture to be, (B, N, D).
            reference: tokens of the references, (B, M, D); M may be 0.
            text: (B, L, D), padded at its end.
            embedded: timestep embedding, (B, D), or (2B, D) when the references have their own (`zero_cond_t`).
            rope: rotary embedding of output, references and text, in this order, from `rope_table`.
            lengths: N + M + the length of each sample's text; None if every text has L tokens.

        Returns:
            output, reference and text.
        """
        return self.run(self, output, reference, text, embedded, rope, lengths)

    @property
    def inputs(self) -> list[tuple[nn.Module, ...]]:
        """The linear layers that read the same input, together."""
        attn = self.attn
        if self.last:
            return [(attn.to_k, attn.to_v), (attn.add_k_proj, attn.add_v_proj)]
        return [(attn.to_q, attn.to_k, attn.to_v), (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]


def modulations(block: Block, embedded: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """What modulates output, references and text, each (B, 6 D)."""
    image = block.img_mod(embedded)
    return image[:batch], image[-batch:], block.txt_mod(embedded[:batch])


def transform(
    block: Block,
    modulation: tuple[Tensor, Tensor, Tensor],
    output: Tensor,
    reference: Tensor,
    text: Tensor,
    rope: Tensor,
    lengths: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A block's forward pass: of `Block.forward`, with `modulation` from `modulations` in place of the embedding."""
    attn = block.attn
    own, others, texts = (Modulation.of(params) for params in modulation)
    sizes = [output.shape[1], reference.shape[1]]

    image_in = torch.cat(
        [
            shifted(block.img_norm1(output), own.attn_shift, own.attn_scale),
            shifted(block.img_norm1(reference), others.attn_shift, others.attn_scale),
        ],
        dim=1,
    )
    text_in = shifted(block.txt_norm1(text), texts.attn_shift, texts.attn_scale)
    if block.last:
        (query,) = linear(image_in[:, : sizes[0]], attn.to_q)
        key, value = linear(image_in, attn.to_k, attn.to_v)
        text_key, text_value = linear(text_in, attn.add_k_proj, attn.add_v_proj)
        q = normalised(query, attn.norm_q, attn)
    else:
        query, key, value = linear(image_in, attn.to_q, attn.to_k, attn.to_v)
        text_query, text_key, text_value = linear(text_in, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        q = torch.cat([normalised(query, attn.norm_q, attn), normalised(text_query, attn.norm_added_q, attn)], dim=1)
    k = torch.cat([normalised(key, attn.norm_k, attn), normalised(text_key, attn.norm_added_k, attn)], dim=1)
    v = torch.cat([split_heads(value, attn), split_heads(text_value, attn)], dim=1)
    attended = attend(block.attention, rotate(q, rope), rotate(k, rope), v, lengths).flatten(2)

    if block.last:
        (output_add,) = linear(attended, attn.to_out[0])
        output = torch.addcmul(output, own.attn_gate, output_add)
        hidden = feed_forward(shifted(block.img_norm2(output), own.mlp_shift, own.mlp_scale), block.img_mlp)
        return torch.addcmul(output, own.mlp_gate, hidden), reference, text

    attended_image, attended_text = attended.split([sum(sizes), text.shape[1]], dim=1)
    output_add, reference_add = linear(attended_image, attn.to_out[0])[0].split(sizes, dim=1)
    output = torch.addcmul(output, own.attn_gate, output_add)
    reference = torch.addcmul(reference, others.attn_gate, reference_add)
    text = torch.addcmul(text, texts.attn_gate, linear(attended_text, attn.to_add_out)[0])

    image_in = torch.cat(
        [
            shifted(block.img_norm2(output), own.mlp_shift, own.mlp_scale),
            shifted(block.img_norm2(reference), others.mlp_shift, others.mlp_scale),
        ],
        dim=1,
    )
    text_in = shifted(block.txt_norm2(text), texts.mlp_shift, texts.mlp_scale)
    output_add, reference_add = feed_forward(image_in, block.img_mlp).split(sizes, dim=1)
    return (
        torch.addcmul(output, own.mlp_gate, output_add),
        torch.addcmul(reference, others.mlp_gate, reference_add),
        torch.addcmul(text, texts.mlp_gate, feed_forward(text_in, block.txt_mlp)),
    )


def shifted(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm: x (1 + scale) + shift."""
    return torch.addcmul(shift, x, 1 + scale)


def feed_forward(x: Tensor, mlp: Any) -> Tensor:
    """Two layers with the official tanh-approximated GELU between them; upstream computes x * sigmoid(1.702 x) instead."""
    (hidden,) = linear(x, mlp.net[0].proj)
    return linear(F.gelu(hidden, approximate="tanh"), mlp.net[2])[0]


def split_heads(x: Tensor, attn: QwenDoubleStreamAttention) -> Tensor:
    """(B, N, heads * head_dim) -> (B, N, heads, head_dim)."""
    return x.unflatten(-1, (attn.num_heads, attn.head_dim))


def normalised(x: Tensor, norm: Any, attn: QwenDoubleStreamAttention) -> Tensor:
    """Heads with a root mean square of 1, times a learned weight (Zhang & Sennrich, arXiv 1910.07467)."""
    return F.rms_norm(split_heads(x, attn), (attn.head_dim,), norm.weight, norm.eps)
