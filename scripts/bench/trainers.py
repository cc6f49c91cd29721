"""One training step, ours and DiffSynth's: the same frozen tensors, the same LoRA, the same data."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from diffsynth.diffusion.flow_match import FlowMatchScheduler
from diffsynth.diffusion.loss import FlowMatchSFTLoss
from diffsynth.models.qwen_image_dit import QwenImageDiT, QwenImageTransformerBlock
from diffsynth.pipelines.qwen_image import model_fn_qwen_image
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from data_prep.model.encoders import LATENT_CHANNELS
from data_prep.model.geometry import LATENT_CELL
from losses.batch import Batch, Condition
from losses.flow_matching import FlowMatchingLoss
from losses.randomness import SampleRandom
from losses.terms import LossTerms
from train.loop import Stopwatch, check_finite
from train.model.adapter import Adapter
from train.model.denoiser import Denoiser, build_dit
from train.model.execution import Execution
from train.optim import AdamW, Optimizer
from train.parallel.processes import Processes
from train.parallel.strategies import Replicas

DTYPE = torch.bfloat16
Seconds = dict[str, float]
"""Seconds of a step: data, forward, backward, optimizer, and `step`, all together."""


def make_batch(lengths: Sequence[int], side: int, text_width: int) -> Batch:
    """Random records with one reference of the target's size.

    Args:
        lengths: lengths of the texts, one for each record.
        side: side of the pictures, in pixels.
    """
    generator = torch.Generator().manual_seed(1)
    latents = (len(lengths), LATENT_CHANNELS, side // LATENT_CELL, side // LATENT_CELL)
    source, white, target, reference = (torch.randn(latents, generator=generator) for _ in range(4))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    text = torch.randn(*mask.shape, text_width, generator=generator)
    ids = [str(number) for number in range(len(lengths))]
    return Batch(source, white, Condition(text, mask, [reference]), None, ids, target, None)


class Ours:
    """The training loop's step on one process, with AdamW."""

    def __init__(self, denoiser: Denoiser, adapter: Adapter, processes: Processes):
        self.adapter, self.blocks, self.device = adapter, denoiser.dit.transformer_blocks, processes.device
        generator = torch.Generator().manual_seed(3)
        for name, weight in adapter.named_parameters().items():
            if "lora_B" in name:  # as if it had been trained, so that every product has numbers to multiply
                weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.002)
        self.parameters = adapter.parameters()
        self.parallel = Replicas(denoiser, adapter, processes)
        self.loss, self.optimizer = FlowMatchingLoss(), AdamW(self.parameters)

    def execute(self, execution: Execution) -> list[Any]:
        """The ways in which the blocks are run, for `switch`: made once, they keep what they compiled."""
        execution.apply(self.blocks)
        return [block.run for block in self.blocks]

    def switch(self, runs: list[Any]) -> None:
        """From now on the blocks are run so. As in a run, what stays float32 is multiplied as TF32."""
        torch.backends.cuda.matmul.allow_tf32 = True
        for block, run in zip(self.blocks, runs, strict=True):
            block.run = run

    def step(self, batch: Batch, number: int) -> Seconds:
        """As of `train.loop.train`."""
        watch = Stopwatch()
        with watch.part("data"):
            batch = batch.to(self.device)
        with watch.part("forward"):
            numbers = [number * len(batch.ids) + index for index in range(len(batch.ids))]
            terms = self.loss(self.parallel.denoiser, batch, SampleRandom(0, numbers))
        with watch.part("backward"):
            self.parallel.backward(terms.loss.mean(), last=True)
        self.update(self.optimizer, watch, number, [terms])
        return watch.read()

    def update(self, optimizer: Optimizer, watch: Stopwatch, number: int, collected: list[LossTerms]) -> None:
        """What a step does with the gradients."""
        with watch.part("optimizer"):
            norm = optimizer.clip_gradients()
            check_finite(collected, norm, number, [[str(number)]] * len(collected))
            self.parallel.step(optimizer, number)

    @property
    def held(self) -> int:
        """Bytes of what the other does not share."""
        copies = DTYPE.itemsize * sum(parameter.numel() for parameter in self.parameters)
        return _held(self.parameters, self.optimizer.torch_optimizer) + copies


class Theirs:
    """DiffSynth's loss, model function and transformer, with PEFT's LoRA in bfloat16 and torch's AdamW.

    Args:
        dit: from `share`.
        adapter: whose weights its LoRA gets.
    """

    def __init__(self, dit: QwenImageDiT, adapter: Adapter, zero_cond_t: bool, device: torch.device):
        self.zero_cond_t, self.device = zero_cond_t, device
        rank, names = adapter.config.r, list(adapter.layers)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), dit)
        self.parameters: list[nn.Parameter] = []
        for name, weight in adapter.named_parameters().items():
            module, kind = name.removesuffix(".weight").rsplit(".", 1)
            layer: Any = dit.get_submodule(module)
            parameter = getattr(layer, kind)["default"].weight
            parameter.data = weight.detach().to(DTYPE)
            parameter.requires_grad_(True)
            self.parameters.append(parameter)
        scheduler = FlowMatchScheduler("Qwen-Image")
        scheduler.set_timesteps(1000, training=True)
        self.pipe: Any = SimpleNamespace(dit=dit.train(), scheduler=scheduler, torch_dtype=DTYPE, device=device)
        self.pipe.in_iteration_models, self.pipe.model_fn = ("dit",), model_fn_qwen_image
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)

    def step(self, batch: Batch, number: int) -> Seconds:
        """As its trainer's, on a batch of one: it takes no more."""
        torch.backends.cuda.matmul.allow_tf32 = False
        watch = Stopwatch()
        with watch.part("data"):
            condition = batch.condition.to(self.device)
            inputs = {
                "input_latents": batch.target_latents.to(self.device, DTYPE),
                "prompt_emb": condition.prompt_emb.to(DTYPE),
                "prompt_emb_mask": condition.prompt_emb_mask.long(),
                "edit_latents": [latents.to(DTYPE) for latents in condition.edit_latents],
                "height": batch.target_latents.shape[-2] * LATENT_CELL,
                "width": batch.target_latents.shape[-1] * LATENT_CELL,
            }
        with watch.part("forward"):
            loss = FlowMatchSFTLoss(self.pipe, **inputs, zero_cond_t=self.zero_cond_t, use_gradient_checkpointing=True)
        with watch.part("backward"):
            loss.backward()
        with watch.part("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        return watch.read()

    @property
    def held(self) -> int:
        """Bytes of what the other does not share."""
        return _held(self.parameters, self.optimizer)

    @property
    def frozen(self) -> int:
        """Bytes of the transformer's weights."""
        return sum(weight.nbytes for weight in self.pipe.dit.parameters() if not weight.requires_grad)


def share(ours: QwenImageDiT, config: dict) -> QwenImageDiT:
    """DiffSynth's transformer with DiffSynth's blocks, on our frozen tensors. Neither may have LoRA yet."""
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    with torch.device("meta"):
        theirs = build_dit(config | {"num_layers": 0})
        blocks = (QwenImageTransformerBlock(heads * head_dim, heads, head_dim) for _ in range(config["num_layers"]))
        theirs.transformer_blocks = nn.ModuleList(blocks)
    theirs.load_state_dict(ours.state_dict(), assign=True)
    return theirs.requires_grad_(False)


def _held(parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    state = [value for entries in optimizer.state.values() for value in entries.values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in (*parameters, *state))
