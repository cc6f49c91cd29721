"""DeepSpeed's configuration: ours, and what the user gave to `accelerate launch`."""

from collections.abc import Mapping
from typing import Any

from accelerate import DeepSpeedPlugin

from data_prep.errors import InputError

OURS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
"""Keys of a user's configuration that follow from this project's."""


def zero_settings(
    stage: int,
    offload: bool,
    bucket_size: int,
    overlap_comm: bool,
    contiguous_gradients: bool,
    options: dict[str, Any],
    micro_batch_size: int,
    grad_accum_steps: int,
    launched: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """DeepSpeed's configuration for frozen weights in any dtype and float32 LoRA.

    No precision section: DeepSpeed then leaves every parameter in its own dtype. No clipping key: its "auto" means 1.0.
    `memory_efficient_linear` would replace torch's linear function and so the last bits of the forward pass.

    Args:
        stage: 2 or 3.
        offload: frozen weights in CPU memory.
        bucket_size: elements per communication.
        overlap_comm, contiguous_gradients: DeepSpeed's options of these names.
        options: further keys of `zero_optimization`.
        micro_batch_size, grad_accum_steps: of the run.
        launched: the user's own settings, from `launched_settings`; where they differ, they win.
    """
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": bucket_size,
        "overlap_comm": overlap_comm,
        "contiguous_gradients": contiguous_gradients,
    }
    if stage == 2:
        zero |= {"allgather_bucket_size": bucket_size}
    else:
        zero |= {"stage3_prefetch_bucket_size": bucket_size, "memory_efficient_linear": False}
    if offload:
        zero |= {"offload_param": {"device": "cpu", "pin_memory": True}}
    given = launched or {}
    zero |= options | given.get("zero_optimization", {})
    zero.pop("offload_optimizer", None)  # the optimizer is ours, on the masters
    return {
        **{key: value for key, value in given.items() if key not in OURS},
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": grad_accum_steps,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": float("inf"),
    }


def launched_settings(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """DeepSpeed's configuration from an accelerate file or `--use_deepspeed` flags, without "auto"; None without such.

    Raises:
        InputError: accelerate cannot read it.
    """
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return None
    try:
        plugin = DeepSpeedPlugin()
    except (ValueError, OSError) as error:
        raise InputError(
            f"accelerate's DeepSpeed configuration cannot be used: {str(error).splitlines()[0]}"
        ) from error
    return _without_auto(plugin.deepspeed_config)


def check_settings(
    launched: dict[str, Any],
    stage: int,
    offload: bool,
    micro_batch_size: int,
    grad_accum_steps: int,
    world_size: int,
    max_grad_norm: float | None,
) -> None:
    """Refuses settings of accelerate that contradict the configuration.

    Args:
        launched: from `launched_settings`.
        stage, offload: of `parallel`.
        micro_batch_size, grad_accum_steps, max_grad_norm: of `train`.
        world_size: processes.

    Raises:
        InputError: names both sides and the way out.
    """
    zero = launched.get("zero_optimization", {})
    parallel = f"parallel=zero{stage}" + ("_offload" if offload else "")
    weights, optimizer = (zero.get(f"offload_{part}", {}).get("device", "none") for part in ("param", "optimizer"))
    accumulation, clipping = launched.get("gradient_accumulation_steps", 1), launched.get("gradient_clipping")
    micro = launched.get("train_micro_batch_size_per_gpu", micro_batch_size)
    batch, own_batch = launched.get("train_batch_size"), micro_batch_size * grad_accum_steps * world_size
    precision = [name for name in ("fp16", "bf16") if launched.get(name, {}).get("enabled")]
    owned = [name for name in ("optimizer", "scheduler") if name in launched]
    fits_offload = (weights, optimizer) in ((("cpu", "none"), ("cpu", "cpu")) if offload else (("none", "none"),))
    contradictions = [
        (zero.get("stage", stage) != stage, f"ZeRO stage {zero.get('stage')}", parallel, "choose one of them"),
        (
            not fits_offload,
            f"offload_param {weights} and offload_optimizer {optimizer}",
            parallel,
            "use parallel=zero3_offload with cpu, or parallel=zero3 with none",
        ),
        (
            micro != micro_batch_size,
            f"train_micro_batch_size_per_gpu {micro}",
            f"train.micro_batch_size={micro_batch_size}",
            "leave it to train.micro_batch_size",
        ),
        (
            batch not in (None, own_batch),
            f"train_batch_size {batch}",
            f"train.micro_batch_size x train.grad_accum_steps x processes is {own_batch}",
            "leave it to train",
        ),
        (
            accumulation not in (1, grad_accum_steps),
            f"gradient_accumulation_steps {accumulation}",
            f"train.grad_accum_steps={grad_accum_steps}",
            "leave it to train.grad_accum_steps",
        ),
        (
            clipping not in (None, 0, max_grad_norm),
            f"gradient_clipping {clipping}",
            f"train.max_grad_norm={'null' if max_grad_norm is None else max_grad_norm}",
            "set train.max_grad_norm instead, and never clip with Prodigy",
        ),
        (precision, f"{', '.join(precision)} section", "model.dtype decides the precision", "remove the section"),
        (owned, f"{', '.join(owned)} section", "optim= decides that", "remove the section"),
    ]
    for wrong, theirs, ours, way_out in contradictions:
        if wrong:
            raise InputError(f"accelerate was launched with DeepSpeed's {theirs}, but {ours}: {way_out}")


def _without_auto(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_auto(each) for key, each in value.items() if each not in ("auto", None)}
