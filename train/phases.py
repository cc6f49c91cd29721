"""The phases of a run: planning, caching, training. What `train/run.py` does once the configuration is known."""

import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_prep.cache.batches import BatchStream
from data_prep.cache.encoding import Encoders
from data_prep.cache.reader import CacheReader
from data_prep.cache.writer import build_cache
from data_prep.files import write_text
from data_prep.model.directory import ModelDirectory
from data_prep.model.encoders import load_prompt_encoder, load_vae
from data_prep.model.geometry import Geometry
from data_prep.rows.rows import RejectedRow, Row, read_rows
from train.builders import (
    adapter_metadata,
    build,
    build_loggers,
    build_loss,
    build_model,
    build_validation,
    check_nodes,
    lazy_decode,
)
from train.config import Config, to_yaml
from train.loop import Every, train
from train.parallel.processes import Processes
from train.plan.gpus import find_gpu
from train.plan.plan import Plan, dataset_sizes, make_plan
from train.plan.planner import apply, geometry_of
from train.record.checkpoint import Checkpoints
from train.record.loggers import Loggers
from train.record.provenance import provenance
from train.record.resume import check_continuation, continued_states, find_checkpoint, run_identity
from train.record.run_files import CHECKPOINTS

ENCODERS = ("vae", "text_encoder", "processor")


def read_split(config: Config) -> tuple[list[Row | RejectedRow], list[Row | RejectedRow]]:
    """Training and validation rows; rows of other splits are neither. Rejected rows of the one file count as training rows."""
    assert config.data.dataset is not None
    rows = list(read_rows(config.data.dataset, config.data.root))
    training = [row for row in rows if isinstance(row, RejectedRow) or row.split == "train"]
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
        processes.say(f"{split}: {summary}")


def plan_run(config: Config, model: ModelDirectory, world_size: int) -> Plan:
    """What the run will need, from sizes alone: nothing is loaded."""

    def build_optimizer(node: dict[str, Any], parameters: list[nn.Parameter]) -> Any:
        return build(node, "optim", parameters, num_steps=config.train.num_steps)

    gpu = find_gpu(config.plan.gpu)
    return make_plan(
        config, model, dataset_sizes(config, model), config.plan.world_size or world_size, gpu, build_optimizer
    )


def train_phase(
    config: Config, model: ModelDirectory, geometry: Geometry, processes: Processes, plan: Plan | None
) -> None:
    """Phase 2. Every rank runs it; rank 0 speaks and writes, and has the plan."""
    run_dir, device, dtype = Path(config.run_dir), processes.device, getattr(torch, config.model.dtype)
    fingerprint = model.fingerprint(*ENCODERS)
    reader = CacheReader(Path(config.cache.dir) / "train", fingerprint=fingerprint, geometry=geometry)
    settings = config.train
    accumulation = settings.accumulation(processes.world_size)
    stream = BatchStream(
        reader,
        seed=config.seed,
        global_batch_size=settings.micro_batch_size * accumulation * processes.world_size,
        micro_batch_size=settings.micro_batch_size,
        group_size=settings.group_size,
        rank=processes.rank,
        world_size=processes.world_size,
        caption_dropout=config.data.caption_dropout,
    )
    processes.say(f"batches: {stream}")
    decode = lazy_decode(model, device, dtype)
    loss = build_loss(config, decode)
    checkpoints = Checkpoints(
        run_dir / CHECKPOINTS, settings.keep_last, adapter_metadata(config, loss, geometry), to_yaml(config), dtype
    )
    checkpoint = find_checkpoint(checkpoints, config.resume, processes)
    identity = run_identity(stream)
    if checkpoint:
        check_continuation(config, checkpoint.path, checkpoint.run, identity)
    first_step = checkpoint.step if checkpoint else 0
    if first_step >= settings.num_steps:
        processes.say(f"{run_dir} has its {settings.num_steps} steps: nothing to train")
        return

    decided = processes.gather(plan and plan.decided)[0]
    adapter, parallel = build_model(apply(config, decided), model, processes)
    optimizer = build(config.optim, "optim", adapter.parameters(), num_steps=settings.num_steps)
    if checkpoint:
        checkpoint.restore(adapter, optimizer)
        processes.say(f"continuing from {checkpoint.path}")
    validate = None
    if config.validate and read_split(config)[1]:
        held_out = CacheReader(Path(config.cache.dir) / "validation", fingerprint=fingerprint, geometry=geometry)
        validate = build_validation(config, held_out, decode, processes)
    elif config.validate:
        processes.say("no validation: data.validation is not set and no row has split=validation")
    if processes.is_main:
        write_text(run_dir / "config.yaml", to_yaml(config))
    record = provenance(processes.world_size) | {"data": identity["data"], "cache": fingerprint}
    states = continued_states(checkpoint, checkpoints)
    checkpoint = None  # its tensors are in the optimizer now
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
            identity,
            settings.max_grad_norm,
        )


def run(config: Config) -> None:
    """All phases.

    Raises:
        InputError: the configuration or the input is wrong.
    """
    model = ModelDirectory.resolve(config.model.path, weights=config.phases != ["plan"])
    geometry = geometry_of(config)
    check_nodes(config, model)
    processes = Processes.start(config.train.device)
    plan = None
    if processes.is_main and config.phases != ["cache"]:
        plan = plan_run(config, model, processes.world_size)
        print(plan.render(), file=sys.stdout if config.phases == ["plan"] else sys.stderr, flush=True)
    if "cache" in config.phases:
        cache_phase(config, model, geometry, processes)
    if "train" in config.phases:
        if torch.cuda.is_available():  # what phase 1 needed is free again
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        train_phase(config, model, geometry, processes, plan)
    processes.stop()
