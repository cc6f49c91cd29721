"""Small data sets and their caches, for the tests of everything that reads a cache."""

import json
import threading
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_prep.cache.encoding import Encoders
from data_prep.cache.index import CacheHeader, DatasetDigest, read_index
from data_prep.cache.reader import CacheReader
from data_prep.cache.writer import CacheSummary, build_cache
from data_prep.model.directory import ModelDirectory
from data_prep.model.encoders import load_prompt_encoder, load_vae
from data_prep.model.geometry import Geometry
from data_prep.rows.rows import RejectedRow, Row, read_rows

GEOMETRY = Geometry(max_pixels=96 * 96, vision_pixels=112 * 112)


def write_image(path: Path, seed: int, width: int = 64, height: int = 64) -> str:
    """A picture of coloured blocks, which every seed has in other colours. Returns its name."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC).save(path)
    return path.name


def write_mask(path: Path, width: int = 64, height: int = 64) -> str:
    """Background on the left half. Returns its name."""
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (0, 0, width // 2, height))
    mask.save(path)
    return path.name


def write_rows(folder: Path, num_rows: int = 6) -> list[dict[str, Any]]:
    """Images of two shapes and the rows that name them; every third row has two references, the first has a mask."""
    rows = []
    for index in range(num_rows):
        width = 64 if index % 2 else 96
        names = [
            write_image(folder / f"{part}{index}.png", 10 * index + place, width) for place, part in enumerate("tsr")
        ]
        rows.append(
            {
                "id": f"r{index}",
                "prompt": f"edit number {index}",
                "image": names[0],
                "edit_image": names[1:] if index % 3 == 2 else names[1:2],
                "negative_prompt": "blurry" if index % 2 else "",
            }
        )
    if rows:
        rows[0]["back_mask"] = write_mask(folder / "mask0.png", 96)
    return rows


def write_dataset(folder: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """`rows.json` in the folder."""
    path = folder / "rows.json"
    path.write_text(json.dumps(list(rows)))
    return path


LOADING = threading.Lock()
"""transformers replaces torch functions while it builds a model: two threads at once would leave them replaced."""


def load_encoders(model_dir: Path) -> Encoders:
    """The tiny model's, in float32."""
    directory = ModelDirectory.resolve(model_dir)
    with LOADING:
        return Encoders(
            vae=load_vae(directory, dtype=torch.float32),
            prompt_encoder=load_prompt_encoder(directory, dtype=torch.float32),
        )


def cache_dataset(dataset: Path, folder: Path, model_dir: Path, **options: Any) -> CacheSummary:
    """`build_cache` with settings that suit the tiny model."""
    return cache_rows(read_rows(dataset), folder, model_dir, **options)


def cache_rows(rows: Iterable[Row | RejectedRow], folder: Path, model_dir: Path, **options: Any) -> CacheSummary:
    """The same of rows."""
    kept = {field.name for field in fields(CacheHeader)}
    described = {name: options.pop(name) for name in kept & options.keys()}
    computed = {"dtype": "float32", "encoder_dtype": described.get("dtype", "float32")}
    settings: dict[str, Any] = {
        "header": CacheHeader(**{"fingerprint": "tiny", "geometry": GEOMETRY, **computed, **described}),
        "rejected_path": folder.with_name(f"{folder.name}-rejected.jsonl"),
        "shard_size": 2,
        "workers": 2,
        "load_encoders": lambda: load_encoders(model_dir),
        **options,
    }
    return build_cache(rows, folder=folder, **settings)


def newest(folder: Path) -> CacheReader:
    """The dataset that was written or read last."""
    index = read_index(max(folder.glob("indexes/*.arrow"), key=lambda path: path.stat().st_mtime_ns))
    header = index.header
    names = "caption_dropout", "negative", "encoder_dtype"
    flags = {name: getattr(header, name) for name in names}
    return CacheReader(folder, index.dataset, fingerprint=header.fingerprint, geometry=header.geometry, **flags)


def cached(folder: Path, dataset: Path) -> CacheReader:
    """The rows of a dataset file."""
    return CacheReader(folder, str(DatasetDigest(row for row in read_rows(dataset) if isinstance(row, Row))))
