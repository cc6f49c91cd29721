"""Records of rows at several areas, in further versions and without a source: each is what a dataset of its own would hold."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from PIL import Image, ImageOps

from data_prep.cache.batches import collate
from data_prep.cache.digests import FileDigests
from data_prep.cache.index import CacheHeader, DatasetDigest, row_from_json, row_json
from data_prep.cache.keys import check_files, latents_key, record_key, text_key
from data_prep.cache.order import Order
from data_prep.cache.reader import CacheReader
from data_prep.cache.shards import read_table
from data_prep.rows.augmentation import Augment, Augmentation
from data_prep.rows.mixture import DatasetSource, read_mixture
from data_prep.rows.rows import Row
from tests.caching import GEOMETRY, cache_rows, load_encoders, write_dataset, write_image, write_mask

SMALL = 32 * 64
HEADER = CacheHeader("tiny", GEOMETRY, "float32", False, False)


@pytest.fixture(scope="module")
def encoders(tiny_model_dir):
    return load_encoders(tiny_model_dir)


@pytest.fixture
def cache(tmp_path, tiny_model_dir, encoders):
    """Caches rows in one folder and reads them."""

    def cache(rows: list[Row], folder: str = "cache") -> tuple[int, CacheReader]:
        summary = cache_rows(rows, tmp_path / folder, tiny_model_dir, load_encoders=lambda: encoders)
        return summary.num_encoded, CacheReader(tmp_path / folder, summary.dataset)

    return cache


def rows_of(folder: Path, rows: list[dict], augment: Augment | None = None, **options) -> list[Row]:
    source = DatasetSource(str(write_dataset(folder, rows)), **options)
    return [row for row in read_mixture([source], augment or Augment(), text_to_image=True) if isinstance(row, Row)]


def pair(folder: Path, **cells) -> dict:
    names = {"image": write_image(folder / "t.png", 1, 96), "edit_image": write_image(folder / "s.png", 2, 96)}
    return {"prompt": "make it blue", **names, "back_mask": write_mask(folder / "m.png", 96), **cells}


def test_a_row_at_two_areas_is_two_records_with_one_embedding(cache, tmp_path):
    rows = rows_of(tmp_path, [pair(tmp_path)], resolutions={SMALL: 1, GEOMETRY.max_pixels: 3})
    _, reader = cache(rows)
    small, large = reader
    assert [small.bucket, large.bucket] == ["4x8+4x8", "8x12+8x12"]
    assert torch.equal(small.prompt_emb, large.prompt_emb)
    assert reader.weights is not None
    assert reader.weights.tolist() == [0.25, 0.75]
    plain = rows_of(tmp_path, [pair(tmp_path)])
    encoded, alone = cache(plain)
    assert encoded == 0, "the area of the configuration is that of a dataset without areas"
    assert torch.equal(alone[0].target_latents, large.target_latents)
    assert alone.weights is None


def test_a_mirrored_version_is_that_of_mirrored_files(cache, tmp_path):
    row = pair(tmp_path)
    _, reader = cache(rows_of(tmp_path, [row], Augment(1)))
    mirrored = tmp_path / "mirrored"
    mirrored.mkdir()
    for name in ("t.png", "s.png", "m.png"):
        ImageOps.mirror(Image.open(tmp_path / name)).save(mirrored / name)
    _, expected = cache(rows_of(mirrored, [row]), "expected")
    assert len(reader) == 2
    mine, theirs = reader[1], expected[0]
    assert mine.id == "row-000001+1"
    assert torch.equal(mine.target_latents, theirs.target_latents)
    assert torch.equal(mine.edit_latents[0], theirs.edit_latents[0])
    assert torch.equal(mine.prompt_emb, theirs.prompt_emb)
    assert mine.mask is not None
    assert theirs.mask is not None
    assert torch.equal(mine.mask, theirs.mask)
    assert not torch.equal(reader[0].prompt_emb, reader[1].prompt_emb), "the text encoder sees the mirrored source"


def test_each_version_has_keys_of_its_own(tmp_path):
    plain, *versions = rows_of(tmp_path, [pair(tmp_path)], Augment(3, crop=0.8))
    digest = FileDigests(tmp_path / "digests")
    for key in (record_key, latents_key, lambda *of: text_key(of[0], "make it blue", *of[1:])):
        keys = [key(row, HEADER, digest) for row in (plain, *versions)]
        assert len(set(keys)) == 4
        again = [key(row, HEADER, digest) for row in rows_of(tmp_path, [pair(tmp_path)], Augment(3, crop=0.8))]
        assert again == keys
    with_mask, without = versions[0], replace(versions[0], back_mask=None)
    assert text_key(with_mask, "x", HEADER, digest) != text_key(without, "x", HEADER, digest), "the mask moves the crop"
    areas = [replace(plain, max_pixels=area) for area in (None, SMALL, 2 * SMALL)]
    assert len({record_key(row, HEADER, digest) for row in areas}) == 3
    assert len({text_key(row, "x", HEADER, digest) for row in areas}) == 1


def test_text_to_image_has_no_source_and_its_own_template(cache, tmp_path, encoders):
    rows = [
        {"prompt": "A red cup", "image": write_image(tmp_path / "a.png", 1)},
        {"prompt": "Make it red", "image": "a.png", "edit_image": write_image(tmp_path / "b.png", 2)},
        {"prompt": "Both", "image": "a.png", "edit_image": ["b.png", write_image(tmp_path / "c.png", 3), "a.png"]},
    ]
    _, reader = cache(rows_of(tmp_path, rows))
    record = reader[0]
    assert [each.bucket for each in reader] == ["8x8", "8x8+8x8", "8x8+8x8+8x8+8x8"]
    assert (record.source_latents, record.edit_latents) == (None, [])
    assert torch.equal(record.prompt_emb, encoders.prompt_encoder.encode("A red cup", []))
    batch = collate([record, record])
    assert (batch.source_latents, batch.condition.edit_latents) == (None, [])
    assert cache(rows_of(tmp_path, rows))[0] == 0


def test_an_index_gives_the_rows_back(cache, tmp_path):
    rows = rows_of(
        tmp_path, [pair(tmp_path, weight=3), pair(tmp_path, prompt="left")], Augment(2, crop=0.8), weight=2.0
    )
    assert [row_from_json(row_json(row)) for row in rows] == rows
    encoded, reader = cache(rows)
    assert (encoded, list(reader.rows)) == (6, rows)
    assert cache(rows)[0] == 0
    check_files(reader)
    heavier = [replace(row, weight=row.weight * row.number) for row in rows]
    encoded, other = cache(heavier)
    assert encoded == 0
    assert reader.weights is not None
    assert other.weights is not None
    assert other.weights.tolist() != reader.weights.tolist()
    order = Order(reader.buckets, 0, 1, 8, reader.weights)
    assert sorted({int(index) for step in range(9) for [index] in order.groups(step)}) == [*range(6)]


def test_a_dataset_without_any_of_it_is_known_as_before(cache, tmp_path):
    """By what its rows say; and an index that was written before there were weights draws all rows alike."""
    rows = rows_of(tmp_path, [pair(tmp_path, id="one")])
    values = json.loads(row_json(rows[0]))
    assert [*values][-1] == "group"
    versions = [replace(rows[0], weight=2.0), replace(rows[0], max_pixels=SMALL)]
    versions.append(replace(rows[0], augmentation=Augmentation(1, True)))
    assert len({str(DatasetDigest([row])) for row in (*rows, *versions)}) == 4
    _, reader = cache(rows)
    [path] = (tmp_path / "cache" / "indexes").glob("*.arrow")
    lines = read_table(path).drop_columns(["weight"])
    written = path.with_suffix(".new")
    with pa.OSFile(str(written), "wb") as file, pa.ipc.new_file(file, lines.schema) as out:
        out.write_table(lines)
    written.replace(path)
    earlier = CacheReader(tmp_path / "cache")
    assert earlier.weights is None
    assert earlier[0].key == reader[0].key
