"""The cache: everything once, nothing stale, nothing lost."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
import torch
from PIL import Image

from data_prep.cache import encoding, keys
from data_prep.cache.batches import BatchStream, collate
from data_prep.cache.encoding import Encoders
from data_prep.cache.index import CacheHeader
from data_prep.cache.keys import record_key
from data_prep.cache.reader import CacheReader, Record
from data_prep.cache.shards import read_arrow, read_table, write_arrow
from data_prep.cache.sizes import cached_sizes, estimated_sizes
from data_prep.cache.writer import build_cache
from data_prep.check.measures.column_store import Columns
from data_prep.check.report.summary import lay_out
from data_prep.errors import InputError
from data_prep.model.geometry import Geometry, Size, fit, stretch, to_pixels
from data_prep.rows.images import RejectedImage, open_image
from data_prep.rows.rows import Row, read_rows
from eval.qwen.encoding import reference_sizes
from tests.caching import (
    GEOMETRY,
    cache_dataset,
    load_encoders,
    newest,
    write_dataset,
    write_image,
    write_mask,
    write_rows,
)
from tests.children import PATIENCE, started, wait_until


def refuse_to_load() -> Encoders:
    raise AssertionError("there is nothing to encode")


def tensors(record: Record) -> dict[str, torch.Tensor]:
    found = {name: value for name, value in vars(record).items() if isinstance(value, torch.Tensor)}
    return found | {f"edit_latents.{place}": value for place, value in enumerate(record.edit_latents)}


def assert_same_records(first: CacheReader, second: CacheReader, tolerance: float = 0.0):
    assert [record.row for record in first] == [record.row for record in second]
    for one, other in zip(first, second, strict=True):
        assert one.key == other.key
        torch.testing.assert_close(tensors(one), tensors(other), rtol=0, atol=tolerance)


def shard_keys(folder: Path) -> list[str]:
    return [key for path in (folder / "latents").iterdir() for key in read_arrow(path).column("key").to_pylist()]


def report(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "cache-rejected.jsonl").read_text().splitlines()]


def test_records_are_what_the_encoders_give_for_the_images_of_the_row(tmp_path, tiny_model_dir):
    row = {
        "prompt": "make it red",
        "image": write_image(tmp_path / "t.png", 1, 100, 70),
        "edit_image": [write_image(tmp_path / "a.png", 2, 64, 64), write_image(tmp_path / "b.png", 3, 130, 90)],
        "bridge_image": 1,
        "negative_prompt": "blurry",
        "back_mask": write_mask(tmp_path / "m.png", 50, 35),
    }
    summary = cache_dataset(
        write_dataset(tmp_path, [row]), tmp_path / "cache", tiny_model_dir, caption_dropout=True, negative=True
    )
    assert (summary.num_rows, summary.num_encoded, summary.rejected) == (1, 1, [])
    record = CacheReader(tmp_path / "cache", fingerprint="tiny", geometry=GEOMETRY)[0]

    encoders = load_encoders(tiny_model_dir)
    target, first, second = (open_image(tmp_path / name) for name in ("t.png", "a.png", "b.png"))
    size = GEOMETRY.target_size(Size.of(target))
    assert size == (64, 96)
    vision = [stretch(image, GEOMETRY.vision_size(Size.of(image))) for image in (first, second)]
    reference_sizes = [GEOMETRY.reference_size(Size.of(image)) for image in (first, second)]
    with torch.no_grad():
        latents = [encoders.vae.encode(to_pixels(fit(image, size))[None])[0] for image in (target, second)]
        references = [
            encoders.vae.encode(to_pixels(fit(image, each))[None])[0]
            for image, each in zip((first, second), reference_sizes, strict=True)
        ]
        white = encoders.vae.encode(to_pixels(Image.new("RGB", (96, 64), "white"))[None])[0]
        embeddings = [encoders.prompt_encoder.encode(text, vision) for text in ("make it red", " ", "blurry")]
    torch.testing.assert_close([record.target_latents, record.source_latents], latents)
    torch.testing.assert_close(record.edit_latents, references)
    torch.testing.assert_close(record.sub_noise, white)
    torch.testing.assert_close([record.prompt_emb, record.empty_prompt_emb, record.negative_prompt_emb], embeddings)
    assert record.mask is not None
    assert torch.equal(record.mask, torch.arange(12).lt(6).float().expand(1, 8, 12))
    assert record.row["back_mask"] == str(tmp_path / "m.png")


def test_an_original_and_its_smaller_target_have_one_grid(tmp_path, tiny_model_dir):
    """In the record, in the plan's estimate, in the report of `check` and in the editor."""
    source = write_image(tmp_path / "s.png", 1, 384, 192)
    row = {"prompt": "edit", "image": write_image(tmp_path / "t.png", 2, 64, 32), "edit_image": [source, source]}
    dataset = write_dataset(tmp_path, [row | {"bridge_image": 1}])
    cache_dataset(dataset, tmp_path / "cache", tiny_model_dir)
    record = newest(tmp_path / "cache")[0]
    assert torch.equal(record.edit_latents[1], record.source_latents)
    assert record.edit_latents[1].shape == record.target_latents.shape == (16, 4, 8)
    assert record.edit_latents[0].shape != record.target_latents.shape

    expected = Size(32, 64), (Size(64, 128), Size(32, 64))
    for sizes in (cached_sizes(tmp_path / "cache"), estimated_sizes(read_rows(dataset), GEOMETRY)):
        assert [(bucket.target, bucket.references) for bucket in sizes.buckets(GEOMETRY)] == [expected]
    measured = {"sizes": [(32, 64), (192, 384), (192, 384)], "tokens": 1, "drift": None, "hashes": [], "digest": "0"}
    with closing(Columns(tmp_path)) as columns:
        for row in read_rows(dataset):
            assert isinstance(row, Row)
            columns.add(row, measured)
        assert [(bucket.target, bucket.references) for bucket in lay_out(columns, GEOMETRY).buckets] == [expected]
    edited = reference_sizes([open_image(tmp_path / source)] * 2, Size(32, 64), GEOMETRY)
    assert edited == [Size(32, 64), Size(64, 128)]


