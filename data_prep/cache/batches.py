"""Records -> batches, in the order of `data_prep.cache.order`.

The groups of a step are cut into micro-batches, which go round the ranks. The sample at place p of group g of step s has
the global number s * global_batch_size + g * group_size + p, whatever the cut; places without a record have a number too,
and nothing is computed for them. There is no loader state: to resume at a step, ask for it.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data_prep.cache.index import REBUILD
from data_prep.cache.order import Order
from data_prep.cache.reader import CacheReader, Record
from data_prep.errors import InputError
from losses.batch import Batch, Condition, Scene
from losses.randomness import SampleRandom


@dataclass
class MicroBatch:
    """What one forward pass sees."""

    batch: Batch
    random: SampleRandom
    """The draws of its samples, by their global numbers."""
    share: float
    """Share of the step's loss (the mean over all its samples): this micro-batch's samples over those of the global batch.
    The shares of all ranks add up to 1. It is 0 for a micro-batch that is another rank's, repeated to keep pace."""


@dataclass(frozen=True)
class _Piece:
    """A part of a group."""

    indices: list[int]
    """Indices of the records."""
    numbers: range
    """Numbers of the samples in the run."""


class BatchStream:
    """The micro-batches of one rank, by step. The next step is read on a thread, which changes no result."""

    def __init__(
        self,
        reader: CacheReader,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        group_size: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        caption_dropout: float = 0.0,
        preserve: tuple[str, ...] = (),
    ):
        """Lays out the epochs.

        Args:
            reader: the cache.
            seed: random seed of the run.
            global_batch_size: places of an optimizer step, over all ranks and accumulation steps.
            micro_batch_size: samples of one forward pass.
            group_size: places that are filled from one bucket; the micro-batch by default.
            rank: this process, from 0.
            world_size: processes that train together.
            caption_dropout: probability that a sample's instruction is empty, in [0, 1).
            preserve: other instructions, of which batches have one for each sample.

        Raises:
            InputError: sizes that do not divide each other; or caption dropout or other instructions are wanted and the cache
                has no embeddings of them.
            ValueError: the probability is out of its range.
        """
        self.group_size = checked_group_size(group_size, micro_batch_size, global_batch_size)
        if not 0.0 <= caption_dropout < 1.0:
            raise ValueError(f"caption_dropout must be in [0, 1), got {caption_dropout}")
        if caption_dropout and not reader.header.caption_dropout:
            raise InputError(f"the cache at {reader.folder.path} was written without caption dropout: {REBUILD}")
        if preserve and reader.header.preserve != preserve:
            raise InputError(f"the cache at {reader.folder.path} lacks what data.preserve_prompts asks for: {REBUILD}")
        self.reader = reader
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self.caption_dropout = caption_dropout
        groups_per_step = global_batch_size // self.group_size
        self.order = Order(reader.buckets, seed, self.group_size, groups_per_step, reader.weights)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: tuple[int, Future[list[MicroBatch]]] | None = None

    def __str__(self) -> str:
        order = self.order
        epoch = order.groups_per_epoch / order.groups_per_step
        buckets = f"{len(order.names)} bucket{'s' * (len(order.names) > 1)}" + (
            ", by weight" if order.rates is not None else ""
        )
        return (
            f"{order.num_records} records in {buckets}: {epoch:.4g} steps per "
            f"epoch, each with {self.global_batch_size} places in groups of {self.group_size} from one bucket; "
            f"{order.empty_share:.1%} of the places stay empty"
        )

    def num_samples(self, step: int) -> int:
        """Records that step `step` (from 0) draws, over all ranks: at most the global batch size."""
        return sum(len(group) for group in self.order.groups(step))

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This rank's part of step `step` (from 0). Every rank has equally many, and at least one."""
        waiting, self._next = self._next, None
        result = waiting[1].result() if waiting and waiting[0] == step else self._read(step)
        self._next = step + 1, self._thread.submit(self._read, step + 1)
        return result

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _read(self, step: int) -> list[MicroBatch]:
        """In each round every rank computes one piece; where the last round lacks some, its last piece again, for nothing."""
        pieces = self._pieces(step)
        num_samples = sum(len(piece.indices) for piece in pieces)
        found = []
        for start in range(0, len(pieces), self.world_size):
            together = pieces[start : start + self.world_size]
            mine = together[min(self.rank, len(together) - 1)]
            share = len(mine.indices) / num_samples if self.rank < len(together) else 0.0
            everywhere = [number for piece in together for number in piece.numbers]
            random = SampleRandom(self.seed, mine.numbers, self.global_batch_size, everywhere)
            found.append(MicroBatch(self._batch(mine.indices, random), random, share))
        return found

    def _pieces(self, step: int) -> list[_Piece]:
        """The micro-batches of all ranks, of at most `micro_batch_size` samples."""
        size, pieces = self.micro_batch_size, []
        first = step * self.global_batch_size
        for place, group in enumerate(self.order.groups(step)):
            for start in range(0, len(group), size):
                indices = group[start : start + size].tolist()
                number = first + place * self.group_size + start
                pieces.append(_Piece(indices, range(number, number + len(indices))))
        return pieces

    def _batch(self, indices: Sequence[int], random: SampleRandom) -> Batch:
        records = [self.reader[index] for index in indices]
        if self.caption_dropout:
            dropped = (random.uniform("caption_dropout") < self.caption_dropout).tolist()
            records = [_without_caption(each) if drop else each for each, drop in zip(records, dropped, strict=True)]
        return collate(records)


