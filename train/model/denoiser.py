"""The one place where the diffusion transformer is run: `velocity = denoiser(latents, sigma, condition)`.

The modules are DiffSynth's; the forward pass is ours, because upstream's takes one sample at a time, attends to padded
text, rounds the timestep to bf16 and evaluates the feed-forward with another GELU than the weights were trained with.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffsynth.models.general_modules import AdaLayerNorm, RMSNorm, TimestepEmbeddings
from diffsynth.models.qwen_image_dit import (
    ApproximateGELU,
    QwenDoubleStreamAttention,
    QwenEmbedRope,
    QwenImageDiT,
    QwenImageTransformerBlock,
    apply_rotary_emb_qwen,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data_prep.errors import InputError
from data_prep.model.directory import ModelDirectory
from losses.batch import Condition
from losses.patches import PATCH, patchify, unpatchify

TIMESTEPS = 1000  # the transformer is embedded with timestep = 1000 * sigma
ROPE_THETA = 10_000


class TanhGELU(ApproximateGELU):
    """The official feed-forward activation, tanh-approximated GELU; upstream computes x * sigmoid(1.702 x) instead."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


def build_dit(config: dict) -> QwenImageDiT:
    """DiffSynth's transformer at the sizes of `transformer/config.json`, uninitialised by us.

    Build it under `torch.device("meta")` to load weights afterwards; the rotary tables are plain CPU tensors even then.
    """
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    width, text_width = heads * head_dim, config["joint_attention_dim"]
    if config.get("patch_size", PATCH) != PATCH:
        raise InputError(f"transformer/config.json has patch_size {config['patch_size']}; Qwen-Image uses {PATCH}")
    dit = QwenImageDiT(num_layers=0)  # upstream's sizes are literals: keep the class, replace every sized module
    with torch.device("cpu"):
        dit.pos_embed = QwenEmbedRope(ROPE_THETA, list(config["axes_dims_rope"]), scale_rope=True)
    dit.time_text_embed = TimestepEmbeddings(256, width, diffusers_compatible_format=True, scale=TIMESTEPS)
    dit.txt_norm = RMSNorm(text_width, eps=1e-6)
    dit.img_in = nn.Linear(config["in_channels"], width)
    dit.txt_in = nn.Linear(text_width, width)
    dit.transformer_blocks = nn.ModuleList(
        QwenImageTransformerBlock(width, heads, head_dim) for _ in range(config["num_layers"])
    )
    dit.norm_out = AdaLayerNorm(width, single=True)
    dit.proj_out = nn.Linear(width, PATCH * PATCH * config["out_channels"])
    for module in dit.modules():
        if isinstance(module, ApproximateGELU):
            module.__class__ = TanhGELU
    return dit