def test_no_negative_prompt_is_the_empty_instruction_as_in_the_editor(tmp_path, tiny_model_dir):
    """In caption dropout and in guidance."""
    cache_dataset(
        write_dataset(tmp_path, write_rows(tmp_path, 1)),
        tmp_path / "cache",
        tiny_model_dir,
        caption_dropout=True,
        negative=True,
    )
    record = newest(tmp_path / "cache")[0]
    vision = [stretch(open_image(tmp_path / "s0.png"), GEOMETRY.vision_size(Size(64, 96)))]
    expected = load_encoders(tiny_model_dir).prompt_encoder.encode(" ", vision)
    assert record.negative_prompt_emb is not None
    assert record.empty_prompt_emb is not None
    assert torch.equal(record.negative_prompt_emb, expected)
    assert torch.equal(record.empty_prompt_emb, expected)


def test_each_row_has_one_of_the_instructions_that_are_preserved(tmp_path, tiny_model_dir):
    """Encoded with its own pictures, beside what is there; batches have them, and a cache without them is refused."""
    long = "make it red, all of it, and leave nothing as it was before"
    dataset, cache = write_dataset(tmp_path, write_rows(tmp_path, 2)), tmp_path / "cache"
    cache_dataset(dataset, cache, tiny_model_dir)
    asked = {"global_batch_size": 1, "micro_batch_size": 1, "seed": 0, "preserve": ("blur it", long)}
    with pytest.raises(InputError, match=r"lacks what data.preserve_prompts asks for: rebuild it"):
        BatchStream(CacheReader(cache), **asked)
    assert cache_dataset(dataset, cache, tiny_model_dir, preserve=["blur it", long]).num_encoded == 2
    assert sum(len(read_arrow(path)) for path in (cache / "latents").iterdir()) == 2, "no picture is encoded again"
    reader, encoder = CacheReader(cache, preserve=asked["preserve"]), load_encoders(tiny_model_dir).prompt_encoder
    for record, prompt in zip(reader, (long, "blur it"), strict=True):
        path = Path(record.row["edit_image"][0])
        vision = stretch(open_image(path), GEOMETRY.vision_size(Size.of(open_image(path))))
        assert torch.equal(record.preserve_prompt_emb, encoder.encode(prompt, [vision]))
        batch = collate([record])
        assert torch.equal(batch.preserved.prompt_emb[0], record.preserve_prompt_emb)
    assert CacheReader(cache)[0].preserve_prompt_emb is None
    lengths = [max(len(record.prompt_emb), len(record.preserve_prompt_emb)) for record in reader]
    assert [row.text_tokens for row in cached_sizes(cache, preserve=asked["preserve"]).rows] == lengths
    with pytest.raises(InputError, match=r"lacks what data.preserve_prompts asks for"):
        cached_sizes(cache, preserve=("sharpen it",))


