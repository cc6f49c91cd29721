"""The phases of a run: planning, caching, training. What `train/run.py` does once the configuration is known."""

import functools
import os
import shlex
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.cache.batches import BatchStream, checked_group_size
from data_prep.cache.encoding import Encoders
from data_prep.cache.index import CacheHeader, DatasetDigest
from data_prep.cache.keys import check_files
from data_prep.cache.reader import CacheReader
from data_prep.cache.writer import build_cache
from data_prep.errors import InputError
from data_prep.files import write_text
from data_prep.model.directory import ModelDirectory
from data_prep.model.editions import FIRST, PLUS
from data_prep.model.encoders import load_prompt_encoder, load_vae
from data_prep.model.geometry import Geometry
from data_prep.rows.rows import RejectedRow, Row
from train.builders import (
    adapter_metadata,
    build_checkpoints,
    build_loggers,
    build_loss,
    build_model,
    build_optimizer,
    build_validation,
    check_nodes,
    lazy_decode,
)
from train.config import Config, to_yaml
from train.config.training_rows import configured_rows, dataset_names, preserved_prompts, validation_rows
from train.loop import Intervals, Training, train
from train.model.adapter import Adapter
from train.optim import Optimizer
from train.parallel.processes import Processes
from train.parallel.stopping import StopRequest
from train.parallel.strategies import Parallel
from train.plan.gpus import find_gpu
from train.plan.plan import Plan, dataset_sizes, make_plan
from train.plan.planner import apply, geometry_of
from train.record.checkpoint import Checkpoint, read_run
from train.record.lock import locked
from train.record.loggers import STOPPED, Loggers
from train.record.provenance import provenance
from train.record.resume import (
    check_identity,
    check_keys,
    check_settings,
    continued_states,
    find_checkpoint,
    newest_checkpoint,
    run_identity,
)
from train.record.run_files import CHECKPOINTS
from train.record.what_next import what_next

ENCODERS = ("vae", "text_encoder", "processor")


def read_split(
    config: Config, say: Callable[[str], None] = lambda text: None
) -> tuple[list[Row | RejectedRow], list[Row | RejectedRow]]:
    """Training and validation rows; rows of other splits are neither, nor are held-out ones without a source, of which there is
    nothing to edit: `say` is told of them. Rejected rows of the datasets count as training rows."""
    rows = list(configured_rows(config))
    training = [row for row in rows if isinstance(row, RejectedRow) or row.split == "train"]
    if config.data.validation:
        held_out = list(validation_rows(config))
    else:
        held_out = [row for row in rows if isinstance(row, Row) and row.split == "validation"]
    kept = [row for row in held_out if isinstance(row, RejectedRow) or row.edit_image]
    if len(kept) < len(held_out):
        say(
            f"validation: {len(held_out) - len(kept)} rows without edit_image are left out, because they have no image to edit"
        )
    return training, kept


def dataset_digests(config: Config) -> tuple[str, str | None]:
    """Which datasets the training and the validation rows of `read_split` are, for the cache; None for no held-out rows."""
    training, held_out = DatasetDigest(), DatasetDigest()
    for row in configured_rows(config):
        if isinstance(row, Row) and row.split == "train":
            training.add(row)
        elif isinstance(row, Row) and row.split == "validation" and row.edit_image and not config.data.validation:
            held_out.add(row)
    if config.data.validation:
        held_out = DatasetDigest(row for row in validation_rows(config) if isinstance(row, Row) and row.edit_image)
    return str(training), str(held_out) if held_out.num_rows else None


