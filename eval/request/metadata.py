"""What an adapter's file says of itself."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_prep.model.geometry import Geometry
from data_prep.rows.images import file_digest
from eval.request.knobs import AdapterUse
from train.model.adapter_files import EXTRA_KEY, adapter_file, extra_file, read_header

AdapterState = tuple[tuple[Path, int, int, float], ...]
"""Resolved file, time of writing, bytes and weight of each adapter."""
DEFAULT_GEOMETRY = Geometry(max_pixels=1024 * 1024)


def stored_digest(file: Path) -> str:
    """The file's digest, computed anew only when its time or size has changed: it may have gigabytes."""
    status = file.stat()
    return _digest(file, status.st_mtime_ns, status.st_size)


def describe_adapters(adapters: Sequence[AdapterUse]) -> list[dict[str, Any]]:
    """File, digest and weight of each, for JSON; `extra_digest` where something was trained beside LoRA."""
    files = [(adapter_file(use.path), use.weight) for use in adapters]
    return [
        {"path": str(file), "digest": stored_digest(file), "weight": weight, **extra_digest(file)}
        for file, weight in files
    ]


def extra_digest(path: Path) -> dict[str, str]:
    """The digest of what was trained beside LoRA, by its name in settings; nothing where there is nothing."""
    file = extra_file(path)
    return {"extra_digest": stored_digest(file)} if file else {}


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
    return read_header(adapter_file(path))


def added_modules(path: Path) -> list[str]:
    """Names of the modules that an adapter adds beside the transformer's, which see the source, white and the mask."""
    return list(json.loads(read_metadata(path).get(EXTRA_KEY, "{}")).get("added", {}))


def left_out(adapters: Sequence[AdapterUse]) -> list[str]:
    """A note for each adapter that another of these was trained over and that is not among them."""
    used = [use for use in adapters if use.weight != 0]
    beneath = {use.path: json.loads(read_metadata(use.path).get("frozen", "{}")) for use in used}
    digests = {stored_digest(adapter_file(use.path)) for use in used} if any(beneath.values()) else set()
    return [
        f"{path} was trained on top of {name}, which is not in use: add --adapter {name}"
        for path, names in beneath.items()
        for digest, name in names.items()
        if digest not in digests
    ]


def trained_bridge(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The arguments of the loss that a bridge was trained with: `sub_prob`, `bridge_noise`, `prediction`, …"""
    return json.loads(metadata.get("loss", "{}"))


def trained_sigmas(metadata: Mapping[str, str]) -> list[float] | None:
    """The sigmas that a bridge was trained at; None where it does not say, or where they are not a few."""
    return json.loads(metadata["sigmas"]) if "sigmas" in metadata else None


def trained_geometry(metadata: Mapping[str, str]) -> Geometry:
    """The sizes that the adapter was trained at, `geometry` as JSON; one megapixel if it does not say."""
    return Geometry(**json.loads(metadata["geometry"])) if "geometry" in metadata else DEFAULT_GEOMETRY