def test_an_index_from_before_instructions_were_preserved_is_read(tmp_path, tiny_model_dir):
    cache = tmp_path / "cache"
    cache_dataset(write_dataset(tmp_path, write_rows(tmp_path, 2)), cache, tiny_model_dir)
    (path,) = (cache / "indexes").iterdir()
    lines = read_table(path)
    older = lines.drop_columns(["preserve_prompt"])
    write_arrow(path, older.to_pylist(), older.schema, 10)
    assert [record.preserve_prompt_emb for record in CacheReader(cache)] == [None, None]
    assert "preserve" not in lines.schema.metadata[b"header"].decode()


def test_another_empty_instruction_is_another_record_where_it_is_stored(tmp_path, monkeypatch):
    write_dataset(tmp_path, write_rows(tmp_path, 2))
    rows = [row for row in read_rows(tmp_path / "rows.json") if isinstance(row, Row)]
    for options in ((True, False), (False, True), (False, False)):
        header = CacheHeader("tiny", GEOMETRY, "float32", *options)
        before = [record_key(row, header) for row in rows]
        with monkeypatch.context() as patch:
            patch.setattr(keys, "EMPTY_PROMPT", "")
            after = [record_key(row, header) for row in rows]
        changed = [new != old for new, old in zip(after, before, strict=True)]
        # the second row has a negative prompt of its own
        assert changed == {(True, False): [True, True], (False, True): [True, False]}.get(options, [False, False])


def test_the_edit_of_a_mask_is_kept_whole(tmp_path, tiny_model_dir):
    """A stroke of one pixel on a photograph that is trained at half its size: 96 x 64 pixels."""
    rows = write_rows(tmp_path, 1)
    for name in ("t0.png", "s0.png"):
        write_image(tmp_path / name, 1, 192, 128)
    mask = Image.new("L", (192, 128), 255)
    mask.paste(0, (40, 20, 140, 21))
    mask.save(tmp_path / rows[0]["back_mask"])
    cache_dataset(write_dataset(tmp_path, rows), tmp_path / "cache", tiny_model_dir)
    record = newest(tmp_path / "cache")[0]
    assert record.mask is not None
    expected = torch.ones(1, 8, 12)
    expected[0, 1, 2:9] = 0
    assert torch.equal(record.mask, expected)


def test_a_finished_cache_is_a_no_op_and_one_changed_row_costs_one_record(tmp_path, tiny_model_dir):
    rows = write_rows(tmp_path)
    dataset, cache = write_dataset(tmp_path, rows), tmp_path / "cache"
    assert cache_dataset(dataset, cache, tiny_model_dir).num_encoded == 6
    before = list(newest(cache))
    assert cache_dataset(dataset, cache, tiny_model_dir, load_encoders=refuse_to_load).num_encoded == 0

    rows[4]["prompt"] = "another instruction"
    write_dataset(tmp_path, rows)
    assert cache_dataset(dataset, cache, tiny_model_dir).num_encoded == 1
    write_image(tmp_path / "s2.png", 999, 96)
    assert cache_dataset(dataset, cache, tiny_model_dir).num_encoded == 1
    changed = [new.key != old.key for new, old in zip(newest(cache), before, strict=True)]
    assert changed == [False, False, True, False, True, False]


