"""Records -> batches, in an order that is a pure function of (seed, step).

An epoch is a list of global batches, each from one bucket. A global batch is cut over accumulation steps, ranks and
micro-batches by position, and the sample at position p of step s has the global number s * global_batch_size + p,
whatever the cut. There is no loader state: to resume at a step, ask for it.
"""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data_prep.cache.reader import REBUILD, CacheReader, Record
from data_prep.errors import InputError
from losses.batch import Batch, Condition
from losses.randomness import SampleRandom


def global_batches(
    buckets: Mapping[str, Sequence[int]], seed: int, epoch: int, global_batch_size: int
) -> list[list[int]]:
    """The global batches of one epoch: lists of record indices, each from one bucket.

    Every record appears. What is left of a bucket at the end is completed from the beginning of the bucket's shuffled
    order, so that a bucket smaller than a global batch repeats its records.

    Args:
        buckets: bucket -> indices of its records; the order of the mapping does not matter.
        seed: of the run.
        epoch: from 0.
        global_batch_size: samples of one optimizer step, over all ranks and accumulation steps.
    """
    batches = []
    for bucket in sorted(buckets):
        order = _generator(seed, epoch, bucket).permutation(np.asarray(buckets[bucket]))
        num_batches = -(-len(order) // global_batch_size)
        filled = np.resize(order, num_batches * global_batch_size)  # repeats from the beginning
        batches += filled.reshape(num_batches, global_batch_size).tolist()
    return [batches[place] for place in _generator(seed, epoch, "order").permutation(len(batches))]


def _generator(seed: int, epoch: int, purpose: str) -> np.random.Generator:
    digest = hashlib.blake2b(f"{seed} {epoch} {purpose}".encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


@dataclass
class MicroBatch:
    """What one forward pass sees."""

    batch: Batch
    numbers: list[int]
    """The global sample number of each sample: the seed of its randomness."""


class BatchStream:
    """The micro-batches of one rank, by step. The next step is read on a thread, which changes no result."""

    def __init__(
        self,
        reader: CacheReader,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        caption_dropout: float = 0.0,
    ):
        """Lays out the epochs.

        Args:
            reader: the cache.
            seed: of the run.
            global_batch_size: a multiple of `micro_batch_size * world_size`; the quotient is the accumulation.
            micro_batch_size: samples of one forward pass.
            rank: this process, from 0.
            world_size: processes that train together.
            caption_dropout: probability that a sample's instruction is empty, in [0, 1).

        Raises:
            ValueError: sizes that do not divide, or a probability out of range.
            InputError: caption dropout is wanted and the cache has no empty-instruction embeddings.
        """
        if global_batch_size <= 0 or global_batch_size % (micro_batch_size * world_size):
            raise ValueError(
                f"global_batch_size must be a multiple of micro_batch_size * world_size = "
                f"{micro_batch_size} * {world_size}, got {global_batch_size}"
            )
        if not 0.0 <= caption_dropout < 1.0:
            raise ValueError(f"caption_dropout must be in [0, 1), got {caption_dropout}")
        if caption_dropout and not reader.header.caption_dropout:
            raise InputError(f"the cache at {reader.folder.path} was written without caption dropout: {REBUILD}")
        self.reader = reader
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self.caption_dropout = caption_dropout
        self.steps_per_epoch = sum(-(-len(indices) // global_batch_size) for indices in reader.buckets.values())
        """The same in every epoch."""
        self._epoch = functools.lru_cache(maxsize=2)(self._order)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: tuple[int, Future[list[MicroBatch]]] | None = None

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This rank's part of global batch `step` (from 0), one entry per accumulation step."""
        waiting, self._next = self._next, None
        result = waiting[1].result() if waiting and waiting[0] == step else self._read(step)
        self._next = step + 1, self._thread.submit(self._read, step + 1)
        return result

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _order(self, epoch: int) -> list[list[int]]:
        return global_batches(self.reader.buckets, self.seed, epoch, self.global_batch_size)

    def _read(self, step: int) -> list[MicroBatch]:
        epoch, place = divmod(step, self.steps_per_epoch)
        indices = self._epoch(epoch)[place]
        size, stride = self.micro_batch_size, self.micro_batch_size * self.world_size
        starts = range(self.rank * size, self.global_batch_size, stride)
        first_number = step * self.global_batch_size
        return [
            self._micro_batch(indices[start : start + size], range(first_number + start, first_number + start + size))
            for start in starts
        ]

    def _micro_batch(self, indices: Sequence[int], numbers: Sequence[int]) -> MicroBatch:
        records = [self.reader[index] for index in indices]
        if self.caption_dropout:
            draws = SampleRandom(self.seed, numbers).uniform("caption_dropout")
            dropped = (draws < self.caption_dropout).tolist()
            records = [_without_caption(each) if drop else each for each, drop in zip(records, dropped, strict=True)]
        return MicroBatch(collate(records), list(numbers))


def _without_caption(record: Record) -> Record:
    assert record.empty_prompt_emb is not None
    return replace(record, prompt_emb=record.empty_prompt_emb)


def collate(records: Sequence[Record]) -> Batch:
    """Stacks records of one bucket.

    Instructions are padded with zeros on the right. Records without a mask get zeros (nothing to preserve) when another
    one has a mask. `negative` is there when every record has a negative prompt.

    Returns:
        A batch whose `sub_noise` is expanded from one tensor, on the CPU, in the cache's dtype.
    """
    edit_latents = [torch.stack(latents) for latents in zip(*(each.edit_latents for each in records), strict=True)]
    negatives = [each.negative_prompt_emb for each in records if each.negative_prompt_emb is not None]
    return Batch(
        source_latents=torch.stack([each.source_latents for each in records]),
        sub_noise=records[0].sub_noise.expand(len(records), -1, -1, -1),
        condition=pad_condition([each.prompt_emb for each in records], edit_latents),
        negative=pad_condition(negatives, edit_latents) if len(negatives) == len(records) else None,
        ids=[each.id for each in records],
        target_latents=torch.stack([each.target_latents for each in records]),
        mask=_masks(records),
    )


def pad_condition(prompt_embs: list[Tensor], edit_latents: list[Tensor]) -> Condition:
    """A condition from B prompt embeddings (L_i, D), padded with zeros on the right, and stacked reference latents."""
    lengths = torch.tensor([len(each) for each in prompt_embs])
    return Condition(
        prompt_emb=pad_sequence(prompt_embs, batch_first=True),
        prompt_emb_mask=torch.arange(int(lengths.max())) < lengths[:, None],
        edit_latents=edit_latents,
    )


def _masks(records: Sequence[Record]) -> Tensor | None:
    """(B, 1, h, w), or None if no record has a mask."""
    if all(each.mask is None for each in records):
        return None
    empty = torch.zeros_like(records[0].target_latents[:1])
    return torch.stack([empty if each.mask is None else each.mask for each in records])
