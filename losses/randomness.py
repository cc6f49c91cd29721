"""Randomness that belongs to the sample, not to the process."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


class SampleRandom:
    """Draws for a batch, each row from its own CPU generator seeded by (seed, sample number, purpose).

    A row depends on nothing else: neither on the batch's size nor on the rank, the order of draws, or the global
    generator. The same purpose gives the same draw again.

    Args:
        seed: of the run.
        numbers: global sample numbers, B of them.
    """

    def __init__(self, seed: int, numbers: Sequence[int]):
        self.seed = seed
        self.numbers = list(numbers)

    def uniform(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """Uniform in [0, 1), (B, *shape), float32, on the CPU."""
        return torch.stack([torch.rand(tuple(shape), generator=g) for g in self._generators(purpose)])

    def normal(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """Standard normal, (B, *shape), float32, on the CPU."""
        return torch.stack([torch.randn(tuple(shape), generator=g) for g in self._generators(purpose)])

    def _generators(self, purpose: str) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(self._hash(number, purpose)) for number in self.numbers]

    def _hash(self, number: int, purpose: str) -> int:
        return _hash(self.seed, number, purpose)


class PictureRandom(SampleRandom):
    """Draws for pictures that have a seed each, whatever others they are sampled with.

    Args:
        seeds: B of them. Each draws what `SampleRandom(seed, [0])` does.
    """

    def __init__(self, seeds: Sequence[int]):
        super().__init__(0, seeds)

    def _hash(self, number: int, purpose: str) -> int:
        return _hash(number, 0, purpose)


def _hash(seed: int, number: int, purpose: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{number}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1  # 63 bits: manual_seed takes a signed integer