def test_progress_in_a_file_is_lines_with_the_rate_and_the_time_left(tmp_path, tiny_model_dir, capsys):
    cache_dataset(write_dataset(tmp_path, write_rows(tmp_path, 2)), tmp_path / "cache", tiny_model_dir)
    assert re.search(r"^caching 2/2, [\d.]+ samples/s, 00:00:00 left$", capsys.readouterr().err, re.MULTILINE)


def test_the_view_follows_the_file_and_names_do_not_matter(tmp_path, tiny_model_dir):
    rows = write_rows(tmp_path)
    cache_dataset(write_dataset(tmp_path, rows), tmp_path / "cache", tiny_model_dir)
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path, moved, ignore=shutil.ignore_patterns("cache*"))
    (moved / "t3.png").rename(moved / "renamed.png")
    rows[3]["image"] = "renamed.png"
    write_dataset(moved, [rows[5], rows[3], rows[0]])
    summary = cache_dataset(moved / "rows.json", tmp_path / "cache", tiny_model_dir, load_encoders=refuse_to_load)
    reader = newest(tmp_path / "cache")
    assert (summary.num_rows, summary.num_encoded) == (3, 0)
    assert [(record.id, record.row["number"]) for record in reader] == [("r5", 1), ("r3", 2), ("r0", 3)]
    assert reader[1].row["image"] == str(moved / "renamed.png")


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "another model"},
        {"geometry": Geometry(64 * 64, vision_pixels=112 * 112)},
        {"dtype": "bfloat16"},
        {"caption_dropout": True},
        {"negative": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_records_depend_on_makes_them_anew_and_going_back_is_free(change, tmp_path, tiny_model_dir):
    dataset, cache = write_dataset(tmp_path, write_rows(tmp_path, 2)), tmp_path / "cache"
    cache_dataset(dataset, cache, tiny_model_dir)
    before = [record.key for record in newest(cache)]
    assert cache_dataset(dataset, cache, tiny_model_dir, **change).num_encoded == 2
    assert not {record.key for record in newest(cache)} & set(before)
    assert cache_dataset(dataset, cache, tiny_model_dir, load_encoders=refuse_to_load).num_encoded == 0
    assert [record.key for record in newest(cache)] == before


def test_rows_with_the_same_contents_share_a_record(tmp_path, tiny_model_dir):
    rows = write_rows(tmp_path, 2)
    twin = {**rows[1], "id": "twin", "image": shutil.copy(tmp_path / "t1.png", tmp_path / "copy.png")}
    dataset = write_dataset(tmp_path, [rows[0], rows[1], twin | {"image": "copy.png"}])
    summary = cache_dataset(dataset, tmp_path / "cache", tiny_model_dir)
    reader = newest(tmp_path / "cache")
    assert (summary.num_rows, summary.num_encoded) == (3, 2)
    assert [record.id for record in reader] == ["r0", "r1", "twin"]
    assert reader[1].key == reader[2].key


def test_images_of_one_size_are_encoded_together(tmp_path, tiny_model_dir):
    shapes = []

    class Watched:
        def __init__(self, vae):
            self.vae = vae

        def encode(self, pixels):
            shapes.append(tuple(pixels.shape))
            return self.vae.encode(pixels)

    def load() -> Encoders:
        encoders = load_encoders(tiny_model_dir)
        return Encoders(Watched(encoders.vae), encoders.prompt_encoder)

    rows = [{**row, "edit_image": row["edit_image"][:1]} for row in write_rows(tmp_path)]
    dataset = write_dataset(tmp_path, rows)
    cache_dataset(dataset, tmp_path / "cache", tiny_model_dir, load_encoders=load, batch_size=4, shard_size=6)
    # Three rows of each size, each with a target and a source that is also the reference; one white of each size.
    assert Counter(shapes) == Counter({(b, 3, 64, width): 1 for b in (1, 2, 4) for width in (64, 96)})


def test_two_ranks_write_what_one_writes(tmp_path, tiny_model_dir):
    dataset = write_dataset(tmp_path, write_rows(tmp_path, 7))
    one = cache_dataset(dataset, tmp_path / "one", tiny_model_dir)
    barrier, summaries = threading.Barrier(2, timeout=PATIENCE), {}

    def run(rank: int):
        ranks = {"rank": rank, "world_size": 2, "barrier": barrier.wait}
        summaries[rank] = cache_dataset(dataset, tmp_path / "two", tiny_model_dir, **ranks)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [summaries[rank].num_encoded for rank in range(2)] == [one.num_encoded] * 2 == [7, 7]
    assert len(shard_keys(tmp_path / "two")) == len(set(shard_keys(tmp_path / "two"))) == 7
    # The batches of the VAE are cut differently, which moves the last bits of float32.
    assert_same_records(newest(tmp_path / "one"), newest(tmp_path / "two"), tolerance=1e-4)
    assert not list((tmp_path / "two").rglob("*.json"))


def test_ranks_that_refuse_leave_no_messages(tmp_path, tiny_model_dir):
    dataset = write_dataset(tmp_path, spoil(tmp_path))
    barrier, refused = threading.Barrier(2, timeout=PATIENCE), []

    def run(rank: int):
        ranks = {"rank": rank, "world_size": 2, "barrier": barrier.wait, "load_encoders": refuse_to_load}
        with pytest.raises(InputError, match="3 of 7 rows cannot be used"):
            cache_dataset(dataset, tmp_path / "cache", tiny_model_dir, **ranks)
        refused.append(rank)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(refused) == [0, 1]
    assert not list((tmp_path / "cache/work").iterdir())


CHILD = """
import sys
from pathlib import Path
from tests.caching import cache_dataset
dataset, cache, model = map(Path, sys.argv[1:])
cache_dataset(dataset, cache, model)
"""


def test_a_killed_build_continues_where_it_was(tmp_path, tiny_model_dir):
    dataset, cache = write_dataset(tmp_path, write_rows(tmp_path, 40)), tmp_path / "cache"
    command = [sys.executable, "-c", CHILD, str(dataset), str(cache), str(tiny_model_dir)]
    with started(command, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: len(list(cache.glob("latents/*.arrow"))) >= 2, process)
    with pytest.raises(InputError, match="no finished cache"):
        CacheReader(cache)
    num_done = len(shard_keys(cache))
    assert num_done >= 4
    assert cache_dataset(dataset, cache, tiny_model_dir).num_encoded == 40 - num_done
    cache_dataset(dataset, tmp_path / "whole", tiny_model_dir)
    assert_same_records(newest(cache), newest(tmp_path / "whole"))


def spoil(folder: Path) -> list[dict]:
    """Six rows, of which 2 to 5 are bad in ways that show at different moments, and 7, which is not a row at all."""
    rows = write_rows(folder)
    (folder / "t1.png").unlink()
    rows[2]["edit_image"][1] = write_image(folder / "cut.png", 1)
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:200])
    rows[3]["back_mask"] = write_mask(folder / "mask3.png", 64, 32)
    rows[4]["ref_gt"] = "nowhere.png"
    return [*rows, {**rows[0], "id": "r6", "bridge_image": 7}]


