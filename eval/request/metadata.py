"""What an adapter says of itself, and so how it must be sampled."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from data_prep.errors import InputError
from data_prep.model.geometry import Geometry
from data_prep.rows.images import file_digest
from eval.qwen.samplers import BridgeSampler, FlowSampler, Sampler
from eval.request.request import AdapterUse
from train.model.adapter_files import WEIGHTS_FILE

FLOW_CFG_SCALE, FLOW_STEPS = 4.0, 40
"""As Qwen-Image-Edit is meant to be sampled."""
BRIDGE_STEPS = 4
AdapterState = tuple[tuple[Path, int, int, float], ...]
"""Resolved file, time of writing, bytes and weight of each adapter."""
DEFAULT_GEOMETRY = Geometry(max_pixels=1024 * 1024)


def adapter_file(path: Path) -> Path:
    """The safetensors file of a checkpoint folder, or the file itself.

    Raises:
        InputError: there is none.
    """
    file = path / WEIGHTS_FILE if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"no adapter at {file}: give a checkpoint folder or its {WEIGHTS_FILE}")
    return file


def stored_digest(file: Path) -> str:
    """The file's digest, computed anew only when its time or size has changed: it may have gigabytes."""
    status = file.stat()
    return _digest(file, status.st_mtime_ns, status.st_size)


def describe_adapters(adapters: Sequence[AdapterUse]) -> list[dict[str, Any]]:
    """File, digest and weight of each, for JSON."""
    files = [(adapter_file(use.path), use.weight) for use in adapters]
    return [{"path": str(file), "digest": stored_digest(file), "weight": weight} for file, weight in files]


@lru_cache(maxsize=64)
def _digest(file: Path, _: int, __: int) -> str:
    return file_digest(file)


def adapter_state(adapters: Sequence[AdapterUse]) -> AdapterState:
    """What identifies adapters in use, down to the moment that their files were written.

    Raises:
        InputError: there is no such file.
    """
    files = [(adapter_file(use.path).resolve(), use.weight) for use in adapters]
    return tuple((file, file.stat().st_mtime_ns, file.stat().st_size, weight) for file, weight in files)


def read_metadata(path: Path) -> dict[str, str]:
    """The header of an adapter, without its weights.

    Args:
        path: a checkpoint folder or a safetensors file.

    Raises:
        InputError: there is no adapter, or not a safetensors file.
    """
    file = adapter_file(path)
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.metadata() or {}
    except SafetensorError as error:
        raise InputError(f"{file} is not a readable safetensors file ({error})") from error


@dataclass(frozen=True)
class SamplerChoice:
    """A sampler and the step counts that suit it."""

    sampler: Sampler
    steps: int
    """For one good image."""
    compared: tuple[int, ...]
    """For an evaluation."""


def choose_sampler(metadata: Mapping[str, str], cfg_scale: float | None = None) -> SamplerChoice:
    """The sampler for what the adapter was trained with; without an adapter (no metadata), flow matching.

    Args:
        metadata: of the adapter's file: `objective` ("lbm" or "flow") and `loss`, the loss's arguments as JSON.
        cfg_scale: of classifier-free guidance, for flow matching alone; 4 by default.

    Raises:
        InputError: guidance is asked of a bridge, or the objective is unknown.
    """
    objective = metadata.get("objective", "flow")
    if objective == "flow":
        return SamplerChoice(FlowSampler(FLOW_CFG_SCALE if cfg_scale is None else cfg_scale), FLOW_STEPS, (4, 20))
    if objective != "lbm":
        raise InputError(f"the adapter's objective is {objective!r}; this version samples 'lbm' and 'flow'")
    if cfg_scale not in (None, 1.0):
        raise InputError(f"a bridge (objective lbm) is sampled without guidance: leave out cfg_scale={cfg_scale}")
    loss = trained_bridge(metadata)
    sampler = BridgeSampler(
        start="white" if loss.get("sub_prob") == 1 else "source",
        bridge_noise=loss.get("bridge_noise", 0.0),
        prediction=loss.get("prediction", "displacement"),
    )
    return SamplerChoice(sampler, BRIDGE_STEPS, (1, 2, 4))


def trained_bridge(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The arguments of the loss that a bridge was trained with: `sub_prob`, `bridge_noise`, `prediction`, …"""
    return json.loads(metadata.get("loss", "{}"))


def trained_geometry(metadata: Mapping[str, str]) -> Geometry:
    """The sizes that the adapter was trained at, `geometry` as JSON; one megapixel if it does not say."""
    return Geometry(**json.loads(metadata["geometry"])) if "geometry" in metadata else DEFAULT_GEOMETRY


def describe_sampler(sampler: Sampler) -> dict[str, Any]:
    """Its class and settings, for JSON."""
    assert is_dataclass(sampler)
    assert not isinstance(sampler, type)
    return {"name": type(sampler).__name__, **asdict(sampler)}
