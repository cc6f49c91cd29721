"""The order in which records are drawn: a pure function of the seed and the step.

A group is a few records of one bucket, which can be computed together. Epochs follow each other without a gap: in each,
every record is in one group, and all groups are shuffled. A step takes the next few groups, of whatever buckets. So after
any number of steps, the draws of any two records differ by at most one.

With weights an epoch draws only some of the records: those of the greatest weight in every second epoch, on average, and the
others in proportion. The k-th draw of a record (from 0) that is due w times an epoch is in one of the epochs that lie
altogether between k / w and (k + 1) / w, whichever a hash of seed, record and k says. So after any number of steps, wherever in
an epoch that is, the draws of every record differ by at most one from its expected share, w times the epochs. With equal
weights the order is as without.
"""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.errors import InputError

ORDER_VERSION = 2
"""Version of the order and of all draws. Checkpoints record it: a run of another version cannot be resumed exactly."""
MOST_OFTEN = 0.5
"""Draws an epoch of the records with the greatest weight: at 1/2 and below, every draw has a whole epoch to be in."""
LARGEST_RATIO = 1e6
"""Largest ratio of two weights."""
ROUNDING = 1e-9
"""By how much a multiple of a weight may miss the whole number that it is."""
PROBED = 8
"""Epochs in which empty places are counted where every epoch draws other records."""


@dataclass(frozen=True)
class Epoch:
    """The records of an epoch, in groups."""

    records: np.ndarray
    """Bucket after bucket, each bucket shuffled."""
    first_record: np.ndarray
    """Number of the first record of each bucket, and the number of all records."""
    first_group: np.ndarray
    """The same of the groups."""
    shuffled: np.ndarray
    """The numbers of the groups, shuffled."""

    def extent(self, group: int, group_size: int) -> slice:
        """Where the records of a group are among those of all buckets."""
        bucket = int(np.searchsorted(self.first_group, group, side="right")) - 1
        start = self.first_record[bucket] + (group - self.first_group[bucket]) * group_size
        return slice(int(start), int(min(start + group_size, self.first_record[bucket + 1])))


