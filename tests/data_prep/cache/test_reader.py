"""What the cache folder promises to those who read it, with this project's reader and without."""

import functools

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_prep.cache import index
from data_prep.cache.keys import latents_key, text_key
from data_prep.cache.reader import CacheReader, target_size
from data_prep.cache.shards import SUB_NOISE_SCHEMA, from_arrow, read_arrow, to_arrow, write_arrow
from data_prep.errors import InputError
from data_prep.model.geometry import Geometry
from data_prep.rows.images import file_digest
from data_prep.rows.rows import Row, read_rows
from tests.caching import GEOMETRY, cache_dataset, write_dataset, write_rows


@pytest.fixture(scope="module")
def cache(tmp_path_factory, tiny_model_dir):
    folder = tmp_path_factory.mktemp("records")
    dataset = write_dataset(folder, write_rows(folder))
    cache_dataset(dataset, folder / "cache", tiny_model_dir, dtype="bfloat16", caption_dropout=True)
    return folder / "cache"


@given(
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int64]),
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
)
def test_a_tensor_survives_arrow_bit_for_bit(tmp_path_factory, dtype, shape):
    tensor = (torch.rand(shape) * 100).to(dtype)
    path = tmp_path_factory.mktemp("tensor") / "one.arrow"
    write_arrow(path, [{"sub_noise": to_arrow(tensor.transpose(0, -1))}], SUB_NOISE_SCHEMA)
    back = from_arrow(read_arrow(path).column("sub_noise")[0])
    assert back.dtype == dtype
    assert torch.equal(back, tensor.transpose(0, -1))


def test_the_datasets_library_reads_the_shards(cache, tmp_path):
    def load(folder: str) -> dict[str, dict]:
        files = str(cache / folder / "*.arrow")
        table = datasets.load_dataset("arrow", data_files=files, split="train", cache_dir=str(tmp_path))
        return {line["key"]: line for line in table}

    def tensor(stored: dict) -> torch.Tensor:
        raw = torch.frombuffer(bytearray(stored["data"]), dtype=getattr(torch, stored["dtype"]))
        return raw.reshape(stored["shape"])

    latents, texts = load("latents"), load("texts")
    assert (len(latents), len(texts)) == (6, 12), "an instruction and the empty one"
    digest = functools.cache(file_digest)
    header = CacheReader(cache).header
    for row, record in zip(read_rows(cache.parent / "rows.json"), CacheReader(cache), strict=True):
        assert isinstance(row, Row)
        line = latents[latents_key(row, header, digest)]
        assert line["bucket"] == record.bucket
        assert torch.equal(tensor(line["target_latents"]), record.target_latents)
        source = line["source_latents"] or line["edit_latents"][line["bridge_image"]]
        assert torch.equal(tensor(source), record.source_latents)
        assert torch.equal(tensor(texts[text_key(row, row.prompt, header, digest)]["prompt_emb"]), record.prompt_emb)


def test_records_have_the_shapes_that_their_docstring_says(cache):
    reader = CacheReader(cache)
    assert len(reader) == 6
    for place, record in enumerate(reader):
        height, width = target_size(record.bucket)
        assert record.target_latents.shape == record.source_latents.shape == (16, height, width)
        assert record.sub_noise.shape == (16, height, width)
        assert len(record.edit_latents) == (2 if place % 3 == 2 else 1)
        assert record.prompt_emb.ndim == 2
        assert record.empty_prompt_emb is not None
        assert record.empty_prompt_emb.shape[0] <= record.prompt_emb.shape[0]
        assert record.negative_prompt_emb is None
        assert (record.mask is not None) == (place == 0)
        assert record.target_latents.dtype == record.prompt_emb.dtype == torch.bfloat16
    assert reader[0].sub_noise is reader[4].sub_noise, "white is stored once per size"


def test_buckets_hold_every_record_once_and_what_they_hold_stacks(cache):
    reader = CacheReader(cache)
    assert {name: members.tolist() for name, members in reader.buckets.items()} == {
        "8x12+8x12": [0, 4],
        "8x8+8x8": [1, 3],
        "8x12+8x12+8x12": [2],
        "8x8+8x8+8x8": [5],
    }
    with pytest.raises(IndexError, match="record 6 of 6"):
        reader[6]


def test_another_model_geometry_or_schema_is_refused_with_the_command_that_rebuilds(cache, monkeypatch):
    CacheReader(cache, fingerprint="tiny", geometry=GEOMETRY)
    with pytest.raises(InputError, match=r"written with another model .* phases=\[cache,train\].* cache\.dir="):
        CacheReader(cache, fingerprint="other")
    with pytest.raises(InputError, match="written with another geometry"):
        CacheReader(cache, geometry=Geometry(64 * 64))
    newer = index.SCHEMA_VERSION + 1
    monkeypatch.setattr(index, "SCHEMA_VERSION", newer)
    with pytest.raises(InputError, match=f"has schema {newer - 1}, this version reads {newer}"):
        CacheReader(cache)


def test_no_cache_and_a_damaged_index_are_errors_of_the_user(tmp_path):
    with pytest.raises(InputError, match=r"no finished cache at .*: run with phases"):
        CacheReader(tmp_path)
    (tmp_path / "indexes").mkdir()
    (tmp_path / "indexes/a-b.arrow").write_text("nonsense")
    with pytest.raises(InputError, match=r"a-b\.arrow is damaged"):
        CacheReader(tmp_path)