class Denoiser(nn.Module):
    """Predicts the velocity d x / d sigma = start - target.

    Args:
        dit: the transformer, with or without LoRA layers injected.
        zero_cond_t: modulate the reference tokens as if sigma were 0 (Qwen-Image-Edit-2511: on, 2509: off).
        gradient_checkpointing: recompute each block in the backward pass instead of keeping its activations.
    """

    def __init__(self, dit: QwenImageDiT, zero_cond_t: bool, gradient_checkpointing: bool = False):
        super().__init__()
        self.dit = dit
        self.zero_cond_t = zero_cond_t
        self.gradient_checkpointing = gradient_checkpointing

    def forward(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Runs the transformer on a batch of one bucket.

        Args:
            latents: the point on the path, (B, 16, h, w), h and w even.
            sigma: position on the path in [0, 1], 1 = start, (B,); float32 until it is embedded.
            condition: prompt embeddings with their mask, and the reference latents.

        Returns:
            The velocity, (B, 16, h, w), float32.
        """
        dit = self.dit
        dtype = dit.img_in.weight.dtype
        grids = [latents, *condition.edit_latents]
        image = dit.img_in(torch.cat([patchify(grid.to(dtype)) for grid in grids], dim=1))
        text = dit.txt_in(dit.txt_norm(condition.prompt_emb.to(dtype)))
        num_output = latents.shape[-2] * latents.shape[-1] // PATCH**2

        sigma = sigma.to(image.device, torch.float32)
        sigmas = torch.cat([sigma, torch.zeros_like(sigma)]) if self.zero_cond_t else sigma
        embedded = dit.time_text_embed(sigmas, dtype)
        num_text = text.shape[1]
        image_rope, text_rope = dit.pos_embed(
            [(1, grid.shape[-2] // PATCH, grid.shape[-1] // PATCH) for grid in grids], [num_text], image.device
        )
        rope = torch.cat([text_rope.to(image.device), image_rope.to(image.device)])  # upstream's cache does not move
        mask = joint_attention_mask(condition.prompt_emb_mask, image.shape[1])

        last = len(dit.transformer_blocks) - 1
        for i, block in enumerate(dit.transformer_blocks):
            text, image = self._run(run_block, block, text, image, embedded, rope, mask, num_output, i == last)
        image = dit.norm_out(image[:, :num_output], embedded[: len(sigma)])
        return unpatchify(dit.proj_out(image), *latents.shape[-2:]).float()

    def _run(self, function, *args) -> tuple[Tensor, Tensor]:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
        return function(*args)


def run_block(
    block: QwenImageTransformerBlock,
    text: Tensor,
    image: Tensor,
    embedded: Tensor,
    rope: Tensor,
    mask: Tensor | None,
    num_output: int,
    last: bool,
) -> tuple[Tensor, Tensor]:
    """One dual-stream block.

    Args:
        text, image: (B, L, D) and (B, N, D); the first `num_output` image tokens are the output, the rest references.
        embedded: timestep embedding, (B, D), or (2B, D) when the references have their own (`zero_cond_t`).
        rope: complex rotary factors of text then image, (L + N, head_dim / 2).
        mask: True where a key may be attended, (B, 1, 1, L + N), or None for everywhere.
        last: nothing reads the text after the last block, so only its keys and values are computed.
    """
    batch, num_text = text.shape[:2]
    attn_mod, mlp_mod = block.img_mod(embedded).chunk(2, dim=-1)
    text_attn_mod, text_mlp_mod = block.txt_mod(embedded[:batch]).chunk(2, dim=-1)
    image_in, gate = modulate(block.img_norm1(image), attn_mod, num_output)
    text_in, text_gate = modulate(block.txt_norm1(text), text_attn_mod, num_text)

    attn = block.attn
    query, key, value = attn.to_q(image_in), attn.to_k(image_in), attn.to_v(image_in)
    text_key, text_value = attn.add_k_proj(text_in), attn.add_v_proj(text_in)
    q, k = attn.norm_q(split_heads(query, attn)), attn.norm_k(split_heads(key, attn))
    k = torch.cat([attn.norm_added_k(split_heads(text_key, attn)), k], dim=2)
    v = torch.cat([split_heads(text_value, attn), split_heads(value, attn)], dim=2)
    if not last:
        q = torch.cat([attn.norm_added_q(split_heads(attn.add_q_proj(text_in), attn)), q], dim=2)
    q, k = apply_rotary_emb_qwen(q, rope[-q.shape[2] :]), apply_rotary_emb_qwen(k, rope)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

    image = image + gate * attn.to_out(attended[:, -image.shape[1] :])
    image_in, gate = modulate(block.img_norm2(image), mlp_mod, num_output)
    image = image + gate * block.img_mlp(image_in)
    if last:
        return text, image
    text = text + text_gate * attn.to_add_out(attended[:, :num_text])
    text_in, text_gate = modulate(block.txt_norm2(text), text_mlp_mod, num_text)
    return text + text_gate * block.txt_mlp(text_in), image


def modulate(x: Tensor, params: Tensor, num_output: int) -> tuple[Tensor, Tensor]:
    """Adaptive shift and scale of the normalised tokens (B, N, D), and the gate that broadcasts over them.

    With `params` (2B, 3D) instead of (B, 3D), the tokens from `num_output` on take the second half.
    """
    batch, tokens = x.shape[:2]
    if len(params) == batch:
        shift, scale, gate = params.unsqueeze(1).chunk(3, dim=-1)
    else:
        own, reference = (half.unsqueeze(1) for half in params.split(batch))
        counts = (num_output, tokens - num_output)
        per_token = torch.cat([half.expand(-1, n, -1) for half, n in zip((own, reference), counts, strict=True)], dim=1)
        shift, scale, gate = per_token.chunk(3, dim=-1)
    return x * (1 + scale) + shift, gate


def split_heads(x: Tensor, attn: QwenDoubleStreamAttention) -> Tensor:
    """(B, N, heads * head_dim) -> (B, heads, N, head_dim)."""
    return x.unflatten(-1, (attn.num_heads, attn.head_dim)).transpose(1, 2)


def joint_attention_mask(prompt_emb_mask: Tensor, num_image: int) -> Tensor | None:
    """True where a key may be attended, (B, 1, 1, L + num_image); None, which allows flash attention, without padding."""
    if bool(prompt_emb_mask.all()):
        return None
    return F.pad(prompt_emb_mask, (0, num_image), value=True)[:, None, None, :]


def resolve_zero_cond_t(configured: bool | None, directory: ModelDirectory) -> bool:
    """The model directory's `zero_cond_t`, which the configuration may repeat but not contradict.

    Raises:
        InputError: the two differ.
    """
    stored = bool(directory.config("transformer").get("zero_cond_t", False))
    if configured is not None and configured != stored:
        raise InputError(
            f"model.zero_cond_t={str(configured).lower()} contradicts {directory.path}/transformer/config.json, "
            f"which says {str(stored).lower()} (2511 has it on, 2509 off): remove the key or choose the other model"
        )
    return stored


def load_denoiser(
    directory: ModelDirectory,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    zero_cond_t: bool | None = None,
    gradient_checkpointing: bool = False,
    place: Callable[[nn.Parameter], None] | None = None,
    read: bool = True,
) -> Denoiser:
    """Reads `transformer/` of a model directory, frozen and in evaluation mode, one tensor at a time.

    Args:
        place, read: as in `ModelDirectory.load_into`.

    Raises:
        InputError: weights are missing or unexpected, or `zero_cond_t` contradicts the model.
    """
    zero_cond_t = resolve_zero_cond_t(zero_cond_t, directory)
    with torch.device("meta"):
        dit = build_dit(directory.config("transformer"))
    directory.load_into(dit, "transformer", torch.device(device), dtype, place=place, read=read)
    dit.requires_grad_(False).eval()
    return Denoiser(dit, zero_cond_t, gradient_checkpointing)
