"""From the configuration to the objects that a run is made of."""

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch import Tensor, nn

from data_prep.cache.batches import checked_group_size
from data_prep.cache.reader import CacheReader
from data_prep.errors import InputError
from data_prep.model.directory import ModelDirectory
from data_prep.model.editions import Edition
from data_prep.model.encoders import load_vae
from data_prep.model.geometry import Geometry
from data_prep.rows.images import file_digest
from train.config import Config, TrainConfig, check_whole_blocks, to_yaml
from train.model.adapter import Adapter, attach_lokr, attach_lora
from train.model.adapter_files import adapter_file, extra_file
from train.model.adapter_reader import fused, linear_modules, read_adapter
from train.model.attention import find_attention
from train.model.denoiser import Denoiser, build_dit, load_denoiser, resolve_zero_cond_t
from train.model.execution import Execution
from train.model.extra.extras import attach_extras, read_extras
from train.model.extra.modules import build_module, check_identity
from train.model.extra.whole import mark_trained, trained_modules
from train.model.offload import offloaded
from train.model.quantize import check_weights, describe_products
from train.optim import Optimizer
from train.parallel.processes import Processes, check_launch
from train.parallel.settings import check_settings, launched_settings, zero_settings
from train.parallel.strategies import Parallel, Replicas, Zero2, Zero3, shard
from train.record.checkpoint import Checkpoints
from train.record.loggers import JsonLines, Loggers, Terminal
from train.record.lookup import find_adapter
from train.record.run_files import CHECKPOINTS, METRICS


