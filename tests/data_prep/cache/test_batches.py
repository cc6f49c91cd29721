"""The order of the data is a pure function of the seed and the step, however the work is cut."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_prep.cache.batches import BatchStream, collate, global_batches
from data_prep.cache.reader import CacheReader
from data_prep.errors import InputError
from losses.batch import Batch
from tests.caching import cache_dataset, write_dataset, write_rows

LAYOUTS = [(1, 4), (1, 2), (1, 1), (2, 2), (2, 1), (4, 1)]  # world size, micro-batch size; global batch 4


@pytest.fixture(scope="module")
def reader(tmp_path_factory, tiny_model_dir) -> CacheReader:
    folder = tmp_path_factory.mktemp("batches")
    rows = write_rows(folder, 9)
    cache_dataset(write_dataset(folder, rows), folder / "cache", tiny_model_dir, caption_dropout=True, negative=True)
    return CacheReader(folder / "cache")


@pytest.fixture
def stream(reader):
    """Makes streams and ends their threads."""
    streams = []

    def make(**options) -> BatchStream:
        settings = {"seed": 7, "global_batch_size": 4, "micro_batch_size": 4, **options}
        streams.append(BatchStream(reader, **settings))
        return streams[-1]

    yield make
    for each in streams:
        each.close()


BUCKETS = st.dictionaries(st.text(max_size=3), st.integers(1, 20), min_size=1, max_size=5)


@given(BUCKETS, st.integers(0, 2**32), st.integers(0, 3), st.integers(1, 8))
def test_every_record_appears_and_every_global_batch_is_of_one_bucket(sizes, seed, epoch, global_batch_size):
    buckets, bucket_of = {}, {}
    for name, size in sizes.items():
        buckets[name] = list(range(len(bucket_of), len(bucket_of) + size))
        bucket_of.update(dict.fromkeys(buckets[name], name))
    batches = global_batches(buckets, seed, epoch, global_batch_size)
    assert all(len(batch) == global_batch_size for batch in batches)
    assert all(len({bucket_of[index] for index in batch}) == 1 for batch in batches)
    counts = Counter(index for batch in batches for index in batch)
    assert counts.keys() == bucket_of.keys()
    for indices in buckets.values():
        seen = [counts[index] for index in indices]
        assert max(seen) - min(seen) <= 1, "the remainder wraps around evenly"
        assert 0 <= sum(seen) - len(indices) < global_batch_size
    assert batches == global_batches(dict(reversed(buckets.items())), seed, epoch, global_batch_size)


def test_epochs_and_seeds_differ():
    buckets = {"a": list(range(50)), "b": list(range(50, 90))}
    orders = [global_batches(buckets, seed, epoch, 4) for seed in (0, 1) for epoch in (0, 1)]
    assert len({str(order) for order in orders}) == 4


def samples(streams: list[BatchStream], step: int) -> dict[int, tuple]:
    """By global sample number: what a loss would see of it, over all ranks and micro-batches."""
    found = {}
    for each in streams:
        for micro_batch in each.micro_batches(step):
            batch = micro_batch.batch
            for place, number in enumerate(micro_batch.numbers):
                length = int(batch.condition.prompt_emb_mask[place].sum())
                assert number not in found
                found[number] = (
                    batch.ids[place],
                    batch.target_latents[place],
                    batch.condition.prompt_emb[place, :length],
                    batch.condition.edit_latents[0][place],
                )
    return found


@pytest.mark.parametrize(("world_size", "micro_batch_size"), LAYOUTS)
def test_the_samples_of_a_step_do_not_depend_on_the_cut(world_size, micro_batch_size, stream):
    whole = [stream(caption_dropout=0.5)]
    cut = [
        stream(rank=rank, world_size=world_size, micro_batch_size=micro_batch_size, caption_dropout=0.5)
        for rank in range(world_size)
    ]
    for step in range(7):
        expected, found = samples(whole, step), samples(cut, step)
        assert sorted(found) == list(range(4 * step, 4 * step + 4))
        for number, values in expected.items():
            assert found[number][0] == values[0]
            assert all(torch.equal(*pair) for pair in zip(found[number][1:], values[1:], strict=True))


def test_steps_can_be_asked_for_in_any_order(stream):
    forward = [samples([stream()], step) for step in range(6)]
    again = stream()
    for step in (5, 0, 1, 2, 5, 3):
        assert [each[0] for each in samples([again], step).values()] == [each[0] for each in forward[step].values()]


def test_an_epoch_serves_every_record_and_the_next_one_in_another_order(reader, stream):
    each = stream()
    assert each.steps_per_epoch == 4  # buckets of 3, 3, 2 and 1 records
    epochs = [
        [micro.batch.ids for step in range(first, first + 4) for micro in each.micro_batches(step)] for first in (0, 4)
    ]
    ids = {record.id for record in reader}
    assert [{name for batch in epoch for name in batch} for epoch in epochs] == [ids, ids]
    assert epochs[0] != epochs[1]


def test_caption_dropout_replaces_the_instruction_at_its_rate(reader, stream):
    each = stream(caption_dropout=0.25)
    empty = {record.id: record.empty_prompt_emb for record in reader}
    dropped = [
        torch.equal(batch.condition.prompt_emb[place][batch.condition.prompt_emb_mask[place]], empty[name])
        for step in range(100)
        for batch in (each.micro_batches(step)[0].batch,)
        for place, name in enumerate(batch.ids)
    ]
    assert 0.18 < sum(dropped) / len(dropped) < 0.32  # 400 draws: the standard deviation is 0.022


def test_instructions_are_padded_on_the_right_and_masked(reader):
    records = [reader[index] for index in reader.buckets["8x12+8x12"]]
    records[1] = replace(records[1], prompt_emb=torch.cat([records[1].prompt_emb] * 2))
    batch = collate(records)
    assert isinstance(batch, Batch)
    for place, record in enumerate(records):
        length = len(record.prompt_emb)
        assert torch.equal(batch.condition.prompt_emb[place, :length], record.prompt_emb)
        assert not batch.condition.prompt_emb[place, length:].any()
        assert batch.condition.prompt_emb_mask[place].tolist() == [True] * length + [False] * (
            batch.condition.prompt_emb.shape[1] - length
        )
    assert batch.negative is not None
    assert batch.negative.edit_latents[0] is batch.condition.edit_latents[0]


def test_records_without_a_mask_have_nothing_to_preserve(reader):
    first, *others = (reader[index] for index in reader.buckets["8x12+8x12"])
    batch = collate([first, *others])
    assert batch.mask is not None
    assert batch.mask.shape == (len(others) + 1, 1, 8, 12)
    assert batch.mask[0].any()
    assert not batch.mask[1:].any()
    assert collate(others).mask is None
    assert collate([replace(first, negative_prompt_emb=None), *others]).negative is None


def test_white_is_expanded_and_not_copied(reader):
    batch = collate([reader[0], reader[0]])
    assert batch.sub_noise.shape == batch.target_latents.shape
    assert batch.sub_noise.stride(0) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_batch_size": 6}, r"must be a multiple of micro_batch_size \* world_size = 4 \* 1, got 6"),
        ({"caption_dropout": 1.0}, r"caption_dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_settings_are_refused(options, message, stream):
    with pytest.raises(ValueError, match=message):
        stream(**options)


def test_caption_dropout_needs_a_cache_that_has_empty_instructions(tmp_path, tiny_model_dir):
    cache_dataset(write_dataset(tmp_path, write_rows(tmp_path, 1)), tmp_path / "cache", tiny_model_dir)
    with pytest.raises(InputError, match="written without caption dropout"):
        BatchStream(
            CacheReader(tmp_path / "cache"), seed=0, global_batch_size=1, micro_batch_size=1, caption_dropout=0.1
        )