def cache_phase(
    config: Config, model: ModelDirectory, geometry: Geometry, processes: Processes, continued: Path | None = None
) -> None:
    """Phase 1. A finished cache is a no-op; the encoders are gone when it returns.

    Args:
        continued: the checkpoint that phase 2 will continue from.

    Raises:
        InputError: a row cannot be used, or the checkpoint was trained on other rows.
    """
    dtype, fingerprint = getattr(torch, config.model.dtype), model.fingerprint(*ENCODERS)

    def load_encoders() -> Encoders:
        device = processes.device
        return Encoders(load_vae(model, device, dtype), load_prompt_encoder(model, device, dtype))

    def same_rows(keys: Sequence[str]) -> None:
        if continued:
            check_keys(continued, read_run(continued), keys)

    job = processes.gather(uuid.uuid4().hex)[0]
    for split, rows in zip(("train", "validation"), read_split(config, processes.say), strict=True):
        if not rows:
            continue
        summary = build_cache(
            rows,
            CacheHeader(
                fingerprint,
                geometry,
                encoder_dtype=config.model.dtype,
                caption_dropout=split == "train" and config.data.caption_dropout > 0,
                negative=split == "validation",
                preserve=preserved_prompts(config) if split == "train" else (),
            ),
            load_encoders,
            config.cache.dir,
            name=f"{(split == 'validation' and config.data.validation) or dataset_names(config)} ({split})",
            rejected_path=Path(config.run_dir)
            / ("rejected.jsonl" if split == "train" else "rejected_validation.jsonl"),
            batch_size=config.cache.batch_size,
            shard_size=config.cache.shard_size,
            workers=config.cache.workers,
            on_error=config.data.on_error,
            rank=processes.rank,
            world_size=processes.world_size,
            barrier=processes.barrier,
            job=f"{job}-{split}",
            check_keys=same_rows if split == "train" else lambda keys: None,
        )
        weighted = split == "train" and any(each.weight for each in config.data.datasets)
        lost = rejected_share(rows, summary.rejected) if weighted else 0.0
        of_draws = (
            f"; the rejected rows had {lost:.3g} of the draws, which are now divided among all others" if lost else ""
        )
        processes.say(f"{split}: {summary}{of_draws}")


def rejected_share(rows: Sequence[Row | RejectedRow], rejected: Sequence[RejectedRow]) -> float:
    """How much of the draws was to be of rows that caching rejected, in [0, 1]: datasets' weights count them, for they are shared
    out before a picture is read. A row that its file already rejects has no part in them."""
    ids = {row.id for row in rejected}
    weights = {row.id: row.weight for row in rows if isinstance(row, Row)}
    return sum(weight for id, weight in weights.items() if id in ids) / sum(weights.values())


def plan_run(config: Config, model: ModelDirectory, world_size: int) -> Plan:
    """What the run will need, from sizes alone: nothing is loaded."""
    gpu, planned = find_gpu(config.plan.gpu), config.plan.world_size or world_size
    optimizer = functools.partial(build_optimizer, settings=config.train)
    return make_plan(config, model, dataset_sizes(config, model), planned, gpu, optimizer)


def train_phase(
    config: Config,
    model: ModelDirectory,
    geometry: Geometry,
    processes: Processes,
    plan: Plan | None,
    request: StopRequest | None = None,
) -> int:
    """Phase 2. Every rank runs it; rank 0 speaks and writes, and has the plan.

    Args:
        request: made before, so that a launcher that has gone meanwhile is missed.

    Returns:
        The exit code: 0 if the training is complete, 1 if something beside it failed, else what `StopRequest` says.
    """
    run_dir, dtype = Path(config.run_dir), getattr(torch, config.model.dtype)
    training, held_out = processes.gather(dataset_digests(config) if processes.is_main else None)[0]
    fingerprint = model.fingerprint(*ENCODERS)
    stream = open_stream(config, training, fingerprint, geometry, processes)
    decode = lazy_decode(model, processes.device, dtype)
    loss = build_loss(config, decode)
    checkpoints = build_checkpoints(config, adapter_metadata(config, loss, geometry, model.edition))
    checkpoint = find_checkpoint(checkpoints, config.resume, processes)
    identity = run_identity(stream) | {"model": model.fingerprint("transformer")}
    if checkpoint:
        check_settings(config, checkpoint.path)
        check_identity(checkpoint.path, checkpoint.run, identity)
    first_step = checkpoint.step if checkpoint else 0
    if first_step >= config.train.num_steps:
        processes.say(f"{run_dir} already has all {config.train.num_steps} steps: nothing is left to train")
        return 0

    # whatever may fail in a second comes before the weights are read
    validate = held_out_validation(config, held_out, fingerprint, geometry, decode, processes)
    if processes.is_main:
        write_text(run_dir / "config.yaml", to_yaml(config))
    record = provenance(processes.world_size) | {"data": identity["data"], "cache": fingerprint}
    states = continued_states(checkpoint, checkpoints)
    loggers = build_loggers(config, first_step, record, states) if processes.is_main else Loggers({})
    with request or StopRequest() as request, closing(stream), loggers:
        decided = processes.gather(plan and plan.decided)[0]
        adapter, parallel, optimizer = build_trained(config, decided, model, processes, checkpoint)
        checkpoint = None  # its tensors are in the optimizer now
        run = Training(
            processes,
            parallel,
            adapter,
            loss,
            optimizer,
            stream,
            checkpoints,
            loggers,
            validate,
            Intervals(config.train.save_every, config.train.validate_every, config.train.save_minutes),
            config.train.num_steps,
            identity,
            lambda: bool(request.reason),
            step=first_step,
            saved=first_step,
        )
        try:
            complete = train(run)
            loggers.exit_code = 0 if complete else STOPPED
        except Exception as error:
            error.add_note(f"This was in {where(run, run_dir)}")
            raise
    if not complete:
        processes.say(
            f"stopped by {request.reason or 'another rank'} after step {run.step}: {to_continue(run, run_dir)}"
        )
        return request.exit_code
    processes.say(what_next(config, run.checkpoints.folder, run.step, held_out is not None))
    for problem in loggers.problems:
        processes.say(f"the training is complete, but {problem}")
    return 1 if loggers.problems else 0


