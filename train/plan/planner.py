"""What a configuration needs on one rank, by part, and the settings that need less: a function of plain sizes."""

import bisect
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from data_prep.cache.sizes import Bucket, DatasetSizes, cache_bytes
from data_prep.model.directory import ModelDirectory
from data_prep.model.geometry import Geometry, Size
from train.config import Config
from train.model.denoiser import resolve_zero_cond_t
from train.model.execution import Execution
from train.optim import Optimizer
from train.plan.gpus import Gpu
from train.plan.memory import EncoderSizes, LoraSizes, Transformer, optimizer_bytes

GIB = 2**30
ALLOWANCE = 3 * GIB // 2
"""For what PyTorch does not count: the CUDA context, kernels' workspaces, and fragmentation."""
MAX_LIVE_PARAMETERS = 1_000_000_000
"""Elements that DeepSpeed's ZeRO-3 keeps gathered at most, its default."""
SMALL_BUCKET = 50_000_000
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
    """Offloaded parts."""

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

    def training(self, config: Config, world_size: int) -> Memory:
        """Phase 2 at its worst moment: a backward pass on the longest sequence, or what is done between two steps."""
        zero, num_frozen, num_lora = config.parallel.stage, self.transformer.num_parameters, self.num_lora(config)
        lora, optimizer = FLOAT * num_lora, self.optimizer_bytes(config)
        frozen, offloaded = num_frozen * self.dtype.itemsize, config.parallel.offload
        buffer = FLOAT * config.parallel.bucket_size * (2 if config.parallel.overlap_comm else 1)
        if not config.parallel.contiguous_gradients:
            buffer = min(buffer, lora)  # as gradients come, instead of one buffer from the start
        between = lora * (
            2 if zero == 2 else 1
        )  # the optimizer's temporaries or averaged weights; ZeRO-2: gradients too
        backward, pixels = self.backward_bytes(config), self.pixel_bytes(config)
        between += self.validation_bytes(config)
        gpu = {"frozen weights" + (f", 1/{world_size} of them" if zero == 3 else ""): frozen}
        if zero == 3:
            gpu = {next(iter(gpu)): 0 if offloaded else -(-frozen // world_size)}
            gathered = 0 if world_size == 1 and not offloaded else min(num_frozen, MAX_LIVE_PARAMETERS)
            gpu["gathered weights"] = gathered * self.dtype.itemsize  # one rank alone has nothing to gather
        gpu["LoRA weights"] = lora
        gpu["LoRA gradients"] = lora // world_size if zero == 2 else lora
        if zero == 2:
            gpu["DeepSpeed's copy of LoRA"] = lora // world_size
            gpu["DeepSpeed's buckets (parallel.bucket_size)"] = buffer
            gpu["LoRA masters, on every rank"] = lora
        if not config.adapter.dora:
            gpu["LoRA weights for products"] = num_lora * self.dtype.itemsize
        gpu["optimizer state"] = 0 if offloaded else optimizer
        gpu[f"activations of {config.train.micro_batch_size} at the longest sequence, {self.kept(config)}"] = backward
        if pixels:
            gpu["pixel loss through the VAE (LPIPS not counted)"] = pixels
        gpu["between steps, beyond activations"] = max(0, between - backward - pixels)
        if config.validate or config.loss.get("pixel"):
            gpu["VAE"] = self.encoders.vae_bytes
        gpu["CUDA context, workspaces, fragmentation (allowance)"] = ALLOWANCE
        cpu = frozen // world_size + 2 * lora + optimizer if offloaded else 0
        return Memory({part: size for part, size in gpu.items() if size}, cpu)

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

    def decide(self, config: Config, world_size: int, gpu: Gpu) -> Change:
        """What every `auto` about memory comes to, by full key."""
        strategy = {"parallel.strategy": self.strategy(config, world_size, gpu)}
        return strategy | {"train.gradient_checkpointing": self.checkpointing(apply(config, strategy), world_size, gpu)}

    def strategy(self, config: Config, world_size: int, gpu: Gpu) -> str:
        """`parallel.strategy`, with `auto` decided: the fastest that fits."""
        if config.parallel.strategy != "auto":
            return config.parallel.strategy
        if world_size == 1:
            return "single"
        replicas = apply(config, {"parallel.strategy": "ddp"})
        replicas = apply(replicas, {"train.gradient_checkpointing": self.checkpointing(replicas, world_size, gpu)})
        return "ddp" if config.adapter.dora or self.fits(replicas, world_size, gpu) else "zero3"

    def fits(self, config: Config, world_size: int, gpu: Gpu) -> bool:
        """Whether training finds enough memory on each GPU."""
        return self.training(config, world_size).total <= gpu.memory_gib * GIB

    def checkpointing(self, config: Config, world_size: int, gpu: Gpu) -> str | int:
        """`train.gradient_checkpointing`, with `auto` decided: the fastest that fits; `full` if none does."""
        if config.train.gradient_checkpointing != "auto":
            return config.train.gradient_checkpointing
        settings = ["off", "selective", *range(1, self.transformer.num_layers + 1), "full"]

        def fits(setting: str | int) -> bool:
            return self.fits(apply(config, {"train.gradient_checkpointing": setting}), world_size, gpu)

        first = bisect.bisect_left(settings[:-1], True, key=fits)  # each needs less than the one before it
        return settings[first]

    def pixel_bytes(self, config: Config) -> int:
        """Of a loss that decodes its prediction."""
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
        """Of the training rows' records: latents of target, source and references, and prompt embeddings."""
        num_prompts = 2 if config.data.caption_dropout > 0 else 1
        return cache_bytes(self.data, geometry_of(config), self.text_width, num_prompts)

    def num_lora(self, config: Config) -> int:
        """Trainable parameters."""
        shapes = self.transformer.lora_shapes(lora_sizes(config)).values()
        return sum(math.prod(shape) for group in shapes for shape in group)

    def optimizer_bytes(self, config: Config) -> int:
        """Of the optimizer's state."""
        shapes = self.transformer.lora_shapes(lora_sizes(config)).values()
        return optimizer_bytes([s for group in shapes for s in group], lambda p: self.build_optimizer(config.optim, p))

    def longest(self, config: Config) -> Bucket:
        """The bucket that needs most."""
        return self.data.buckets(geometry_of(config))[0]

    def advice(self, config: Config, world_size: int, gpu: Gpu) -> list[str]:
        """Settings that would fit, for each phase that does not."""
        advice = []
        available = gpu.memory_gib * GIB
        if self.caching(config).total > available >= self.caching(apply(config, {"cache.batch_size": 1})).total:
            advice.append("cache.batch_size=1  (for caching)")
        if self.training(config, world_size).total > available:
            advice += self.training_advice(config, world_size, available)
        return advice

    def training_advice(self, config: Config, world_size: int, available: float) -> list[str]:
        """Settings under which training fits: those that leave the result as it is, or else those and one more."""

        def fits(candidate: Config, num_gpus: int = world_size) -> bool:
            return self.training(candidate, num_gpus).total <= available

        harmless = list(harmless_changes(config))
        for count in range(1, len(harmless) + 1):
            for chosen in itertools.combinations(harmless, count):
                if fits(apply(config, *chosen)):
                    return [text_of(*chosen)]
        found = []
        for family in further_changes(config, world_size):
            hopeless = not family or not fits(apply(config, *harmless, family[-1][0]), family[-1][1])
            for change, num_gpus in [] if hopeless else family:
                if fits(apply(config, *harmless, change), num_gpus):
                    launch = f"  (on {num_gpus} GPUs)" if num_gpus != world_size else ""
                    found.append(text_of(*harmless, change) + launch)
                    break
        return found


def harmless_changes(config: Config) -> Iterator[Change]:
    """What costs time and changes no result."""
    settings = config.train
    if settings.gradient_checkpointing != "full":
        yield {"train.gradient_checkpointing": "full"}
    if settings.micro_batch_size > 1:
        accumulated = settings.micro_batch_size * (settings.grad_accum_steps or 1)
        kept = {} if settings.global_batch_size else {"train.grad_accum_steps": accumulated}
        kept["train.group_size"] = settings.group_size or settings.micro_batch_size
        yield {"train.micro_batch_size": 1, **kept}
    if config.parallel.stage == 2 and config.parallel.bucket_size > SMALL_BUCKET:
        yield {"parallel.bucket_size": SMALL_BUCKET}


def further_changes(config: Config, world_size: int) -> Iterator[list[tuple[Change, int]]]:
    """What needs more GPUs or changes the result, by family; within one, the smaller change first."""
    if config.optim["_target_"] == "train.optim.AdamW" and importlib.util.find_spec("bitsandbytes"):
        yield [({"optim": {**config.optim, "bits": 8}}, world_size)]
    sharded = {"parallel.strategy": "zero3", "parallel.offload": False}
    if not config.adapter.dora:
        counts = sorted({world_size, *(n for n in (2, 4, 8) if n > world_size)} - {1})
        yield [(sharded, count) for count in counts]
        if not config.parallel.offload:
            yield [({**sharded, "parallel.offload": True}, world_size)]
    yield [({"data.max_pixels": n * n}, world_size) for n in (768, 512, 384) if n * n < config.data.max_pixels]
    halved = itertools.takewhile(lambda rank: rank >= 4, (config.adapter.rank >> n for n in itertools.count(1)))
    yield [({"adapter.rank": rank}, world_size) for rank in halved]


def apply(config: Config, *changes: Change) -> Config:
    """The configuration with these keys changed."""
    for key, value in (item for change in changes for item in change.items()):
        section, _, name = key.partition(".")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value}) if name else value})
    return config