class Order:
    """The groups of all steps. A million records take 16 MB and a fraction of a second an epoch, and nothing a step.

    Args:
        buckets: bucket -> indices of its records; the order of the mapping does not matter.
        seed: random seed of the run.
        group_size: records of a group. The last one of each bucket may have fewer; none is empty.
        groups_per_step: number of groups of one optimizer step, over all ranks and accumulation steps.
        weights: weights of all records, by index, each above 0; None: all the same.

    Raises:
        InputError: a weight is more than a million times another.
    """

    def __init__(
        self,
        buckets: Mapping[str, Sequence[int] | np.ndarray],
        seed: int,
        group_size: int,
        groups_per_step: int,
        weights: np.ndarray | None = None,
    ):
        self.seed, self.group_size, self.groups_per_step = seed, group_size, groups_per_step
        self.names = sorted(buckets)
        self._members = [np.asarray(buckets[name]) for name in self.names]
        self.num_records = sum(map(len, self._members))
        """The records of all buckets."""
        self.rates = draws_per_epoch(weights)
        """Draws of each record in an epoch, by index; None: one of each."""
        self._ends = np.zeros(1, np.int64)  # the groups of all epochs before each, as far as they were asked for
        self._drawn = functools.lru_cache(maxsize=2)(self._draw)
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffle)

    @property
    def groups_per_epoch(self) -> float:
        """Groups in which as many records are drawn as there are: each once, or on average."""
        return self.num_records / (self.group_size * (1 - self.empty_share))

    @property
    def empty_share(self) -> float:
        """Share of the places of all groups that have no record."""
        drawn = [self._drawn(epoch) for epoch in range(1 if self.rates is None else PROBED)]
        places = self.group_size * sum(self._num_groups(members).sum() for members in drawn)
        return float(1 - sum(len(each) for members in drawn for each in members) / places)

    def epochs(self, step: int) -> int:
        """Whole epochs that lie before a step (from 0)."""
        return self._locate(step * self.groups_per_step)[0]

    def groups(self, step: int) -> list[np.ndarray]:
        """The record indices of each group of a step (from 0); those of one bucket are neighbours, which evens out ranks."""
        first = step * self.groups_per_step
        found = []
        for number in range(first, first + self.groups_per_step):
            place = self._locate(number)
            epoch = self._epoch(place[0])
            group = int(epoch.shuffled[place[1]])
            found.append((group, epoch.records[epoch.extent(group, self.group_size)]))
        return [records for _, records in sorted(found, key=lambda pair: pair[0])]

    def _locate(self, number: int) -> tuple[int, int]:
        """The epoch of a group of all steps, and its place there."""
        if self.rates is None:
            return divmod(number, int(self._num_groups(self._members).sum()))
        while self._ends[-1] <= number:
            groups = self._num_groups(self._drawn(len(self._ends) - 1)).sum()
            self._ends = np.append(self._ends, self._ends[-1] + groups)
        epoch = int(np.searchsorted(self._ends, number, side="right")) - 1
        return epoch, number - int(self._ends[epoch])

    def _num_groups(self, members: list[np.ndarray]) -> np.ndarray:
        """Of each bucket."""
        return -(-np.array([len(each) for each in members]) // self.group_size)

    def _draw(self, epoch: int) -> list[np.ndarray]:
        """The records of each bucket that the epoch draws."""
        if self.rates is None:
            return self._members
        due = self._is_due(epoch, self.rates)
        return [members[due[members]] for members in self._members]

    def _is_due(self, epoch: int, rates: np.ndarray) -> np.ndarray:
        """Which records the epoch draws, by index."""
        draw = np.floor(epoch * rates + ROUNDING)
        first = np.ceil((draw - ROUNDING) / rates)
        last = np.floor((draw + 1 + ROUNDING) / rates) - 1
        return first + np.floor(self._uniform(draw) * (last - first + 1)) == epoch

    def _uniform(self, draw: np.ndarray) -> np.ndarray:
        """A number in [0, 1) for each record and its draw: splitmix64 (Steele et al. 2014) of seed, record and draw."""
        key = hashlib.blake2b(f"{self.seed} weights".encode(), digest_size=8).digest()
        bits = _mixed(np.arange(len(draw), dtype=np.uint64) ^ np.frombuffer(key, "<u8"))
        return (_mixed(bits ^ draw.astype(np.uint64)) >> np.uint64(11)) * 2.0**-53

    def _shuffle(self, epoch: int) -> Epoch:
        members = self._drawn(epoch)
        shuffled = [
            self._generator(epoch, f"bucket {name}").permutation(each)
            for name, each in zip(self.names, members, strict=True)
        ]
        first_record = np.concatenate([[0], np.cumsum([len(each) for each in members])])
        first_group = np.concatenate([[0], self._num_groups(members).cumsum()])
        groups = self._generator(epoch, "groups").permutation(int(first_group[-1]))
        return Epoch(np.concatenate(shuffled), first_record, first_group, groups)

    def _generator(self, epoch: int, purpose: str) -> np.random.Generator:
        digest = hashlib.blake2b(f"{self.seed} {epoch} {purpose}".encode(), digest_size=8).digest()
        return np.random.default_rng(int.from_bytes(digest, "little"))


def draws_per_epoch(weights: np.ndarray | None) -> np.ndarray | None:
    """Weights in units of draws an epoch, in (0, 1/2]; None where all are equal, and each record is drawn in every epoch.

    Raises:
        InputError: a weight is more than a million times another.
    """
    if weights is None or not len(weights) or weights.max() == weights.min():
        return None
    if weights.max() > LARGEST_RATIO * weights.min():
        raise InputError(
            f"the weights of two rows are {weights.min():g} and {weights.max():g}, more than a million times as much: check "
            "the column weight, and at weight, repeats and resolutions of data.dataset"
        )
    return MOST_OFTEN * weights / weights.max()


def _mixed(bits: np.ndarray) -> np.ndarray:
    """splitmix64's output function of 64-bit numbers."""
    bits = bits + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