def test_bad_rows_are_skipped_and_reported(tmp_path, tiny_model_dir):
    dataset = write_dataset(tmp_path, spoil(tmp_path))
    summary = cache_dataset(dataset, tmp_path / "cache", tiny_model_dir, on_error="skip")
    assert [record.id for record in newest(tmp_path / "cache")] == ["r0", "r5"]
    assert (summary.num_rows, summary.num_encoded) == (2, 2)
    assert [(row.number, row.path) for row in summary.rejected] == [
        (2, str(tmp_path / "t1.png")),
        (3, str(tmp_path / "cut.png")),
        (4, str(tmp_path / "mask3.png")),
        (5, str(tmp_path / "nowhere.png")),
        (7, str(dataset)),
    ]
    lines = report(tmp_path)
    assert [line["row"] for line in lines] == [2, 3, 4, 5, 7]
    assert lines[0] == {"row": 2, "id": "r1", "path": str(tmp_path / "t1.png"), "reason": "no such file"}
    assert lines[2]["reason"] == "the mask and its image have different shapes: 64x32, its image is 64x64"


@pytest.mark.parametrize(
    ("column", "prompt", "reason"),
    [
        ("prompt", "put <|image_pad|> here", r"the instruction holds <\|image_pad\|>, which the model reserves"),
        ("negative_prompt", "no <|im_end|>", r"the instruction holds <\|im_end\|>"),
        ("prompt", "red " * 5000, r"the instruction has \d+ tokens, the model takes at most 4096"),
    ],
)
def test_one_bad_prompt_is_a_rejected_row_and_the_others_are_cached(tmp_path, tiny_model_dir, column, prompt, reason):
    rows = write_rows(tmp_path, 3)
    rows[1][column] = prompt
    dataset = write_dataset(tmp_path, rows)
    summary = cache_dataset(dataset, tmp_path / "cache", tiny_model_dir, negative=True, on_error="skip")
    assert [record.id for record in newest(tmp_path / "cache")] == ["r0", "r2"]
    assert (summary.num_rows, summary.num_encoded) == (2, 2)
    [line] = report(tmp_path)
    assert (line["row"], line["id"]) == (2, "r1")
    assert re.match(reason, line["reason"])


