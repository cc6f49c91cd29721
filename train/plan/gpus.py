"""GPUs by name: how much memory they have and how fast they multiply."""

import difflib
import re
from dataclasses import dataclass

import torch

from data_prep.errors import InputError


@dataclass(frozen=True)
class Gpu:
    """A GPU to plan for."""

    name: str
    memory_gib: float
    """As CUDA reports it, which is less than the name says."""
    tflops: float | None
    """Dense bf16 products with float32 sums, from the maker's data sheet; None: not known here."""
    origin: str = "named"
    """Why this one, in words."""


GPUS = (
    *(Gpu("B300", 268.0, 2250), Gpu("B200", 178.0, 2250), Gpu("H200", 139.8, 989)),
    *(Gpu("H100 NVL", 93.1, 835), Gpu("H100 PCIe", 79.1, 756), Gpu("H100", 79.1, 989), Gpu("H800", 79.1, 989)),
    *(Gpu("H20", 95.0, 148), Gpu("RTX PRO 6000", 94.9, 503), Gpu("RTX 6000 Ada", 47.4, 364), Gpu("L40S", 44.4, 362)),
    *(Gpu("A100 80GB", 79.1, 312), Gpu("A100 40GB", 39.4, 312), Gpu("A800 80GB", 79.1, 312), Gpu("A6000", 47.4, 155)),
    *(Gpu("RTX 5090", 31.3, 209), Gpu("RTX 4090", 23.6, 165), Gpu("RTX 3090", 23.6, 71), Gpu("L4", 22.0, 121)),
)
ASSUMED = "RTX PRO 6000"
"""Planned for where there is no GPU: the 96 GB that the large experiments are made for."""


def find_gpu(name: str | None = None) -> Gpu:
    """The GPU of this name (`H100`, `RTX 4090`, `A100 40GB`), by default the one of this machine.

    Raises:
        InputError: none is called so.
    """
    if name is not None:
        if known := _known(name):
            return known
        names = [gpu.name for gpu in GPUS]
        nearest = difflib.get_close_matches(name.upper(), names, n=1, cutoff=0.0)[0]
        raise InputError(f"plan.gpu={name!r} is not known: did you mean {nearest!r}? Known are {', '.join(names)}")
    if not torch.cuda.is_available():
        assumed = _known(ASSUMED)
        assert assumed is not None
        return Gpu(assumed.name, assumed.memory_gib, assumed.tflops, "assumed: there is no GPU here, set plan.gpu=NAME")
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    known = _known(properties.name)
    return Gpu(properties.name, properties.total_memory / 2**30, known.tflops if known else None, "this machine's")


def _known(name: str) -> Gpu | None:
    """The first of the table whose words are all in the name, or that has all the words of the name."""
    words = _words(name)
    for gpu in GPUS:
        if _words(gpu.name) <= words:
            return gpu
    return next((gpu for gpu in GPUS if words and words <= _words(gpu.name)), None)


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", name.lower()))
