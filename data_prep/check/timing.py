"""How long caching takes on this machine: a few rows are encoded, and the clock is read."""

import time
from collections.abc import Iterable
from itertools import islice

import torch

from data_prep.cache.encoding import Encoders, Lacking, encode_rows, prepare_row
from data_prep.errors import InputError
from data_prep.model.directory import ModelDirectory
from data_prep.model.encoders import load_prompt_encoder, load_vae
from data_prep.model.geometry import Geometry
from data_prep.rows.rows import RejectedRow, Row


def seconds_per_row(
    rows: Iterable[Row | RejectedRow], number: int, model: ModelDirectory, geometry: Geometry
) -> tuple[float, str]:
    """Encodes the first `number` usable rows, and one before them that is not counted, as the first is always slow.

    Returns:
        Seconds per row, without loading the encoders, and the device's name.

    Raises:
        InputError: fewer than two rows can be used, or the model's encoders cannot be loaded.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    encoders = Encoders(load_vae(model, device, dtype), load_prompt_encoder(model, device, dtype))
    seconds = []
    usable = (row for row in rows if isinstance(row, Row))
    for row in islice(usable, number + 1):
        start = time.perf_counter()
        prepared = prepare_row(Lacking(row, "latents", {"text": row.prompt}), geometry)
        if encode_rows([prepared], encoders, dtype, batch_size=4).failures or prepared.failures:
            continue
        seconds.append(time.perf_counter() - start)
    if len(seconds) < 2:
        raise InputError("--time-caching needs two rows that can be used")
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return sum(seconds[1:]) / (len(seconds) - 1), name
