"""The two phases of a run: caching, and training. What `train/run.py` does once the configuration is known."""

import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from data_prep.batches import BatchStream
from data_prep.cache import build_cache
from data_prep.encode import Encoders
from data_prep.encoders import load_prompt_encoder, load_vae
from data_prep.errors import InputError
from data_prep.files import write_text
from data_prep.geometry import Geometry
from data_prep.model_dir import ModelDirectory
from data_prep.records import CacheReader
from data_prep.rows import RejectedRow, Row, read_rows
from train.adapter import Adapter, attach_lora
from train.checkpoint import Checkpoint, Checkpoints, read_checkpoint
from train.config import Config, to_yaml
from train.denoiser import load_denoiser, resolve_zero_cond_t
from train.loggers import JsonLines, Loggers, Terminal
from train.loop import Every, train
from train.parallel import Parallel, Replicas, Zero, shard
from train.processes import Processes, check_launch
from train.provenance import provenance
from train.zero import check_settings, launched_settings, zero_settings

ENCODERS = ("vae", "text_encoder", "processor")
MAY_CHANGE = (
    *("name", "run_dir", "phases", "resume", "logger", "validate", "cache", "parallel"),
    *("data.on_error", "data.validation", "train.num_steps", "train.save_every", "train.validate_every"),
    *("train.log_every", "train.keep_last", "train.device", "train.micro_batch_size", "train.grad_accum_steps"),
)
"""What a continued run may do otherwise; the global batch, a product, is compared by itself."""


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


def read_split(config: Config) -> tuple[list[Row | RejectedRow], list[Row | RejectedRow]]:
    """Training and validation rows. Rejected rows of the one file count as training rows."""
    assert config.data.dataset is not None
    rows = list(read_rows(config.data.dataset, config.data.root))
    training = [row for row in rows if isinstance(row, RejectedRow) or row.split != "validation"]
    if config.data.validation:
        return training, list(read_rows(config.data.validation, config.data.root))
    return training, [row for row in rows if isinstance(row, Row) and row.split == "validation"]


def cache_phase(config: Config, model: ModelDirectory, geometry: Geometry, processes: Processes) -> None:
    """Phase 1. A finished cache is a no-op; the encoders are gone when it returns."""
    dtype = getattr(torch, config.model.dtype)

    def load_encoders() -> Encoders:
        device = processes.device
        return Encoders(load_vae(model, device, dtype), load_prompt_encoder(model, device, dtype))

    for split, rows in zip(("train", "validation"), read_split(config), strict=True):
        if not rows:
            continue
        summary = build_cache(
            rows,
            geometry,
            load_encoders,
            Path(config.cache.dir) / split,
            fingerprint=model.fingerprint(*ENCODERS),
            rejected_path=Path(config.run_dir)
            / ("rejected.jsonl" if split == "train" else "rejected_validation.jsonl"),
            batch_size=config.cache.batch_size,
            shard_size=config.cache.shard_size,
            workers=config.cache.workers,
            caption_dropout=split == "train" and config.data.caption_dropout > 0,
            negative=split == "validation",
            on_error=config.data.on_error,
            rank=processes.rank,
            world_size=processes.world_size,
            barrier=processes.barrier,
        )
        if processes.is_main:
            print(f"{split}: {summary}", file=sys.stderr, flush=True)


