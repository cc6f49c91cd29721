"""Adapters for the tests of everything that uses one, without training."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from data_prep.model.directory import ModelDirectory
from data_prep.model.geometry import Geometry
from eval.qwen.weights.adapters import added_up, put_beside
from eval.qwen.weights.fusing import FusedAdapters
from eval.request.knobs import AdapterUse
from train.model.adapter import attach_lora
from train.model.denoiser import Denoiser, load_denoiser


def use_adapters(denoiser: Denoiser, adapters: Sequence[AdapterUse]) -> None:
    """Puts adapters beside a denoiser's weights, in place of those that stand there."""
    put_beside(denoiser, added_up(denoiser.dit, adapters))


def fuse_adapters(denoiser: Denoiser, adapters: Sequence[AdapterUse]) -> None:
    """Puts adapters into the weights of a denoiser that has none."""
    FusedAdapters(denoiser, lambda names: None).use(added_up(denoiser.dit, adapters))


def write_adapter(folder: Path, model_dir: Path, objective: str, geometry: Geometry, **loss: object) -> Path:
    """An adapter that changes what the tiny model does, with the metadata that training writes. Returns the folder.

    Args:
        loss: its arguments; `sigmas`, if given, are those that it was trained at.
    """
    sigmas = {"sigmas": json.dumps(loss.pop("sigmas"))} if "sigmas" in loss else {}
    denoiser = load_denoiser(ModelDirectory.resolve(model_dir), dtype=torch.float32)
    adapter = attach_lora(denoiser, 4, 4, ["to_q", "img_in", "proj_out"])
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapter.named_parameters().items():
        if ".lora_B." in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    metadata = {"objective": objective, "loss": json.dumps(loss), "geometry": json.dumps(asdict(geometry)), **sigmas}
    adapter.export(folder, metadata)
    return folder
