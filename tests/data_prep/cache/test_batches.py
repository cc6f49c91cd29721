"""The order of the data is a pure function of the seed and the step, however the work is cut."""

import math
from dataclasses import replace

import pytest
import torch

from data_prep.cache.batches import BatchStream, collate
from data_prep.cache.reader import CacheReader
from data_prep.errors import InputError
from losses.batch import Batch
from tests.caching import cache_dataset, write_dataset, write_rows

CUTS = [(1, 4), (1, 2), (1, 1), (2, 4), (2, 2), (2, 1), (3, 1), (4, 1), (8, 1)]  # world size, micro-batch size
GLOBAL_BATCH, GROUP = 8, 4


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


def samples(streams: list[BatchStream], step: int) -> dict[int, tuple]:
    """By global sample number: what a loss would see of it, over all ranks and micro-batches that count."""
    found = {}
    for each in streams:
        for micro_batch in each.micro_batches(step):
            batch = micro_batch.batch
            for place, number in enumerate(micro_batch.random.numbers):
                length = int(batch.condition.prompt_emb_mask[place].sum())
                if micro_batch.share:
                    assert number not in found
                    found[number] = (
                        batch.ids[place],
                        batch.target_latents[place],
                        batch.condition.prompt_emb[place, :length],
                        batch.condition.edit_latents[0][place],
                    )
    return found


@pytest.mark.parametrize(("world_size", "micro_batch_size"), CUTS)
def test_the_samples_of_a_step_do_not_depend_on_the_cut(world_size, micro_batch_size, stream):
    """Nor does what each counts: 1 over the samples of the step, on whatever rank. Buckets have 3, 3, 2 and 1 records."""
    sizes = {"global_batch_size": GLOBAL_BATCH, "group_size": GROUP, "caption_dropout": 0.5}
    whole = [stream(**sizes)]
    cut = [
        stream(rank=rank, world_size=world_size, micro_batch_size=micro_batch_size, **sizes)
        for rank in range(world_size)
    ]
    for step in range(7):
        expected, found = samples(whole, step), samples(cut, step)
        assert found.keys() == expected.keys()
        assert len(found) == cut[0].num_samples(step) < GLOBAL_BATCH, "no bucket fills a group"
        assert {number // GLOBAL_BATCH for number in found} == {step}
        for number, values in expected.items():
            assert found[number][0] == values[0]
            assert all(torch.equal(*pair) for pair in zip(found[number][1:], values[1:], strict=True))
        rounds = [each.micro_batches(step) for each in cut]
        assert len({len(mine) for mine in rounds}) == 1, "every rank makes the same number of forwards"
        needed = sum(math.ceil(size / micro_batch_size) for size in map(len, cut[0].order.groups(step)))
        assert len(rounds[0]) == math.ceil(needed / world_size), "and no more than are needed"
        shares = [micro.share / len(micro.random.numbers) for mine in rounds for micro in mine if micro.share]
        assert shares == pytest.approx([1 / len(found)] * len(shares))
        assert sum(micro.share for mine in rounds for micro in mine) == pytest.approx(1)


def test_ranks_know_what_the_others_compute_at_the_same_time(stream):
    ranks = [stream(global_batch_size=8, micro_batch_size=1, group_size=4, rank=r, world_size=2) for r in range(2)]
    for step in range(4):
        for together in zip(*(each.micro_batches(step) for each in ranks), strict=True):
            numbers = [each.random.everywhere.numbers for each in together]
            assert numbers[0] == numbers[1] == sorted({n for each in together for n in each.random.numbers})


def test_a_group_is_a_micro_batch_by_default(stream):
    for size in (1, 2, 4):
        by_default, named = stream(micro_batch_size=size), stream(micro_batch_size=size, group_size=size)
        for step in range(5):
            assert samples([by_default], step).keys() == samples([named], step).keys()
    assert str(stream(global_batch_size=8, micro_batch_size=2)) == (
        "9 records in 4 buckets: 1.5 steps per epoch, each with 8 places in groups of 2 from one bucket; "
        "25.0% of the places stay empty"
    )


def test_steps_can_be_asked_for_in_any_order(stream):
    forward = [samples([stream()], step) for step in range(6)]
    again = stream()
    for step in (5, 0, 1, 2, 5, 3):
        assert [each[0] for each in samples([again], step).values()] == [each[0] for each in forward[step].values()]


def test_caption_dropout_replaces_the_instruction_at_its_rate(reader, stream):
    each = stream(caption_dropout=0.25)
    empty = {record.id: record.empty_prompt_emb for record in reader}
    dropped = [
        torch.equal(batch.condition.prompt_emb[place][batch.condition.prompt_emb_mask[place]], empty[name])
        for step in range(180)
        for batch in (micro.batch for micro in each.micro_batches(step))
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
        ({"global_batch_size": 6}, r"train.group_size=4 does not divide the global batch of 6"),
        ({"group_size": 2}, r"train.group_size=2 is not a multiple of train.micro_batch_size=4"),
        ({"caption_dropout": 1.0}, r"caption_dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_settings_are_refused(options, message, stream):
    with pytest.raises((InputError, ValueError), match=message):
        stream(**options)


def test_caption_dropout_needs_a_cache_that_has_empty_instructions(tmp_path, tiny_model_dir):
    cache_dataset(write_dataset(tmp_path, write_rows(tmp_path, 1)), tmp_path / "cache", tiny_model_dir)
    with pytest.raises(InputError, match="written without caption dropout"):
        BatchStream(
            CacheReader(tmp_path / "cache"), seed=0, global_batch_size=1, micro_batch_size=1, caption_dropout=0.1
        )