def test_what_cannot_be_encoded_is_tried_again_when_its_contents_change(tmp_path, tiny_model_dir):
    """Not at every start: a cache with a broken picture and a bad prompt is finished, and says so each time."""
    rows = write_rows(tmp_path, 3)
    good = (tmp_path / "t0.png").read_bytes()
    (tmp_path / "t0.png").write_bytes(good[:200])
    rows[1]["prompt"] = "put <|image_pad|> here"
    build = functools.partial(
        cache_dataset, write_dataset(tmp_path, rows), tmp_path / "cache", tiny_model_dir, on_error="skip"
    )
    first = build()
    assert [row.number for row in first.rejected] == [1, 2]
    again = build(load_encoders=refuse_to_load)
    assert (again.rejected, again.num_rows, again.num_encoded) == (first.rejected, 1, 0)
    assert [line["row"] for line in report(tmp_path)] == [1, 2]
    with pytest.raises(AssertionError, match="nothing to encode"):
        build(load_encoders=refuse_to_load, on_error="raise")
    (tmp_path / "t0.png").write_bytes(good)
    assert [row.number for row in build().rejected] == [2]


def test_what_the_disk_refused_is_tried_again(tmp_path, tiny_model_dir, monkeypatch):
    dataset, cache = write_dataset(tmp_path, write_rows(tmp_path, 2)), tmp_path / "cache"

    def fail(path):
        if Path(path).name == "t0.png":
            raise RejectedImage(Path(path), "cannot be read: Input/output error", lasting=False)
        return open_image(path)

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "open_image", fail)
        assert cache_dataset(dataset, cache, tiny_model_dir, on_error="skip").num_rows == 1
    assert cache_dataset(dataset, cache, tiny_model_dir, on_error="skip").num_rows == 2


def test_unreadable_files_stop_a_strict_build_before_anything_is_encoded(tmp_path, tiny_model_dir):
    dataset = write_dataset(tmp_path, spoil(tmp_path))
    message = r"row 2 \(.*t1\.png\): no such file\. 3 of 7 rows cannot be used, all listed in .*: fix them or set"
    with pytest.raises(InputError, match=message):
        cache_dataset(dataset, tmp_path / "cache", tiny_model_dir, load_encoders=refuse_to_load)
    assert [line["row"] for line in report(tmp_path)] == [2, 5, 7]


