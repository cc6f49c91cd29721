"""GPUs by name: how much memory they have, how fast they multiply, and how fast they are given what others hold."""

import difflib
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from data_prep.errors import InputError
from train.model.quantize import UNITS

GIB = 2**30
PCIE = {3: 15.8, 4: 31.5, 5: 63.0, 6: 121.0}
"""Generation -> GB/s of 16 lanes in one direction."""


@dataclass(frozen=True)
class Gpu:
    """A GPU to plan for. Speeds are the peaks of the maker's data sheets, without sparsity; None: not known here."""

    name: str
    memory_gib: float
    """As CUDA reports it, which is less than the name says."""
    tflops: float | None = None
    """bf16 products with float32 sums."""
    fp8: float | None = None
    """TFLOP/s of fp8 products with float32 sums; None also where the card has no such units."""
    int8: float | None = None
    """TOP/s of int8 products."""
    bandwidth: float = 0.0
    """Bandwidth of its memory, GB/s."""
    pcie: float = 0.0
    """From the machine's memory, GB/s."""
    nvlink: float | None = None
    """To the other GPUs of the machine, GB/s in one direction; None: over PCIe."""
    origin: str = "named"
    """Why this one, in words."""
    per_machine: int = 8
    """GPUs of one machine."""
    host_gib: float | None = None
    """Memory of the machine itself; None: not known."""

    @property
    def link(self) -> float:
        """To the other GPUs of the machine, GB/s in one direction."""
        return self.nvlink or self.pcie

    def products(self, weights: str) -> float | None:
        """TFLOP/s of 8-bit products with weights of this format; None: they are widened and multiplied in bf16."""
        return {"fp8": self.fp8, "int8": self.int8}.get(weights)


_4, _5, _6 = (PCIE[generation] for generation in (4, 5, 6))
GPUS = (
    #   name, GiB, bf16, fp8, int8, memory GB/s, PCIe, NVLink
    Gpu("B300", 268.0, 2250, 4500, 125, 8000, _6, 900),
    Gpu("B200", 178.0, 2250, 4500, 4500, 8000, _5, 900),
    Gpu("H200", 139.8, 989, 1979, 1979, 4800, _5, 450),
    Gpu("H100 NVL", 93.1, 835, 1671, 1671, 3900, _5, 300),
    Gpu("H100 PCIe", 79.1, 756, 1513, 1513, 2000, _5, 300),
    Gpu("H100", 79.1, 989, 1979, 1979, 3350, _5, 450),
    Gpu("H800", 79.1, 989, 1979, 1979, 3350, _5, 200),
    Gpu("H20", 95.0, 148, 296, 296, 4000, _5, 450),
    Gpu("RTX PRO 6000", 94.9, 503, 1007, 1007, 1792, _5),
    Gpu("RTX 6000 Ada", 47.4, 364, 728, 728, 960, _4),
    Gpu("L40S", 44.4, 362, 733, 733, 864, _4),
    Gpu("A100 80GB", 79.1, 312, None, 624, 2039, _4, 300),
    Gpu("A100 40GB", 39.4, 312, None, 624, 1555, _4, 300),
    Gpu("A800 80GB", 79.1, 312, None, 624, 2039, _4, 200),
    Gpu("A6000", 47.4, 155, None, 310, 768, _4),
    Gpu("RTX 5090", 31.3, 209, 419, 838, 1792, _5),
    Gpu("RTX 4090", 23.6, 165, 330, 661, 1008, _4),
    Gpu("RTX 3090", 23.6, 71, None, 284, 936, _4),
    Gpu("L4", 22.0, 121, 242, 242, 300, _4),
)
ASSUMED = "RTX PRO 6000"
"""Planned for where there is no GPU: the 96 GB that the large experiments are made for."""


def find_gpu(name: str | int | None = None) -> Gpu:
    """The GPU of this name (`H100`, `RTX 4090`, 4090, `A100 40GB`), by default the one of this machine.

    Raises:
        InputError: none is called so.
    """
    if name is not None:
        if known := _known(str(name)):
            return known
        names = [gpu.name for gpu in GPUS]
        nearest = difflib.get_close_matches(str(name).upper(), names, n=1, cutoff=0.0)[0]
        raise InputError(f"plan.gpu={name!r} is not known: did you mean {nearest!r}? Known are {', '.join(names)}")
    if not torch.cuda.is_available():
        assumed = _known(ASSUMED)
        assert assumed is not None
        return replace(assumed, origin="assumed, because this machine has no GPU: set plan.gpu=NAME")
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return replace(
        _known(properties.name) or _unknown(properties),
        name=properties.name,
        memory_gib=properties.total_memory / GIB,
        origin="this machine's",
        per_machine=torch.cuda.device_count(),
        host_gib=host_bytes() / GIB,
    )


def host_bytes(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """The memory of this machine, or of the container or job that this is in."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        file = cgroups / name
        if file.is_file() and (text := file.read_text().strip()).isdigit():
            total = min(total, int(text))
    return total


def _unknown(properties: Any) -> Gpu:
    """One that the table lacks: which 8-bit numbers it multiplies is known, and no speed."""
    capability = properties.major, properties.minor
    fp8, int8 = (0.0 if capability >= UNITS[stored] else None for stored in (torch.float8_e4m3fn, torch.int8))
    return Gpu(properties.name, 0.0, fp8=fp8, int8=int8)


def _known(name: str) -> Gpu | None:
    """The first of the table whose words are all in the name, or that has all the words of the name."""
    words = _words(name)
    for gpu in GPUS:
        if _words(gpu.name) <= words:
            return gpu
    return next((gpu for gpu in GPUS if words and words <= _words(gpu.name)), None)


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", name.lower()))