def train_phase(config: Config, model: ModelDirectory, geometry: Geometry, processes: Processes) -> None:
    """Phase 2. Every rank runs it; rank 0 speaks and writes."""
    run_dir, device, dtype = Path(config.run_dir), processes.device, getattr(torch, config.model.dtype)
    fingerprint = model.fingerprint(*ENCODERS)
    reader = CacheReader(Path(config.cache.dir) / "train", fingerprint=fingerprint, geometry=geometry)
    settings = config.train
    stream = BatchStream(
        reader,
        seed=config.seed,
        global_batch_size=settings.micro_batch_size * settings.grad_accum_steps * processes.world_size,
        micro_batch_size=settings.micro_batch_size,
        rank=processes.rank,
        world_size=processes.world_size,
        caption_dropout=config.data.caption_dropout,
    )
    decode = lazy_decode(model, device, dtype)
    loss = build_loss(config, decode)
    checkpoints = Checkpoints(
        run_dir / "checkpoints", settings.keep_last, adapter_metadata(config, loss, geometry), to_yaml(config), dtype
    )
    checkpoint = find_checkpoint(checkpoints, config.resume, processes)
    identity = {"data": data_identity(reader), "global_batch_size": stream.global_batch_size}
    if checkpoint:
        check_continuation(config, checkpoint.path, checkpoint.run, identity)
    first_step = checkpoint.step if checkpoint else 0
    if first_step >= settings.num_steps:
        say(processes, f"{run_dir} has its {settings.num_steps} steps: nothing to train")
        return

    adapter, parallel = build_model(config, model, processes)
    optimizer = build(config.optim, "optim", adapter.parameters(), num_steps=settings.num_steps)
    if checkpoint:
        checkpoint.restore(adapter, optimizer)
        say(processes, f"continuing from {checkpoint.path}")
    validate = build_validation(config, fingerprint, geometry, decode, processes)
    if processes.is_main:
        write_text(run_dir / "config.yaml", to_yaml(config))
    record = provenance(processes.world_size) | {"data": identity["data"], "cache": fingerprint}
    states = continued_states(checkpoint, checkpoints)
    loggers = build_loggers(config, first_step, record, states) if processes.is_main else Loggers({})
    with closing(stream), loggers:
        train(
            processes,
            parallel,
            adapter,
            loss,
            optimizer,
            stream,
            checkpoints,
            loggers,
            validate,
            Every(settings.save_every, settings.validate_every),
            first_step,
            settings.num_steps,
            config.seed,
            identity,
            settings.max_grad_norm,
        )


def continued_states(checkpoint: Checkpoint | None, checkpoints: Checkpoints) -> dict[str, Any]:
    """What the loggers were in the checkpoint, by name. A checkpoint of another run_dir begins a run of its own."""
    if checkpoint is None or checkpoint.path.resolve().parent != checkpoints.folder.resolve():
        return {}
    return checkpoint.run.get("loggers", {})


def say(processes: Processes, text: str) -> None:
    """Prints once, whatever the number of processes."""
    if processes.is_main:
        print(text, file=sys.stderr, flush=True)


def find_checkpoint(checkpoints: Checkpoints, resume: str, processes: Processes) -> Checkpoint | None:
    """What to continue from. Rank 0 chooses, so that a slow shared disk cannot make ranks choose differently.

    Raises:
        InputError: as `Checkpoints.find`; on another rank, that the checkpoint is not there.
    """
    found = checkpoints.find(resume) if processes.is_main else None
    chosen = processes.gather(found and found.path)[0]
    return found if processes.is_main or chosen is None else read_checkpoint(chosen)


def build_model(config: Config, model: ModelDirectory, processes: Processes) -> tuple[Adapter, Parallel]:
    """The denoiser with LoRA, spread as `parallel` says. Under ZeRO-3 no rank ever holds the whole transformer."""
    settings, spread, lora = config.train, config.parallel, config.adapter
    dtype, checkpointing = getattr(torch, config.model.dtype), settings.gradient_checkpointing == "full"
    zero = None
    if spread.strategy.startswith("zero"):
        zero = zero_settings(
            spread.stage,
            spread.offload,
            spread.bucket_size,
            spread.overlap_comm,
            spread.contiguous_gradients,
            settings.micro_batch_size,
            settings.grad_accum_steps,
            launched_settings(os.environ),
        )
    place = shard(zero, processes) if zero and spread.stage == 3 else None
    denoiser = load_denoiser(model, processes.device, dtype, config.model.zero_cond_t, checkpointing, place)
    adapter = attach_lora(
        denoiser, lora.rank, lora.alpha or lora.rank, lora.target_modules, lora.rslora, lora.dora, config.seed
    )
    if zero:
        return adapter, Zero(denoiser, adapter, processes, zero, spread.offload)
    return adapter, Replicas(denoiser, adapter, processes, settings.grad_accum_steps)


