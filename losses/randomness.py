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
        seed: random seed of the run.
        numbers: global sample numbers, B of them.
        step_size: samples of an optimizer step; step s has the numbers from s * step_size on.
        everywhere: the numbers that all ranks compute at the same time, these included; by default these alone.
    """

    def __init__(self, seed: int, numbers: Sequence[int], step_size: int = 1, everywhere: Sequence[int] | None = None):
        self.seed = seed
        self.numbers = list(numbers)
        self.step_size = step_size
        self._everywhere = self.numbers if everywhere is None else list(everywhere)

    @property
    def everywhere(self) -> "SampleRandom":
        """The draws of all samples that all ranks compute at the same time, for what the ranks must do alike."""
        return SampleRandom(self.seed, self._everywhere, self.step_size)

    def uniform(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """Uniform in [0, 1), (B, *shape), float32, on the CPU."""
        return torch.stack([torch.rand(tuple(shape), generator=g) for g in self._generators(purpose)])

    def stratified(self, purpose: str) -> Tensor:
        """Uniform in [0, 1), (B,), float64, on the CPU: of the N samples of a step, one in each of N equal intervals.

        Which of them has which is shuffled for every step and purpose, so that each sample's draw is uniform by itself.
        """
        places = torch.tensor([self._stratum(number, purpose) for number in self.numbers])
        within = torch.stack(
            [torch.rand((), generator=g, dtype=torch.float64) for g in self._generators(f"{purpose}/within")]
        )
        return ((places + within) / self.step_size).clamp_max(1 - 2**-53)  # the sum may round up to a whole number

    def _stratum(self, number: int, purpose: str) -> int:
        step, place = divmod(number, self.step_size)
        generator = torch.Generator().manual_seed(self._hash(step, f"{purpose}/strata"))
        return int(torch.randperm(self.step_size, generator=generator)[place])

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
