"""What is encoded, and what is not encoded again: latents and embeddings have keys of their own."""

import os
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from data_prep.cache import digests
from data_prep.cache.encoding import Encoders
from data_prep.cache.index import INDEX_SCHEMA
from data_prep.cache.keys import check_files
from data_prep.cache.shards import read_arrow
from data_prep.errors import InputError
from data_prep.rows.rows import read_rows
from tests.caching import (
    CacheReader,
    cache_dataset,
    cached,
    load_encoders,
    newest,
    write_dataset,
    write_image,
    write_rows,
)
from tests.children import PATIENCE


class Counted:
    """Encoders that count the images and the instructions that they see."""

    def __init__(self, model_dir: Path):
        self._encoders = load_encoders(model_dir)
        self._vae, self._text = self._encoders.vae.encode, self._encoders.prompt_encoder.encode
        self.calls = Counter()

    def __call__(self) -> Encoders:
        self._encoders.vae.encode = self._encode  # ty: ignore
        self._encoders.prompt_encoder.encode = self._embed  # ty: ignore
        return self._encoders

    def taken(self) -> tuple[int, int]:
        """Images and instructions since the last time."""
        taken = self.calls["images"], self.calls["instructions"]
        self.calls.clear()
        return taken

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        self.calls["images"] += len(pixels)
        return self._vae(pixels)

    def _embed(self, prompt, images) -> torch.Tensor:
        self.calls["instructions"] += 1
        return self._text(prompt, images)


@pytest.fixture(scope="module")
def counted(tiny_model_dir) -> Counted:
    return Counted(tiny_model_dir)


@pytest.fixture
def build(tmp_path, tiny_model_dir, counted):
    """Caches rows in one folder, and says how many images and instructions that took."""

    def build(rows: list[dict], **options) -> tuple[int, int]:
        dataset = write_dataset(tmp_path, rows)
        cache_dataset(dataset, tmp_path / "cache", tiny_model_dir, load_encoders=counted, **options)
        return counted.taken()

    return build


def test_instructions_do_not_run_the_vae_and_images_no_text_that_stays(build, tmp_path):
    """Two rows of one reference each, which is the bridge's source: two images a row, and white of each size."""
    rows = write_rows(tmp_path, 2)
    assert build(rows) == (4 + 2, 2)
    rows[0]["prompt"] = "another instruction"
    assert build(rows) == (0, 1)
    assert build(rows, caption_dropout=True) == (0, 2)
    rows[1]["negative_prompt"] = ""
    assert build(rows, caption_dropout=True, negative=True) == (0, 0), "the empty instruction is there"
    rows[1]["negative_prompt"] = "dull"
    assert build(rows, negative=True) == (0, 1)
    all_background(tmp_path / "mask0.png")
    assert build(rows) == (2, 0)
    write_image(tmp_path / "t1.png", 77)
    assert build(rows) == (2, 0)
    write_image(tmp_path / "s1.png", 78)
    assert build(rows) == (2, 1)


def test_rows_share_what_they_have_in_common(build, tmp_path):
    """One photograph with two instructions, and one instruction for two targets."""
    first, second = write_rows(tmp_path, 2)
    rows = [
        first,
        {**first, "id": "other words", "prompt": "another"},
        {**first, "id": "other target", "image": second["image"], "back_mask": None},
    ]
    assert build(rows) == (2 + 3 + 2, 2), "the second target has another shape than its source"
    records = list(newest(tmp_path / "cache"))
    assert torch.equal(records[0].target_latents, records[1].target_latents)
    assert torch.equal(records[0].prompt_emb, records[2].prompt_emb)
    assert not torch.equal(records[0].prompt_emb, records[1].prompt_emb)
    assert records[0].bucket == "8x12+8x12"
    assert len({record.key for record in records}) == 3


def test_a_source_that_is_a_reference_is_stored_once(build, tmp_path):
    rows = write_rows(tmp_path, 2)
    rows[1]["edit_image"] = [rows[1]["edit_image"][0], write_image(tmp_path / "wide.png", 5, 96, 32)]
    build([rows[0], {**rows[1], "bridge_image": 1}])
    [shard] = (read_arrow(path) for path in (tmp_path / "cache/latents").iterdir())
    assert [value.is_valid for value in shard.column("source_latents")] == [False, True]
    first, second = newest(tmp_path / "cache")
    assert first.source_latents is first.edit_latents[0]
    assert second.source_latents.shape == second.target_latents.shape != second.edit_latents[1].shape