def test_broken_images_stop_a_strict_build_and_the_good_records_stay(tmp_path, tiny_model_dir):
    rows = write_rows(tmp_path)
    good = (tmp_path / "s3.png").read_bytes()
    (tmp_path / "s3.png").write_bytes(good[:200])
    dataset, cache = write_dataset(tmp_path, rows), tmp_path / "cache"
    with pytest.raises(InputError, match=r"row 4 .* 1 of 6 rows"):
        cache_dataset(dataset, cache, tiny_model_dir)
    with pytest.raises(InputError, match="no finished cache"):
        CacheReader(cache)
    (tmp_path / "s3.png").write_bytes(good)
    assert cache_dataset(dataset, cache, tiny_model_dir).num_encoded == 1
    assert report(tmp_path) == []


def test_a_data_set_without_a_usable_row_is_an_error(tmp_path, tiny_model_dir):
    dataset = write_dataset(tmp_path, [{"prompt": "p", "image": "a.png", "edit_image": "b.png"}])
    with pytest.raises(InputError, match="1 of 1 rows cannot be used"):
        cache_dataset(dataset, tmp_path / "cache", tiny_model_dir, on_error="skip")
    with pytest.raises(InputError, match="no rows to cache"):
        build_cache([], CacheHeader("tiny", GEOMETRY), refuse_to_load, tmp_path / "no", rejected_path=tmp_path / "r")


def test_damaged_and_lost_parts_are_made_again(tmp_path, tiny_model_dir):
    dataset, cache = write_dataset(tmp_path, write_rows(tmp_path)), tmp_path / "cache"
    cache_dataset(dataset, cache, tiny_model_dir)
    whole = [tensors(record) for record in newest(cache)]
    damaged, lost, _ = (cache / "latents").iterdir()
    damaged.write_bytes(damaged.read_bytes()[:1000])
    lost.unlink()
    with pytest.raises(InputError, match=r"has lost latents/.* rebuild it with phases="):
        newest(cache)
    assert cache_dataset(dataset, cache, tiny_model_dir).num_encoded == 4
    white = next(path for path in (cache / "sub_noise").iterdir() if path.name.startswith("8x12-"))
    white.unlink()
    with pytest.raises(InputError, match="has lost 8x12"):
        newest(cache)[0]
    assert cache_dataset(dataset, cache, tiny_model_dir).num_encoded == 3
    for record, expected in zip(newest(cache), whole, strict=True):
        torch.testing.assert_close(tensors(record), expected)


@pytest.mark.parametrize("folder", ["latents", "texts"])
def test_a_shard_that_vanishes_under_a_reader_is_said_to_be_lost(folder, tmp_path, tiny_model_dir):
    cache = tmp_path / "cache"
    cache_dataset(write_dataset(tmp_path, write_rows(tmp_path, 1)), cache, tiny_model_dir)
    reader = newest(cache)
    [shard] = (cache / folder).iterdir()
    shard.unlink()
    with pytest.raises(InputError, match=rf"has lost {folder}/{shard.name}: rebuild it with phases="):
        reader[0]


def test_what_a_kill_left_half_written_is_cleared_once_it_is_old(tmp_path, tiny_model_dir):
    cache = tmp_path / "cache"
    cache_dataset(write_dataset(tmp_path, write_rows(tmp_path, 1)), cache, tiny_model_dir)
    old, new = cache / "latents" / ".a.arrow.1.tmp", cache / "latents" / ".a.arrow.2.tmp"
    old.touch()
    new.touch()
    os.utime(old, (0, 0))
    cache_dataset(write_dataset(tmp_path, write_rows(tmp_path, 2)), cache, tiny_model_dir)
    assert (old.exists(), new.exists()) == (False, True)
