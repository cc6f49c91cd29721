"""The one place where the diffusion transformer is run: `velocity = denoiser(latents, sigma, condition)`.

The modules are DiffSynth's; the forward pass is ours, because upstream's takes one sample at a time, attends to padded
text, rounds the timestep to bf16 and evaluates the feed-forward with another GELU than the weights were trained with.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from diffsynth.models.general_modules import AdaLayerNorm, RMSNorm, TimestepEmbeddings
from diffsynth.models.qwen_image_dit import QwenEmbedRope, QwenImageDiT
from torch import Tensor, nn

from data_prep.errors import InputError
from data_prep.model.directory import ModelDirectory
from losses.batch import Condition
from losses.patches import PATCH, patchify, unpatchify
from train.model.adapter_reader import fused, linear_modules
from train.model.attention import rope_table
from train.model.block import Block
from train.model.execution import Execution
from train.model.extra.whole import mark_trained
from train.model.layers.lokr import LokrLinear
from train.model.layers.lora import LoraLinear
from train.model.offload import Offload
from train.model.quantize import Weights, check_weights, quantize_blocks

TIMESTEPS = 1000  # the transformer is embedded with timestep = 1000 * sigma
ROPE_THETA = 10_000


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
    count = config["num_layers"]
    dit.transformer_blocks = nn.ModuleList(Block(width, heads, head_dim, i == count - 1) for i in range(count))
    dit.norm_out = AdaLayerNorm(width, single=True)
    dit.proj_out = nn.Linear(width, PATCH * PATCH * config["out_channels"])
    return dit


class Denoiser(nn.Module):
    """Predicts the velocity d x / d sigma = start - target.

    Args:
        dit: the transformer, with or without LoRA layers injected.
        zero_cond_t: modulate the reference tokens as if sigma were 0 (Qwen-Image-Edit-2511: on, 2509: off).
        execution: how its blocks are executed; as they are, by default.
        offload: the offloading of some of its blocks, already started.

    Attributes:
        extra: modules that the output's tokens go through after `img_in` (`train.model.extra.ExtraModule`), in this order.
    """

    def __init__(
        self,
        dit: QwenImageDiT,
        zero_cond_t: bool,
        execution: Execution | None = None,
        offload: Offload | None = None,
    ):
        super().__init__()
        self.dit = dit
        self.zero_cond_t = zero_cond_t
        self.extra, self.extra_idle = nn.ModuleDict(), False
        (execution or Execution()).apply(dit.transformer_blocks)
        self.offload = offload
        if offload:
            offload.start()

    def weights_at_rest(self) -> AbstractContextManager[None]:
        """Inside, every weight can be read: those of offloaded blocks in CPU memory, where they wait."""
        return self.offload.at_rest() if self.offload else nullcontext()

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Inside, it is the base model, with the frozen adapters that are in its weights. For forward passes without gradient.

        Modules that are trained in full have no other weights, so that nothing may be asked of their base model.
        """
        layers = [module for module in self.dit.modules() if isinstance(module, LoraLinear | LokrLinear)]
        for layer in layers:
            layer.idle = True
        self.extra_idle = True
        try:
            yield
        finally:
            for layer in layers:
                layer.idle = False
            self.extra_idle = False

    def forward(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Runs the transformer on a batch of one bucket.

        Args:
            latents: the point on the path, (B, 16, h, w), h and w even.
            sigma: position on the path in [0, 1], 1 = start, (B,); float32 until it is embedded.
            condition: prompt embeddings with their mask, and the reference latents; its scene is for `extra`.

        Returns:
            The velocity, (B, 16, h, w), float32.
        """
        dit = self.dit
        dtype = dit.img_in.weight.dtype
        grids = [latents, *condition.edit_latents]
        output, *references = (patchify(grid.to(dtype)) for grid in grids)
        reference = torch.cat(references, dim=1) if references else output[:, :0]
        text = dit.txt_norm(condition.prompt_emb.to(dtype))
        tokens = dit.img_in(output), dit.img_in(reference), dit.txt_in(text)

        sigma = sigma.to(text.device, torch.float32)
        if self.extra and not self.extra_idle:
            assert condition.scene, "modules beside the transformer see the scene of every condition"
            scene = condition.scene.to(text.device, dtype)
            for module in self.extra.values():
                tokens = module(tokens[0], sigma, scene), *tokens[1:]
        sigmas = torch.cat([sigma, torch.zeros_like(sigma)]) if self.zero_cond_t else sigma
        embedded = dit.time_text_embed(sigmas, dtype)
        sizes = [(1, grid.shape[-2] // PATCH, grid.shape[-1] // PATCH) for grid in grids]
        factors = dit.pos_embed(sizes, [text.shape[1]], text.device)
        rope = rope_table(torch.cat([f.to(text.device) for f in factors]))  # upstream's cache of factors does not move
        lengths = joint_lengths(condition.prompt_emb_mask, output.shape[1] + reference.shape[1])
        for block in dit.transformer_blocks:
            tokens = block(*tokens, embedded, rope, lengths)
        output = dit.norm_out(tokens[0], embedded[: len(sigma)])
        return unpatchify(dit.proj_out(output), *latents.shape[-2:]).float()


def joint_lengths(prompt_emb_mask: Tensor, num_image: int) -> list[int] | None:
    """Each sample's number of image and text tokens; None if no text is padded."""
    lengths = prompt_emb_mask.sum(dim=1).tolist()
    if min(lengths) == prompt_emb_mask.shape[1]:
        return None
    return [num_image + length for length in lengths]


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
    execution: Execution | None = None,
    place: Callable[[nn.Module, str], None] | None = None,
    read: bool = True,
    weights: Weights = "bf16",
    offload_blocks: int = 0,
    frozen_adapters: Sequence[Path] = (),
    train_modules: Sequence[str] = (),
) -> Denoiser:
    """Reads `transformer/` of a model directory, frozen and in evaluation mode, one tensor at a time.

    Args:
        execution: as of `Denoiser`.
        place, read: as in `ModelDirectory.load_into`.
        weights: what the blocks' linear layers are rounded to, each as it is read.
        offload_blocks: so many blocks wait in CPU memory, as soon as they are read; not together with `place`.
        frozen_adapters: files of adapters that are added to the weights, in float32, before these are rounded.
        train_modules: suffixes of names of modules that will be trained in full: they are not rounded, and do not wait.

    Raises:
        InputError: weights are missing or unexpected, `zero_cond_t` contradicts the model, the package of `weights` is not
            installed, there are fewer blocks than `offload_blocks`, there is no CPU memory for them, or a file is no adapter of
            this transformer.
    """
    zero_cond_t = resolve_zero_cond_t(zero_cond_t, directory)
    check_weights(weights)
    with torch.device("meta"):
        dit = build_dit(directory.config("transformer"))
    mark_trained(dit, train_modules)
    quantize_blocks(dit, weights, dtype)
    dit.requires_grad_(False).eval()
    offload = Offload(dit.transformer_blocks, offload_blocks, device) if offload_blocks else None
    place = offload.place if offload else place
    change = fused(frozen_adapters, linear_modules(dit), device) if frozen_adapters else None
    directory.load_into(dit, "transformer", torch.device(device), dtype, place=place, read=read, change=change)
    return Denoiser(dit, zero_cond_t, execution, offload)