@pytest.mark.parametrize("broken", ["target", "instruction"])
def test_what_a_rejected_row_shares_with_others_is_encoded_all_the_same(broken, build, tmp_path):
    """The bad row is the first of those that want it."""
    first, second = write_rows(tmp_path, 2)
    bad = {**first, "id": "bad", "back_mask": None}
    if broken == "target":
        Path(tmp_path / "broken.png").write_bytes((tmp_path / "t0.png").read_bytes()[:100])
        bad["image"] = "broken.png"
    else:
        bad["prompt"] = "<|im_end|>"
    build([bad, {**first, "back_mask": None}, second], on_error="skip")
    assert [record.id for record in newest(tmp_path / "cache")] == ["r0", "r1"]


def all_background(path: Path) -> None:
    Image.new("L", (96, 64), 255).save(path)


CHANGES = {
    "mask": lambda folder, row: all_background(folder / row["back_mask"]),
    "bridge_image": lambda folder, row: row.update(bridge_image=1),
    "negative_prompt": lambda folder, row: row.update(negative_prompt="grey"),
    "prompt": lambda folder, row: row.update(prompt="another"),
    "source": lambda folder, row: write_image(folder / row["edit_image"][0], 901, 96),
    "target": lambda folder, row: write_image(folder / row["image"], 902, 96),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_a_row_says_is_in_its_records(change, build, tmp_path):
    """After the change the folder gives what an empty one gives, and a record of another key."""
    [row] = write_rows(tmp_path, 1)
    row["edit_image"].append("r0.png")
    build([row], negative=True)
    [before] = newest(tmp_path / "cache")
    CHANGES[change](tmp_path, row)
    build([row], negative=True)
    [after] = newest(tmp_path / "cache")
    (tmp_path / "cache").rename(tmp_path / "old")
    build([row], negative=True)
    [anew] = newest(tmp_path / "cache")
    assert before.key != after.key == anew.key

    def same(one, other) -> bool:
        names = "target_latents", "source_latents", "prompt_emb", "negative_prompt_emb", "mask"
        return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)

    assert same(after, anew)
    assert not same(after, before)


def test_a_folder_serves_many_datasets_and_says_which_it_has(tmp_path, tiny_model_dir, counted):
    rows, cache = write_rows(tmp_path, 3), tmp_path / "cache"
    one = cache_dataset(
        write_dataset(tmp_path, rows[:2]), cache, tiny_model_dir, name="one.json", load_encoders=counted
    )
    two = cache_dataset(
        write_dataset(tmp_path, rows[1:]), cache, tiny_model_dir, name="two.json", load_encoders=counted
    )
    assert (one.num_encoded, two.num_encoded) == (2, 1)
    assert [record.id for record in CacheReader(cache, one.dataset)] == ["r0", "r1"]
    assert [record.id for record in cached(cache, tmp_path / "rows.json")] == ["r1", "r2"]
    with pytest.raises(InputError, match=r"several datasets \(one.json, two.json\): name the one"):
        CacheReader(cache)
    rows[1]["prompt"] = "edited since"
    with pytest.raises(InputError, match=r"no index of this dataset .* but of one.json, two.json: run with phases="):
        cached(cache, write_dataset(tmp_path, rows))


def test_an_index_with_what_is_wanted_is_preferred_and_one_with_more_is_taken(build, tmp_path):
    rows = write_rows(tmp_path, 1)
    build(rows, caption_dropout=True)
    dataset, cache = tmp_path / "rows.json", tmp_path / "cache"
    assert cached(cache, dataset).header.caption_dropout
    build(rows)
    assert not cached(cache, dataset).header.caption_dropout


def test_encoders_of_another_dtype_share_nothing_and_each_finds_its_own(build, tmp_path):
    """Although both store the same one, and both runs have the same data."""
    rows = write_rows(tmp_path, 1)
    folder, dtypes = tmp_path / "cache", ("bfloat16", "float32")
    assert build(rows, dtype="bfloat16") == (2 + 1, 1)
    assert build(rows, dtype="bfloat16", encoder_dtype="float32") == (2 + 1, 1)
    assert build(rows, dtype="bfloat16") == (0, 0)
    readers = [CacheReader(folder, encoder_dtype=dtype) for dtype in dtypes]
    assert [reader.header.encoder_dtype for reader in readers] == [*dtypes]
    assert readers[0].keys == readers[1].keys
    with pytest.raises(InputError, match=r"written with another model.dtype \(.*, now float16\): rebuild"):
        CacheReader(folder, encoder_dtype="float16")


