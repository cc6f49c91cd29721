"""What a configuration needs on one rank, by part, how fast it is, and what `auto` comes to: a function of plain sizes."""

import bisect
import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
from torch import nn

from data_prep.cache.sizes import Bucket, DatasetSizes, cache_bytes, has_own_source
from data_prep.model.directory import ModelDirectory
from data_prep.model.geometry import Geometry, Size
from train.config import Config
from train.model.denoiser import resolve_zero_cond_t
from train.model.execution import Execution
from train.model.offload import NUM_SLOTS
from train.optim import Optimizer
from train.plan.encoder_sizes import EncoderSizes
from train.plan.gpus import GIB, Gpu
from train.plan.memory import LoraSizes, Transformer, optimizer_bytes
from train.plan.quantised import Format
from train.plan.speed import UTILISATION, Step, communication

ALLOWANCE = 3 * GIB // 2
"""For what PyTorch does not count: the CUDA context, kernels' workspaces, and fragmentation."""
MAX_LIVE_PARAMETERS = 1_000_000_000
"""Elements that DeepSpeed's ZeRO-3 keeps gathered at most, its default."""
FLOAT = 4

Change = dict[str, Any]
"""Full key -> value; a group's name -> its keys."""

BuildOptimizer = Callable[[dict[str, Any], list[nn.Parameter]], Optimizer]
"""The config's `optim` node and parameters -> the optimizer."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank at the worst moment, by part."""

    gpu: dict[str, int]
    cpu: int = 0
    """Offloaded parts, in the machine's memory."""

    @property
    def total(self) -> int:
        """On the GPU."""
        return sum(self.gpu.values())