def checked_group_size(group_size: int | None, micro_batch_size: int, global_batch_size: int) -> int:
    """The size of a group, which is the micro-batch by default.

    Raises:
        InputError: a micro-batch does not divide it, or it does not divide the global batch.
    """
    size = group_size or micro_batch_size
    if size % micro_batch_size:
        raise InputError(
            f"train.group_size={size} is not a multiple of train.micro_batch_size={micro_batch_size}: "
            "a micro-batch is a part of one group"
        )
    if global_batch_size % size:
        raise InputError(
            f"train.group_size={size} does not divide the global batch of {global_batch_size} "
            "(train.micro_batch_size x train.grad_accum_steps x processes): set one that does"
        )
    return size


def _without_caption(record: Record) -> Record:
    assert record.empty_prompt_emb is not None
    return replace(record, prompt_emb=record.empty_prompt_emb)


def collate(records: Sequence[Record]) -> Batch:
    """Stacks records of one bucket.

    Instructions are padded with zeros on the right. Records without a mask get zeros (nothing to preserve) when another
    one has a mask. `negative` and `preserved` are there when every record has such an instruction, and `source_latents` when
    they have a source, which all records of a bucket have, or none.

    Returns:
        A batch whose `sub_noise` is expanded from one tensor, on the CPU, in the cache's dtype.
    """
    sources = [each.source_latents for each in records if each.source_latents is not None]
    edit_latents = [torch.stack(latents) for latents in zip(*(each.edit_latents for each in records), strict=True)]
    negatives = [each.negative_prompt_emb for each in records if each.negative_prompt_emb is not None]
    source_latents = torch.stack(sources) if sources else None
    target_latents = torch.stack([each.target_latents for each in records])
    seen = torch.zeros_like(target_latents) if source_latents is None else source_latents
    scene = Scene(seen, records[0].sub_noise.expand(len(records), -1, -1, -1), _masks(records))
    assert scene.sub_noise is not None
    preserved = [each.preserve_prompt_emb for each in records if each.preserve_prompt_emb is not None]
    return Batch(
        source_latents=source_latents,
        sub_noise=scene.sub_noise,
        condition=pad_condition([each.prompt_emb for each in records], edit_latents, scene),
        negative=pad_condition(negatives, edit_latents, scene) if len(negatives) == len(records) else None,
        ids=[each.id for each in records],
        target_latents=target_latents,
        mask=scene.mask,
        preserved=pad_condition(preserved, [], scene) if len(preserved) == len(records) else None,
    )


def pad_condition(prompt_embs: list[Tensor], edit_latents: list[Tensor], scene: Scene | None = None) -> Condition:
    """A condition from B prompt embeddings (L_i, D), padded with zeros on the right, and stacked reference latents."""
    lengths = torch.tensor([len(each) for each in prompt_embs])
    return Condition(
        prompt_emb=pad_sequence(prompt_embs, batch_first=True),
        prompt_emb_mask=torch.arange(int(lengths.max())) < lengths[:, None],
        edit_latents=edit_latents,
        scene=scene,
    )


def _masks(records: Sequence[Record]) -> Tensor | None:
    """(B, 1, h, w), or None if no record has a mask."""
    if all(each.mask is None for each in records):
        return None
    empty = torch.zeros_like(records[0].target_latents[:1])
    return torch.stack([empty if each.mask is None else each.mask for each in records])