def test_the_index_is_the_same_whichever_was_used_last(build, tmp_path):
    """Ranks look for it one after the other, while another run may use one of them."""
    rows = write_rows(tmp_path, 1)
    build(rows)
    build(rows, encoder_dtype="bfloat16")
    one, other = (tmp_path / "cache/indexes").glob("*.arrow")
    found = []
    for times in ((1, 2), (2, 1)):
        for path, time in zip((one, other), times, strict=True):
            os.utime(path, (time, time))
        found.append(CacheReader(tmp_path / "cache").header)
    assert found[0] == found[1]


def test_a_finished_cache_is_recognised_without_reading_a_file(build, tmp_path, monkeypatch):
    rows = write_rows(tmp_path, 2)
    for path in tmp_path.glob("*.png"):
        os.utime(path, (1, 1))
    build(rows)
    read = []
    digest = digests.file_digest
    monkeypatch.setattr(digests, "file_digest", lambda path: read.append(path.name) or digest(path))
    assert build(rows) == (0, 0)
    assert read == []
    write_image(tmp_path / "t1.png", 77)
    os.utime(tmp_path / "t1.png", (1, 2))
    assert build(rows) == (2, 0)
    assert read == ["t1.png"]


def test_pictures_that_changed_in_place_are_refused_and_those_rewritten_alike_are_not(build, tmp_path, monkeypatch):
    rows = write_rows(tmp_path, 3)
    rows[1]["ref_gt"] = "t0.png"
    for path in tmp_path.glob("*.png"):
        os.utime(path, (1, 1))
    build(rows, caption_dropout=True, negative=True)
    reader, read, digest = CacheReader(tmp_path / "cache"), [], digests.file_digest
    assert list(reader.rows) == list(read_rows(tmp_path / "rows.json"))
    monkeypatch.setattr(digests, "file_digest", lambda path: read.append(path.name) or digest(path))
    check_files(reader)
    assert read == []
    os.utime(tmp_path / "s1.png", (2, 2))
    for _ in range(2):
        check_files(reader)
    assert read == ["s1.png"]
    (tmp_path / "t0.png").unlink()
    check_files(reader)
    write_image(tmp_path / "r2.png", 77, 96)
    with pytest.raises(
        InputError, match=r"the images of 1 of 3 rows have changed .* the first is row 3 \(.*t2.png\): run with phases="
    ):
        check_files(reader)
    build(rows[1:2] + rows[2:], caption_dropout=True, negative=True, on_error="skip")
    check_files(cached(tmp_path / "cache", tmp_path / "rows.json"))


def test_a_file_written_just_now_is_read_again(build, tmp_path):
    """It could still change within one tick of the file system's clock."""
    rows = write_rows(tmp_path, 1)
    build(rows)
    times = (tmp_path / "t0.png").stat()
    write_image(tmp_path / "t0.png", 77, 96)
    content = (tmp_path / "t0.png").read_bytes()
    (tmp_path / "t0.png").write_bytes(content + bytes(max(0, times.st_size - len(content))))
    os.utime(tmp_path / "t0.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert build(rows) == (2, 0)


def test_two_builds_at_once_in_one_folder_both_finish(tmp_path, tiny_model_dir, counted):
    """Of the same rows, on two ranks each."""
    dataset, done = write_dataset(tmp_path, write_rows(tmp_path, 5)), []

    def run(job: str, rank: int, barrier: threading.Barrier) -> None:
        ranks = {"rank": rank, "world_size": 2, "barrier": barrier.wait, "job": job, "load_encoders": counted}
        done.append(cache_dataset(dataset, tmp_path / "cache", tiny_model_dir, **ranks).num_rows)

    barriers = {job: threading.Barrier(2, timeout=PATIENCE) for job in "ab"}
    threads = [threading.Thread(target=run, args=(job, rank, barriers[job])) for job in barriers for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == [5] * 4
    assert [record.id for record in newest(tmp_path / "cache")] == [f"r{number}" for number in range(5)]


def test_a_build_that_ends_does_not_unmark_another_of_the_same_rows(tmp_path, tiny_model_dir, counted):
    dataset, cache = write_dataset(tmp_path, write_rows(tmp_path, 1)), tmp_path / "cache"
    marked = []

    def load() -> Encoders:
        cache_dataset(dataset, cache, tiny_model_dir, load_encoders=counted)
        marked.extend(cache.glob("work/*.building"))
        return counted()

    cache_dataset(dataset, cache, tiny_model_dir, load_encoders=load)
    assert len(marked) == 1
    assert not list(cache.glob("work/*"))


def test_the_text_of_rows_may_be_larger_than_two_gigabytes():
    """Arrow's plain strings hold 2 GiB a column of a batch."""
    assert str(INDEX_SCHEMA.field("row").type) == "large_string"