def build(node: dict[str, Any], name: str, /, *positional: Any, **keywords: Any) -> Any:
    """Builds the object that an open node's `_target_` names.

    Raises:
        InputError: its arguments are wrong.
    """
    try:
        return instantiate(node | {"_partial_": True})(*positional, **keywords)
    except (InstantiationException, TypeError, ValueError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise InputError(f"{name} ({node['_target_']}): {reason}") from error


def check_nodes(config: Config, model: ModelDirectory) -> None:
    """Builds what is cheap to build, so that a wrong argument is found before an hour of caching."""
    build_loss(config, lambda latents: latents)
    build_optimizer(config.optim, [nn.Parameter(torch.zeros(1))], config.train)
    resolve_zero_cond_t(config.model.zero_cond_t, model)
    if "train" in config.phases:
        check_weights(config.model.weights)
        check_adapters(config, model)
    offloaded(model.config("transformer")["num_layers"], num_offloaded(config))
    spread = config.parallel
    if "train" not in config.phases:
        return  # the other phases take any launch
    check_launch(spread.strategy, config.model.dtype, os.environ)
    settings, world_size = config.train, int(os.environ.get("WORLD_SIZE", "1"))
    check_whole_blocks(config, world_size)
    batch = settings.micro_batch_size, settings.accumulation(world_size), world_size
    checked_group_size(settings.group_size, settings.micro_batch_size, math.prod(batch))
    if launched := launched_settings(os.environ):
        check_settings(launched, spread.stage, spread.offload, *batch, settings.max_grad_norm)


def build_optimizer(node: dict[str, Any], parameters: list[nn.Parameter], settings: TrainConfig) -> Optimizer:
    """The optimizer of an `optim` node. Raises `InputError` if it refuses its options, or that the run clips gradients."""
    given = {"num_steps": settings.num_steps, "max_grad_norm": settings.max_grad_norm}
    return build(node, "optim", parameters, **given)


def check_adapters(config: Config, model: ModelDirectory) -> None:
    """Reads the adapters that the run starts from or lies over, and tries what is trained beside LoRA, on a transformer without
    weights.

    Raises:
        InputError: an adapter cannot be found or does not fit, or a DoRA adapter is to be exported with others; or a module
            cannot be trained in full or added.
    """
    lora = config.adapter
    if not (lora.init_from or lora.frozen or lora.train_modules or lora.modules):
        return
    with torch.device("meta"):
        denoiser = Denoiser(build_dit(model.config("transformer")), zero_cond_t=False)
    mark_trained(denoiser.dit, lora.train_modules)
    linear = linear_modules(denoiser.dit)
    frozen = [find_adapter(name) for name in lora.frozen]
    fused(frozen, linear, "cpu")
    for name, path in zip(lora.frozen, frozen, strict=True):
        check_frozen(name, path, linear, trained_modules(denoiser.dit, lora.train_modules), lora.export_frozen)
    for name, node in (lora.modules or {}).items():
        where = f"adapter.modules.{name}"
        check_identity(where, build_module(where, node, denoiser.dit.img_in.out_features))
    path = find_adapter(lora.init_from) if lora.init_from else None
    parts = read_adapter(path, linear) if path else {}
    with torch.device("meta"):
        adapter = attach_configured(denoiser, config)
        if path:
            adapter.start_from(path, parts, read_extras(path))


def check_frozen(name: str, path: Path, linear: dict[str, nn.Linear], in_full: list[str], exported: bool) -> None:
    """Refuses a frozen adapter that is more than LoRA, or that changes what is trained in full: editing with both would count it
    twice.

    Args:
        name: as the configuration has it.
        path: path of its file.
        linear: the transformer's linear modules.
        in_full: names of the modules that are trained in full.
        exported: `adapter.export_frozen`.

    Raises:
        InputError: says which.
    """
    if extra_file(path):
        raise InputError(
            f"adapter.frozen: {name} was trained with modules beside LoRA, so it cannot be frozen under another adapter"
        )
    inside = tuple(f"{module}." for module in in_full)
    for module, part in read_adapter(path, linear).items():
        if f"{module}.".startswith(inside):
            raise InputError(
                f"adapter.frozen: {name} changes {module}, which adapter.train_modules trains in full: remove it from one "
                "of the two"
            )
        if exported and part.products:
            raise InputError(
                f"{path} is a LoKr adapter, which adapter.export_frozen=true cannot merge into a LoRA: leave that out, and "
                "edit with both adapters"
            )


def num_offloaded(config: Config) -> int:
    """How many blocks are offloaded; `auto` is none."""
    return 0 if config.train.offload_blocks == "auto" else config.train.offload_blocks


def build_model(config: Config, model: ModelDirectory, processes: Processes) -> tuple[Adapter, Parallel]:
    """The denoiser with LoRA, spread as `parallel` says. Under ZeRO-3 no rank ever holds the whole transformer.

    Args:
        config: with what the plan decided in place of every `auto` that is about memory.
    """
    settings, spread, lora = config.train, config.parallel, config.adapter
    dtype = getattr(torch, config.model.dtype)
    compiled = settings.compile == "on" or (settings.compile == "auto" and processes.device.type == "cuda")
    attention, name = find_attention(settings.attention, processes.device, dtype)
    processes.say(f"attention: {name}")
    options = {"compiled": compiled, "attention": attention, "say": processes.say}
    execution = Execution.of(settings.gradient_checkpointing, **options)
    accumulation = settings.accumulation(processes.world_size)
    zero, stage = None, spread.stage
    if stage:
        zero = zero_settings(
            stage,
            spread.offload,
            spread.bucket_size,
            spread.overlap_comm,
            spread.contiguous_gradients,
            spread.zero_options,
            settings.micro_batch_size,
            accumulation,
            launched_settings(os.environ),
        )
    if dtype == torch.bfloat16:  # LoRA's float32 products: rounded to 11 bits, 3 more than what they are added to
        torch.backends.cuda.matmul.allow_tf32 = True
    place = shard(zero, processes) if zero and stage == 3 else None
    read = processes.is_main or place is None  # `place` sends what rank 0 reads
    weights = config.model.weights
    processes.say(f"transformer: {describe_products(weights, processes.device, dtype)}")
    denoiser = load_denoiser(
        model,
        processes.device,
        dtype,
        config.model.zero_cond_t,
        execution,
        place,
        read,
        weights,
        num_offloaded(config),
        [adapter_file(find_adapter(name)) for name in lora.frozen],
        lora.train_modules,
    )
    adapter = attach_configured(denoiser, config)
    linear = linear_modules(denoiser.dit)
    if lora.init_from:
        start = find_adapter(lora.init_from)
        adapter.start_from(start, read_adapter(start, linear), read_extras(start))
        processes.say(f"starting from the weights of {start}")
    if lora.export_frozen:
        adapter.beneath = [read_adapter(find_adapter(name), linear) for name in lora.frozen]
    if zero and stage == 3:
        return adapter, Zero3(denoiser, adapter, processes, zero, spread.offload)
    if zero:
        return adapter, Zero2(denoiser, adapter, processes, zero)
    return adapter, Replicas(denoiser, adapter, processes)


def attach_configured(denoiser: Denoiser, config: Config) -> Adapter:
    """LoRA or LoKr, and what is trained beside it, as the configuration has it."""
    lora = config.adapter
    adapter = _attach_layers(denoiser, config)
    adapter.extras = attach_extras(denoiser, lora.train_modules, lora.modules or {}, config.seed)
    return adapter


def _attach_layers(denoiser: Denoiser, config: Config) -> Adapter:
    lora = config.adapter
    if lora.kind == "lokr":
        return attach_lokr(
            denoiser,
            lora.rank,
            lora.alpha,
            lora.target_modules,
            lora.decompose_both,
            lora.decompose_factor,
            config.seed,
            lora.rank_pattern,
            lora.alpha_pattern,
            lora.train_modules,
        )
    return attach_lora(
        denoiser,
        lora.rank,
        lora.alpha,
        lora.target_modules,
        lora.rslora,
        lora.dora,
        config.seed,
        lora.rank_pattern,
        lora.alpha_pattern,
        lora.train_modules,
    )


def lazy_decode(model: ModelDirectory, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The VAE's decoder, loaded when it is first used."""

    @functools.cache
    def vae():
        return load_vae(model, device, dtype)

    return lambda latents: vae().decode(latents)


def build_loss(config: Config, decode: Callable[[Tensor], Tensor]) -> Any:
    """The loss; it is given the decoder if it has pixel terms."""
    return build(config.loss, "loss", **({"decode": decode} if config.loss.get("pixel") else {}))


def build_checkpoints(config: Config, metadata: dict[str, str]) -> Checkpoints:
    """The run's checkpoints.

    Args:
        metadata: metadata of the exported adapters.
    """
    settings, folder = config.train, Path(config.run_dir) / CHECKPOINTS
    dtype = getattr(torch, config.model.dtype)
    kept = settings.keep_last, metadata, to_yaml(config), dtype, settings.keep_every, settings.best_by
    return Checkpoints(folder, *kept)


def build_validation(
    config: Config, reader: CacheReader, decode: Callable[[Tensor], Tensor], processes: Processes
) -> Any:
    """The validation on the held-out rows of `reader`. A start that the loss does not train is not validated."""
    folder, node = Path(config.run_dir) / "validation", config.validate
    if node.get("white") and config.loss.get("sub_prob") == 0:
        node = {**node, "white": None}
    elif node.get("white") and config.loss.get("sub_prob") == 1:
        node = {**node, "sampler": node["white"], "white": None}
    return build(node, "validate", reader=reader, decode=decode, folder=folder, processes=processes)


def build_loggers(config: Config, first_step: int, record: dict[str, Any], states: dict[str, Any]) -> Loggers:
    """metrics.jsonl, the terminal, and those of the configuration."""
    run_dir = Path(config.run_dir)
    metrics = run_dir / METRICS
    context = {
        "run_dir": run_dir,
        "name": config.name,
        "config": asdict(config),
        "record": record,
        "resumed_step": first_step,
    }
    configured = {
        name: build(node, f"logger.{name}", **context, state=states.get(name, {}))
        for name, node in config.logger.items()
    }
    terminal = Terminal(config.train.num_steps, config.train.log_every, first_step)
    return Loggers({"metrics": JsonLines(metrics, first_step), "terminal": terminal, **configured}, metrics)


def adapter_metadata(config: Config, loss: Any, geometry: Geometry, edition: Edition) -> dict[str, str]:
    """What an exported adapter says of itself.

    `kind` where it is no LoRA; `sigmas` where it was trained at a few alone; `frozen`, digest and name of what it was trained
    over and lacks.
    """
    sigmas = getattr(loss, "trained_sigmas", None)  # a loss of the user's own need not have it
    lora = config.adapter
    files = [] if lora.export_frozen else [adapter_file(find_adapter(name)) for name in lora.frozen]
    frozen = {file_digest(file): name for file, name in zip(files, lora.frozen, strict=False)}
    return {
        "base_model": config.model.path,
        "base_pipeline": edition.pipeline,
        "weights": config.model.weights,
        "objective": loss.objective,
        "sigma_convention": "1 = start (source, white or noise), 0 = target",
        "loss": json.dumps(config.loss),
        **({"sigmas": json.dumps(sigmas)} if sigmas else {}),
        **({"frozen": json.dumps(frozen)} if frozen else {}),
        **({"kind": lora.kind} if lora.kind != "lora" else {}),
        "geometry": json.dumps(asdict(geometry)),
        "config_hash": hashlib.sha256(to_yaml(config).encode()).hexdigest()[:16],
    }