def open_stream(
    config: Config, dataset: str, fingerprint: str, geometry: Geometry, processes: Processes
) -> BatchStream:
    """The batches of the training rows, from the cache.

    Args:
        dataset: the digest of the training rows.
        fingerprint: of the model's encoders.

    Raises:
        InputError: the cache does not hold them as configured; or their files changed since, where no phase looked.
    """
    reader = CacheReader(
        config.cache.dir,
        dataset,
        fingerprint=fingerprint,
        geometry=geometry,
        caption_dropout=config.data.caption_dropout > 0,
        encoder_dtype=config.model.dtype,
        preserve=preserved_prompts(config),
    )
    if processes.is_main and "cache" not in config.phases:
        check_files(reader, config.cache.workers)
    stream = BatchStream(
        reader,
        seed=config.seed,
        global_batch_size=global_batch_size(config, processes.world_size),
        micro_batch_size=config.train.micro_batch_size,
        group_size=config.train.group_size,
        rank=processes.rank,
        world_size=processes.world_size,
        caption_dropout=config.data.caption_dropout,
        preserve=preserved_prompts(config),
    )
    processes.say(f"batches: {stream}")
    return stream


def build_trained(
    config: Config,
    decided: dict[str, Any],
    model: ModelDirectory,
    processes: Processes,
    checkpoint: Checkpoint | None,
) -> tuple[Adapter, Parallel, Optimizer]:
    """The adapter on its model and the optimizer of its weights, as the checkpoint has them, if there is one.

    Args:
        decided: what the plan chose for the settings that are `auto`.
    """
    if (decided["parallel.strategy"], config.parallel.strategy) == ("single", "zero3"):
        processes.say("parallel=zero3 has nothing to shard on one process: training as parallel=single")
    start = {"adapter.init_from": None} if checkpoint else {}
    adapter, parallel = build_model(apply(config, decided | start), model, processes)
    optimizer = build_optimizer(config.optim, adapter.parameters(), config.train)
    if checkpoint:
        checkpoint.restore(adapter, optimizer)
        processes.say(f"resuming from {checkpoint.path}")
    return adapter, parallel, optimizer


def global_batch_size(config: Config, world_size: int) -> int:
    """Samples per optimizer step over all processes."""
    return config.train.micro_batch_size * config.train.accumulation(world_size) * world_size


def known_identity(config: Config, model: ModelDirectory, world_size: int) -> dict[str, Any]:
    """What is known of `run_identity` before anything is cached."""
    settings, together = config.train, global_batch_size(config, world_size)
    group_size = checked_group_size(settings.group_size, settings.micro_batch_size, together)
    return {"model": model.fingerprint("transformer"), "global_batch_size": together, "group_size": group_size}