def text_of(*changes: Change) -> str:
    """As they are written on the command line."""
    values: Change = {key: value for change in changes for key, value in change.items()}
    if values.pop("parallel.strategy", None):
        group = "zero3_offload" if values.pop("parallel.offload") else "zero3"
        values = {"parallel": group} | values
    if optim := values.pop("optim", None):
        values["++optim.bits"] = optim["bits"]
    return " ".join(f"{key}={value}" for key, value in values.items())


def geometry_of(config: Config) -> Geometry:
    """How images are sized."""
    return Geometry(config.data.max_pixels, config.data.vision_pixels, config.data.reference_pixels)


def lora_sizes(config: Config) -> LoraSizes:
    """How large the adapter is."""
    return LoraSizes(config.adapter.rank, tuple(config.adapter.target_modules), config.adapter.dora)


def forwards_per_sample(config: Config) -> int:
    """2 for a loss that runs both of its streams on every sample."""
    both = config.loss.get("combine") == "sum" and 0 < config.loss.get("sub_prob", 0.25) < 1
    return 2 if both else 1


def rollout_share(config: Config) -> float:
    """Of the samples, those for which a first forward without gradient is made."""
    sigma = config.loss.get("sigma") or {}
    values = sigma.get("values") or [0.0]  # a sampler that draws 1 never, or hardly
    weights = sigma.get("probabilities") or [1.0] * len(values)
    below = sum(weight for value, weight in zip(values, weights, strict=True) if value < 1) / sum(weights)
    return config.loss.get("rollout", 0.0) * below
