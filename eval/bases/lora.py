"""LoRA adapters of diffusers' pipelines: those that a request names, and no others."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open

from data_prep.errors import InputError
from eval.bases.loading import first_line
from eval.request.knobs import AdapterUse
from eval.request.metadata import read_metadata
from train.model.adapter_files import adapter_file

ONE_PER_MODULE = (".lora_A.weight", ".lora_down.weight", ".lora.down.weight")
"""How the names of the first matrices end: PEFT's and diffusers', kohya's, and diffusers' older one."""


def check_adapter(path: Path, base: str) -> None:
    """Reads the header alone.

    Raises:
        InputError: there is no such file, it is no LoRA, or it was trained here, and so for another base model.
    """
    file = adapter_file(path)
    if "objective" in read_metadata(file):
        raise InputError(f"{file} is an adapter for qwen-image-edit, but the base model is {base}: leave it out")
    if not _num_modules(file):
        raise InputError(f"{file} is not a LoRA adapter: no tensor's name ends in {' or '.join(ONE_PER_MODULE)}")


def use_adapters(pipeline: DiffusionPipeline, adapters: Sequence[AdapterUse], base: str) -> None:
    """Replaces whatever adapters the pipeline has by these, added up with their weights.

    Raises:
        InputError: one is not for this base model; the pipeline has none then.
    """
    pipeline.unload_lora_weights()
    names = [f"adapter_{number}" for number in range(len(adapters))]
    try:
        for name, use in zip(names, adapters, strict=True):
            _load(pipeline, adapter_file(use.path), name, base)
    except InputError:
        pipeline.unload_lora_weights()
        raise
    if names:
        pipeline.set_adapters(names, [use.weight for use in adapters])


def _load(pipeline: DiffusionPipeline, file: Path, name: str, base: str) -> None:
    expected = _num_modules(file)
    try:
        with _quiet():
            pipeline.load_lora_weights(file, adapter_name=name)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"{file} is not an adapter for {base}: {first_line(error)}") from error
    touched = _num_touched(pipeline, name)
    if touched < expected:  # diffusers only logs what it leaves out; it may split one module of a file into several
        raise InputError(
            f"{file} is not an adapter for {base}: only {touched} of its {expected} modules are in this model"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """diffusers logs, and PEFT warns, of what is meant (several adapters, none for a text encoder) or is said here better."""
    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
            yield
    finally:
        diffusers_logging.set_verbosity(before)


def _num_touched(pipeline: DiffusionPipeline, name: str) -> int:
    models = [each for each in pipeline.components.values() if isinstance(each, torch.nn.Module)]
    layers = [layer for model in models for layer in model.modules() if isinstance(layer, LoraLayer)]
    return sum(name in layer.lora_A for layer in layers)


def _num_modules(file: Path) -> int:
    """The number of modules that an adapter's file changes, from its header."""
    try:
        with safe_open(file, framework="pt") as opened:
            return sum(name.endswith(ONE_PER_MODULE) for name in opened.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{file} is not a readable safetensors file ({error})") from error