class Planner:
    """Answers for one model and dataset, whatever the other settings.

    Args:
        config: whose model and data are meant.
        model: its `config.json` files are read.
        data: sizes of the rows.
        build_optimizer: as in `make_plan`.
    """

    def __init__(self, config: Config, model: ModelDirectory, data: DatasetSizes, build_optimizer: BuildOptimizer):
        self.dtype = getattr(torch, config.model.dtype)
        zero_cond_t = resolve_zero_cond_t(config.model.zero_cond_t, model)
        self.transformer = Transformer(model.config("transformer"), self.dtype, zero_cond_t)
        self.encoders = EncoderSizes(model.config("vae"), model.config("text_encoder"), self.dtype)
        self.text_width = model.config("transformer")["joint_attention_dim"]
        self.data, self.build_optimizer = data, build_optimizer
        self._buckets, self._optimizer_bytes = functools.cache(data.buckets), functools.cache(self._optimizer_bytes)

    def training(self, config: Config, world_size: int, gpu: Gpu) -> Memory:
        """Phase 2 at its worst moment: a backward pass on the longest sequence, or what is done between two steps.

        Args:
            config: without `auto`.
            gpu: says whether products are computed in 8 bits.
        """
        zero, num_frozen, num_lora = config.parallel.stage, self.transformer.num_parameters, self.num_lora(config)
        num_extra, optimizer = self.num_extra(config), self.optimizer_bytes(config)
        lora, trained = FLOAT * (num_lora + num_extra), "LoRA and what is beside it:" if num_extra else "LoRA"
        weights, waiting = config.model.weights, waiting_blocks(config)
        frozen, block = self.transformer.frozen_bytes(weights), self.transformer.block_bytes(weights)
        offloaded = config.parallel.offload
        buffer = FLOAT * config.parallel.bucket_size * (2 if config.parallel.overlap_comm else 1)
        if not config.parallel.contiguous_gradients:
            buffer = min(buffer, lora)  # as gradients come, instead of one buffer from the start
        between = lora * (
            2 if zero == 2 else 1
        )  # the optimizer's temporaries or averaged weights; ZeRO-2: gradients too
        backward, pixels = self.backward_bytes(config), self.pixel_bytes(config)
        between += self.validation_bytes(config)
        around, inside = self.transformer.replaced_bytes(weights, lora_sizes(config))
        staying = 1 - waiting / self.transformer.num_layers  # of the blocks
        parts = {"frozen weights": frozen - waiting * block - around - round(inside * staying)}
        if weights != "bf16":
            parts = {f"frozen weights, the blocks' in {weights}": parts["frozen weights"]}
        if zero == 3:
            blocks = self.transformer.num_layers * block
            parts = {
                f"frozen weights, 1/{world_size} of the blocks'": 0
                if offloaded
                else -(-(blocks - inside) // world_size),
                "frozen weights around the blocks": frozen - blocks - around,
            }
            gathered = min(num_frozen, MAX_LIVE_PARAMETERS) if config.parallel.cuts_blocks(world_size) else 0
            parts["gathered weights"] = gathered * self.dtype.itemsize
            if config.parallel.cuts_blocks(world_size) and not offloaded:
                parts["DeepSpeed's shards of weights that are also kept whole, and a block in transfer"] = (
                    lora + frozen - blocks
                ) // world_size + block
        parts[f"offloaded blocks, {NUM_SLOTS} at a time"] = min(NUM_SLOTS, waiting) * block
        parts[f"{trained} weights"] = lora
        parts[f"{trained} gradients"] = lora // world_size if zero == 2 else lora
        if zero == 2:
            parts["DeepSpeed's copy of the trained weights"] = lora // world_size
            parts["DeepSpeed's buckets (parallel.bucket_size)"] = buffer
            parts[f"{trained} masters, on every rank"] = lora
        if not config.adapter.dora and config.adapter.kind == "lora":
            parts["LoRA weights for products"] = num_lora * self.dtype.itemsize
        parts["optimizer state"] = 0 if offloaded else optimizer
        parts[f"activations of {config.train.micro_batch_size} at the longest sequence, {self.kept(config)}"] = backward
        parts["temporary memory for products with quantised weights"] = self.workspace_bytes(config, gpu)
        if pixels:
            parts["pixel loss through the VAE (LPIPS not counted)"] = pixels
        parts["between steps, beyond activations"] = max(0, between - backward - pixels)
        if config.validate or config.loss.get("pixel"):
            parts["VAE"] = self.encoders.vae_bytes
        parts["CUDA context, workspaces, fragmentation (allowance)"] = ALLOWANCE
        cpu = frozen // world_size + 2 * lora + optimizer if offloaded else waiting * block
        return Memory({part: size for part, size in parts.items() if size}, cpu)

    def caching(self, config: Config) -> Memory:
        """Phase 1."""
        encoding = self.encoders.encode_bytes(self.longest(config).target, config.cache.batch_size)
        return Memory(
            {
                "text encoder": self.encoders.text_encoder_bytes,
                "VAE": self.encoders.vae_bytes,
                "encoding": encoding,
                "allowance": ALLOWANCE,
            }
        )

    def caching_flops(self, config: Config) -> float:
        """Operations of phase 1 for one row, on average: its target, its references, the source where it is none of these,
        and its instructions."""
        total = 0.0
        for bucket in self.buckets(config):
            images = [bucket.target, *bucket.references]
            images += [bucket.target] * has_own_source(bucket.target, bucket.references)
            pixels = sum(size.height * size.width for size in images)
            text = prompts_per_row(config) * self.encoders.text_flops(bucket.text_tokens)
            total += bucket.share * (pixels * self.encoders.flops_per_pixel + text)
        return total

    def backward_bytes(self, config: Config) -> int:
        """Activations of one micro-batch of the longest sequence."""
        batch_size = config.train.micro_batch_size * forwards_per_sample(config)
        execution = Execution.of(config.train.gradient_checkpointing)
        return self.transformer.activation_bytes(self.longest(config), batch_size, execution, lora_sizes(config))

    def kept(self, config: Config) -> str:
        """What the backward pass finds, in words."""
        kept = Execution.of(config.train.gradient_checkpointing).kept(self.transformer.num_layers)
        words = {
            "all": "everything",
            "products": "products and attention",
            "attention": "attention",
            "nothing": "nothing",
        }
        counts = {keep: kept.count(keep) for keep in words if keep in kept}
        return "; ".join(f"{words[keep]} kept in {count} of {len(kept)} blocks" for keep, count in counts.items())

    def fits(self, config: Config, world_size: int, gpu: Gpu) -> bool:
        """Whether training finds enough memory, on the GPU and, where it is known, in the machine."""
        memory, here = self.training(config, world_size, gpu), min(world_size, gpu.per_machine)
        return memory.total <= gpu.memory_gib * GIB and (
            gpu.host_gib is None or memory.cpu * here <= gpu.host_gib * GIB
        )

    def decide(self, config: Config, world_size: int, gpu: Gpu) -> Change:
        """What every `auto` about memory comes to, by full key."""
        strategy = {"parallel.strategy": self.strategy(config, world_size, gpu)}
        return strategy | self.saving(apply(config, strategy), world_size, gpu)

    def without_auto(self, config: Config, world_size: int, gpu: Gpu) -> Config:
        """The configuration with what is decided in place of every `auto` about memory."""
        return apply(config, self.decide(config, world_size, gpu))

    def strategy(self, config: Config, world_size: int, gpu: Gpu) -> str:
        """`parallel.strategy`, with `auto` decided: `single` for one process; `ddp` for several if each GPU has room for the
        model, none of it waiting in CPU memory, else `zero3`. What only whole blocks can do is never cut. On one process,
        which has nothing to share out, `zero3` is `single`.
        """
        if world_size == 1 and config.parallel.name == "zero3":
            return "single"
        if config.parallel.strategy != "auto":
            return config.parallel.strategy
        if world_size == 1:
            return "single"
        if not can_shard(config):
            return "ddp"
        replicas = apply(config, {"parallel.strategy": "ddp", "train.offload_blocks": 0})
        return "ddp" if self.fits(self.without_auto(replicas, world_size, gpu), world_size, gpu) else "zero3"

    def saving(self, config: Config, world_size: int, gpu: Gpu) -> Change:
        """`train.gradient_checkpointing` and `train.offload_blocks`, with `auto` decided: as little of each as fits.

        First more is recomputed, then blocks wait in CPU memory. If nothing fits, everything is recomputed and all blocks wait
        there.
        """
        num_layers = self.transformer.num_layers
        settings: list[str | int] = ["off", "selective", *range(1, num_layers + 1), "full"]
        if config.train.gradient_checkpointing != "auto":
            settings = [config.train.gradient_checkpointing]
        counts: list[int] = [0, *range(NUM_SLOTS + 1, num_layers + 1)]  # fewer are on the GPU all the same
        if config.train.offload_blocks != "auto":
            counts = [config.train.offload_blocks]
        elif config.parallel.stage == 3 or config.train.device == "cpu":
            counts = [0]

        def change(setting: str | int, count: int) -> Change:
            return {"train.gradient_checkpointing": setting, "train.offload_blocks": count}

        def fits(setting: str | int, count: int) -> bool:
            return self.fits(apply(config, change(setting, count)), world_size, gpu)

        if fits(settings[-1], counts[0]):  # each needs less than the one before it
            first = bisect.bisect_left(settings[:-1], True, key=lambda setting: fits(setting, counts[0]))
            return change(settings[first], counts[0])
        least = bisect.bisect_left(counts[:-1], True, key=lambda count: fits(settings[-1], count))
        return change(settings[-1], counts[least])

    def step(self, config: Config, world_size: int, gpu: Gpu) -> Step:
        """What a GPU does in a step.

        Args:
            config: without `auto`.
        """
        settings, weights, lora = config.train, config.model.weights, lora_sizes(config)
        execution = Execution.of(settings.gradient_checkpointing)
        forwards, kept = forwards_per_sample(config), self.format(config, gpu)
        accumulated = settings.accumulation(world_size)
        samples, passes = settings.micro_batch_size * accumulated, accumulated * forwards
        times, rolled = 2 + self.transformer.recomputed(execution), rollout_share(config)
        drawn = samples * forwards * (1 - self.empty_share(config))
        frozen = rest = forward = rounded = 0.0
        for bucket in self.buckets(config):
            flops, first = self.transformer.flops(bucket, lora, execution), self.transformer.forward_flops(bucket, lora)
            frozen += bucket.share * drawn * (flops.frozen + rolled * first[0])
            rest += bucket.share * drawn * (flops.rest + rolled * sum(first[1:]))
            forward += bucket.share * flops.forward / flops.total
            layers = self.transformer.layers(bucket)
            traffic = sum(kept.traffic_bytes(layer, settings.micro_batch_size, times) for layer in layers)
            rounded += bucket.share * passes * traffic
        blocks = self.transformer.num_layers * self.transformer.block_bytes(weights)
        trained = FLOAT * (self.num_lora(config) + self.num_extra(config))
        shards = (config.parallel, world_size, passes, accumulated, blocks, trained)
        gathered, reduced = communication(*shards)
        copied = (2 + rolled) * passes * (blocks // world_size)
        if (
            not config.parallel.offload
        ):  # the last ones of a forward pass are there for the backward pass, and the other way
            waiting, block = waiting_blocks(config), self.transformer.block_bytes(weights)
            copied = passes * (2 * max(0, waiting - NUM_SLOTS) + rolled * waiting) * block
        return Step(
            flops=round(rest if kept.products else rest + frozen),
            flops_8bit=round(frozen if kept.products else 0),
            forward=forward,
            rounded=rounded,
            copied=round(copied),
            gathered=gathered,
            reduced=reduced,
            fetched_blocks=passes * self.transformer.num_layers if config.parallel.cuts_blocks(world_size) else 0,
        )

    def seconds(self, config: Config, world_size: int, gpu: Gpu) -> float | None:
        """Seconds per step; None if no speed is known, for another GPU or a `model.dtype` other than bfloat16."""
        if gpu.tflops is None or config.model.dtype != "bfloat16":
            return None
        return self.step(config, world_size, gpu).seconds(gpu, config.model.weights, utilisation(config))

    def empty_share(self, config: Config) -> float:
        """Share of the places of all groups that no row fills."""
        group_size = config.train.group_size or config.train.micro_batch_size
        drawn = self.data.num_rows * self.data.drawn_per_epoch
        counts = [max(1, round(bucket.share * drawn)) for bucket in self.buckets(config)]
        return 1 - sum(counts) / (group_size * sum(-(-count // group_size) for count in counts))

    def format(self, config: Config, gpu: Gpu) -> Format:
        """How frozen weights are kept and multiplied."""
        weights, compiled = config.model.weights, config.train.compile != "off"
        products = gpu.products(weights) is not None and self.dtype == torch.bfloat16
        return Format(weights, products, compiled, self.dtype.itemsize)

    def workspace_bytes(self, config: Config, gpu: Gpu) -> int:
        """The most that one product with a quantised weight holds for a moment."""
        kept, batch_size = self.format(config, gpu), config.train.micro_batch_size * forwards_per_sample(config)
        return max(kept.workspace_bytes(layer, batch_size) for layer in self.transformer.layers(self.longest(config)))

    def pixel_bytes(self, config: Config) -> int:
        """Bytes for a loss that decodes its prediction."""
        if not (pixel := config.loss.get("pixel")):
            return 0
        size, crop = self.longest(config).target.latent, pixel.get("crop", 32) or math.inf
        cropped = Size(int(min(size.height, crop)), int(min(size.width, crop)))
        return self.encoders.decode_bytes(cropped, config.train.micro_batch_size, gradient=True)

    def validation_bytes(self, config: Config) -> int:
        """Decoding the validation's pictures."""
        if not config.validate:
            return 0
        return self.encoders.decode_bytes(self.longest(config).target.latent, config.validate.get("batch_size", 1))

    def cache_bytes(self, config: Config) -> int:
        """Bytes of the training rows' records: latents of target and references, of the source where no reference is of the
        target's size, and prompt embeddings."""
        return cache_bytes(self.data, geometry_of(config), self.text_width, prompts_per_row(config))

    def num_lora(self, config: Config) -> int:
        """Trainable parameters of LoRA."""
        shapes = self.transformer.lora_shapes(lora_sizes(config)).values()
        return sum(math.prod(shape) for group in shapes for shape in group)

    def num_extra(self, config: Config) -> int:
        """Trainable parameters beside it."""
        return sum(map(math.prod, self.transformer.extra_shapes(lora_sizes(config)).values()))

    def optimizer_bytes(self, config: Config) -> int:
        """Bytes of the optimizer's state."""
        return self._optimizer_bytes(json.dumps(config.optim), lora_sizes(config))

    def _optimizer_bytes(self, optim: str, lora: LoraSizes) -> int:
        groups = self.transformer.lora_shapes(lora).values()
        shapes, zero = [shape for group in groups for shape in group], {group[-1] for group in groups}
        extra, build = (
            [*self.transformer.extra_shapes(lora).values()],
            functools.partial(self.build_optimizer, json.loads(optim)),
        )
        return optimizer_bytes(shapes, build, extra, zero if lora.lokr else None)

    def buckets(self, config: Config) -> list[Bucket]:
        """The buckets of the training rows, the one that needs most memory first."""
        return self._buckets(geometry_of(config))

    def longest(self, config: Config) -> Bucket:
        """The bucket that needs most."""
        return self.buckets(config)[0]


def spread(strategy: str, offload: bool = False) -> Change:
    """The change to this `parallel=`."""
    return {"parallel.strategy": strategy, "parallel.offload": offload}


def apply(config: Config, *changes: Change) -> Config:
    """The configuration with these keys changed, all at once: checks see the whole."""
    groups: dict[str, Any] = {}
    for key, value in (item for change in changes for item in change.items()):
        section, _, name = key.partition(".")
        groups[section] = {**groups.get(section, {}), name: value} if name else value
    sections = {
        s: replace(getattr(config, s), **v) if is_dataclass(getattr(config, s)) else v for s, v in groups.items()
    }
    return replace(config, **sections)


def geometry_of(config: Config) -> Geometry:
    """How images are sized."""
    return Geometry(config.data.max_pixels, config.data.vision_pixels, config.data.reference_pixels)


def lora_sizes(config: Config) -> LoraSizes:
    """How large the adapter is."""
    lora = config.adapter
    patterns, modules = tuple((lora.rank_pattern or {}).items()), json.dumps(lora.modules or {})
    lokr = (lora.decompose_both, lora.decompose_factor) if lora.kind == "lokr" else None
    return LoraSizes(
        lora.rank, tuple(lora.target_modules), lora.dora, patterns, lokr, tuple(lora.train_modules), modules
    )


def forwards_per_sample(config: Config) -> int:
    """2 for a loss that runs both of its streams on every sample."""
    both = config.loss.get("combine") == "sum" and 0 < config.loss.get("sub_prob", 0.25) < 1
    return 2 if both else 1


def prompts_per_row(config: Config) -> int:
    """Instructions that are encoded of each row: its own, the empty one, and one that is preserved."""
    return 1 + (config.data.caption_dropout > 0) + bool(config.loss.get("preserve"))


def rollout_share(config: Config) -> float:
    """Share of the samples with an additional forward pass without gradient, of the model itself or of the base model."""
    sigma = config.loss.get("sigma") or {}
    values = sigma.get("values") or [0.0]  # a sampler that draws 1 never, or hardly
    weights = sigma.get("probabilities") or [1.0] * len(values)
    below = sum(weight for value, weight in zip(values, weights, strict=True) if value < 1) / sum(weights)
    preserved = config.loss.get("preserve", 0.0)
    return config.loss.get("rollout", 0.0) * below * (1 - preserved) + preserved


def waiting_blocks(config: Config) -> int:
    """Blocks whose frozen weights wait in CPU memory; the configuration is one without `auto`."""
    assert config.train.offload_blocks != "auto"
    return config.train.offload_blocks


def can_shard(config: Config) -> bool:
    """Whether frozen weights can be cut over the ranks (ZeRO-3)."""
    return not config.adapter.dora and config.model.weights == "bf16" and config.train.offload_blocks in ("auto", 0)


def utilisation(config: Config) -> float:
    """The assumed share of the GPU's peak."""
    return UTILISATION["plain" if config.train.compile == "off" else "compiled"]