def held_out_validation(
    config: Config,
    dataset: str | None,
    fingerprint: str,
    geometry: Geometry,
    decode: Callable[[Tensor], Tensor],
    processes: Processes,
) -> Any:
    """The validation, or None where there is none or nothing to validate on."""
    if not config.validate:
        return None
    if dataset is None:
        processes.say(
            f"no validation: data.validation is not set, and no row with a source has split=validation{other_splits(config)}"
        )
        return None
    held_out = CacheReader(
        config.cache.dir,
        dataset,
        fingerprint=fingerprint,
        geometry=geometry,
        negative=True,
        encoder_dtype=config.model.dtype,
    )
    if processes.is_main and "cache" not in config.phases:
        check_files(held_out, config.cache.workers)
    return build_validation(config, held_out, decode, processes)


def other_splits(config: Config) -> str:
    """How many rows are for neither training nor validation, and what their splits are called."""
    found = Counter(row.split for row in configured_rows(config) if isinstance(row, Row))
    others = ", ".join(f"{found[name]} have split={name}" for name in found if name not in ("train", "validation"))
    return f" ({others}, which is not used: is it meant for validation?)" if others else ""


def where(run: Training, run_dir: Path) -> str:
    """The step, its records, and how to go on, for whoever reads of a failure."""
    records = ", ".join(run.ids[:8]) + (f" and {len(run.ids) - 8} more" if len(run.ids) > 8 else "")
    return f"step {run.step + 1} with the records {records or '(none yet)'}: {to_continue(run, run_dir)}"


def to_continue(run: Training, run_dir: Path) -> str:
    """From what, and with which command."""
    start = f"from {run_dir / CHECKPOINTS}/step-{run.saved:06d}" if run.saved else "from the beginning"
    launcher = "accelerate launch" if "ACCELERATE_MIXED_PRECISION" in os.environ else "python"
    return f"the same command resumes {start}: {launcher} {shlex.join(sys.argv)}"


def check_folder(key: str, folder: Path) -> None:
    """Raises `InputError` if the folder neither exists nor can be made, before anything that takes long."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"{key}={folder} cannot be a folder, because {there} is a file: choose another")
    if not os.access(there, os.W_OK):
        raise InputError(f"{key}={folder} cannot be written, because you may not write to {there}: choose another")


def run(config: Config) -> int:
    """All phases.

    Returns:
        The exit code.

    Raises:
        InputError: the configuration or the input is wrong.
    """
    request = StopRequest()  # here, where the launcher certainly lives
    if config.phases != ["plan"]:
        check_folder("run_dir", Path(config.run_dir))
    if "cache" in config.phases:
        check_folder("cache.dir", Path(config.cache.dir))
    model = ModelDirectory.resolve(config.model.path, weights=config.phases != ["plan"])
    geometry = geometry_of(config)
    check_nodes(config, model)
    newest = newest_checkpoint(config) if "train" in config.phases else None
    if newest:
        check_settings(config, newest)  # before an hour of caching
    processes = Processes.start(config.train.device)
    if model.edition is FIRST and config.data.vision_pixels == PLUS.vision_pixels:
        processes.say(
            f"note: {FIRST.pipeline} was trained with images of {FIRST.vision_pixels} pixels for the text encoder, and "
            f"data.vision_pixels={PLUS.vision_pixels} is for 2509 and 2511: set data.vision_pixels={FIRST.vision_pixels}"
        )
    if newest:
        check_identity(newest, read_run(newest), known_identity(config, model, processes.world_size))
    plan = None
    if processes.is_main and config.phases != ["cache"]:
        plan = plan_run(config, model, processes.world_size)
        print(plan.render(), file=sys.stdout if config.phases == ["plan"] else sys.stderr, flush=True)
        if config.phases == ["plan"] and not plan.fits:
            raise InputError(
                f"{config.name} does not fit {plan.gpu.name}: use one of the settings that the plan suggests"
            )
    exit_code = 0
    with locked(Path(config.run_dir)) if "train" in config.phases and processes.is_main else nullcontext():
        if "cache" in config.phases:
            cache_phase(config, model, geometry, processes, newest)
        if "train" in config.phases and processes.any(bool(request.reason)):
            processes.say(
                f"stopped by {request.reason or 'another rank'} after caching: run the same command again to train"
            )
            exit_code = request.exit_code
        elif "train" in config.phases:
            if torch.cuda.is_available():  # what phase 1 needed is free again
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            exit_code = train_phase(config, model, geometry, processes, plan, request)
    processes.stop()
    return exit_code