def lazy_decode(model: ModelDirectory, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The VAE's decoder, loaded when it is first used."""

    @functools.cache
    def vae():
        return load_vae(model, device, dtype)

    return lambda latents: vae().decode(latents)


def build_loss(config: Config, decode: Callable[[Tensor], Tensor]) -> Any:
    """The loss; it is given the decoder if it has pixel terms."""
    return build(config.loss, "loss", **({"decode": decode} if config.loss.get("pixel") else {}))


def build_validation(
    config: Config,
    fingerprint: str,
    geometry: Geometry,
    decode: Callable[[Tensor], Tensor],
    processes: Processes,
) -> Any:
    """The validation, or None when there is none or no row to validate on."""
    if not config.validate:
        return None
    if not read_split(config)[1]:
        say(processes, "no validation: data.validation is not set and no row has split=validation")
        return None
    reader = CacheReader(Path(config.cache.dir) / "validation", fingerprint=fingerprint, geometry=geometry)
    folder = Path(config.run_dir) / "validation"
    return build(config.validate, "validate", reader=reader, decode=decode, folder=folder, processes=processes)


def build_loggers(config: Config, first_step: int, record: dict[str, Any], states: dict[str, Any]) -> Loggers:
    """metrics.jsonl, the terminal, and those of the configuration."""
    run_dir = Path(config.run_dir)
    metrics = run_dir / "metrics.jsonl"
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


def adapter_metadata(config: Config, loss: Any, geometry: Geometry) -> dict[str, str]:
    """What an exported adapter says of itself."""
    return {
        "base_model": config.model.path,
        "objective": loss.objective,
        "sigma_convention": "1 = start (source, white or noise), 0 = target",
        "loss": json.dumps(config.loss),
        "geometry": json.dumps(asdict(geometry)),
        "config_hash": hashlib.sha256(to_yaml(config).encode()).hexdigest()[:16],
    }


def data_identity(reader: CacheReader) -> str:
    """A hash of the records and their order."""
    digest = hashlib.blake2b(digest_size=8)
    for bucket, indices in sorted(reader.buckets.items()):
        digest.update(f"{bucket}{indices}".encode())
    for key in reader.keys:
        digest.update(key.encode())
    return digest.hexdigest()


def check_continuation(config: Config, checkpoint: Path, saved: dict[str, Any], identity: dict[str, Any]) -> None:
    """Refuses to continue a run whose settings or data have changed in what its steps depend on.

    Raises:
        InputError: names the keys that differ.
    """
    before = _flat(OmegaConf.to_container(OmegaConf.load(checkpoint / "config.yaml")))
    now = _flat(asdict(config))
    differing = [
        key
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not any(key == free or key.startswith(f"{free}.") for free in MAY_CHANGE)
    ]
    if not differing and saved["global_batch_size"] != identity["global_batch_size"]:
        differing = [f"a global batch of {saved['global_batch_size']} and not {identity['global_batch_size']}"]
    if not differing and saved["data"] != identity["data"]:
        differing = ["the training data"]
    if differing:
        raise InputError(
            f"{checkpoint} was made with other settings ({', '.join(differing[:4])}): give the same command to continue, "
            "or another run_dir to start anew"
        )


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix.rstrip("."): values}
    return {key: value for name, child in values.items() for key, value in _flat(child, f"{prefix}{name}.").items()}


def check_nodes(config: Config, model: ModelDirectory) -> None:
    """Builds what is cheap to build, so that a wrong argument is found before an hour of caching."""
    build_loss(config, lambda latents: latents)
    build(config.optim, "optim", [nn.Parameter(torch.zeros(1))], num_steps=config.train.num_steps)
    resolve_zero_cond_t(config.model.zero_cond_t, model)
    spread = config.parallel
    check_launch(spread.strategy, config.model.dtype, "train" in config.phases, os.environ)
    launched = launched_settings(os.environ)
    if launched:
        check_settings(
            launched, spread.stage, spread.offload, config.train.grad_accum_steps, config.train.max_grad_norm
        )


def run(config: Config) -> None:
    """All phases.

    Raises:
        InputError: the configuration or the input is wrong.
    """
    model = ModelDirectory.resolve(config.model.path)
    geometry = Geometry(config.data.max_pixels, config.data.vision_pixels, config.data.reference_pixels)
    check_nodes(config, model)
    processes = Processes.start(config.train.device)
    if "cache" in config.phases:
        cache_phase(config, model, geometry, processes)
    if "train" in config.phases:
        train_phase(config, model, geometry, processes)
    processes.stop()
