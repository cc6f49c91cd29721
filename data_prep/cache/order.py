"""The order in which records are drawn: a pure function of the seed and the step.

A group is a few records of one bucket, which can be computed together. Epochs follow each other without a gap: in each,
every record is in one group, and all groups are shuffled. A step takes the next few groups, of whatever buckets. So after
any number of steps, the draws of any two records differ by at most one.
"""

import functools
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

ORDER_VERSION = 2
"""Of the order and of all draws of a sample. A checkpoint remembers it: a run of another version cannot be continued exactly."""


class Order:
    """The groups of all steps. A million records take 16 MB and a fraction of a second an epoch, and nothing a step.

    Args:
        buckets: bucket -> indices of its records; the order of the mapping does not matter.
        seed: of the run.
        group_size: records of a group. The last one of each bucket may have fewer; none is empty.
        groups_per_step: of one optimizer step, over all ranks and accumulation steps.
    """

    def __init__(
        self, buckets: Mapping[str, Sequence[int] | np.ndarray], seed: int, group_size: int, groups_per_step: int
    ):
        self.seed, self.group_size, self.groups_per_step = seed, group_size, groups_per_step
        self.names = sorted(buckets)
        self._members = [np.asarray(buckets[name]) for name in self.names]
        counts = np.array([len(members) for members in self._members])
        self._first_record = np.concatenate([[0], counts.cumsum()])
        self._first_group = np.concatenate([[0], (-(-counts // group_size)).cumsum()])
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffle)

    @property
    def num_records(self) -> int:
        """Of all buckets."""
        return int(self._first_record[-1])

    @property
    def groups_per_epoch(self) -> int:
        """The same in every epoch."""
        return int(self._first_group[-1])

    @property
    def empty_share(self) -> float:
        """Of the places of all groups, those without a record."""
        return 1 - self.num_records / (self.groups_per_epoch * self.group_size)

    def groups(self, step: int) -> list[np.ndarray]:
        """The record indices of each group of a step (from 0); those of one bucket are neighbours, which evens out ranks."""
        first = step * self.groups_per_step
        found = []
        for number in range(first, first + self.groups_per_step):
            epoch, place = divmod(number, self.groups_per_epoch)
            records, shuffled = self._epoch(epoch)
            group = int(shuffled[place])
            found.append((group, records[self._extent(group)]))
        return [records for _, records in sorted(found, key=lambda pair: pair[0])]

    def _extent(self, group: int) -> slice:
        """Where its records are among those of all buckets."""
        bucket = int(np.searchsorted(self._first_group, group, side="right")) - 1
        start = self._first_record[bucket] + (group - self._first_group[bucket]) * self.group_size
        return slice(int(start), int(min(start + self.group_size, self._first_record[bucket + 1])))

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """All records, bucket after bucket, each bucket shuffled; and the groups' numbers, shuffled."""
        shuffled = [
            self._generator(epoch, f"bucket {name}").permutation(members)
            for name, members in zip(self.names, self._members, strict=True)
        ]
        return np.concatenate(shuffled), self._generator(epoch, "groups").permutation(self.groups_per_epoch)

    def _generator(self, epoch: int, purpose: str) -> np.random.Generator:
        digest = hashlib.blake2b(f"{self.seed} {epoch} {purpose}".encode(), digest_size=8).digest()
        return np.random.default_rng(int.from_bytes(digest, "little"))
