"""What the cache folder promises to those who read it, with this project's reader and without."""

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_prep.cache import reader as records
from data_prep.cache.reader import CacheReader, target_size
from data_prep.cache.shards import SUB_NOISE_SCHEMA, from_arrow, read_arrow, to_arrow, write_arrow
from data_prep.errors import InputError
from data_prep.model.geometry import Geometry
from tests.caching import GEOMETRY, cache_dataset, write_dataset, write_rows


@pytest.fixture(scope="module")
def cache(tmp_path_factory, tiny_model_dir):
    folder = tmp_path_factory.mktemp("records")
    dataset = write_dataset(folder, write_rows(folder))
    cache_dataset(dataset, folder / "cache", tiny_model_dir, dtype=torch.bfloat16, caption_dropout=True)
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
    files = str(cache / "shards" / "*.arrow")
    table = datasets.load_dataset("arrow", data_files=files, split="train", cache_dir=str(tmp_path))
    by_key = {line["key"]: line for line in table}
    assert len(by_key) == 6
    for record in CacheReader(cache):
        stored = by_key[record.key]["target_latents"]
        raw = torch.frombuffer(bytearray(stored["data"]), dtype=getattr(torch, stored["dtype"]))
        assert torch.equal(raw.reshape(stored["shape"]), record.target_latents)
        assert by_key[record.key]["id"] == record.id
        assert by_key[record.key]["bucket"] == record.bucket


def test_records_have_the_shapes_that_their_docstring_says(cache):
    reader = CacheReader(cache)
    assert len(reader) == 6
    for index, record in enumerate(reader):
        height, width = target_size(record.bucket)
        assert record.target_latents.shape == record.source_latents.shape == (16, height, width)
        assert record.sub_noise.shape == (16, height, width)
        assert len(record.edit_latents) == (2 if index % 3 == 2 else 1)
        assert record.prompt_emb.ndim == 2
        assert record.empty_prompt_emb is not None
        assert record.empty_prompt_emb.shape[0] <= record.prompt_emb.shape[0]
        assert record.negative_prompt_emb is None
        assert (record.mask is not None) == (index == 0)
        assert record.target_latents.dtype == record.prompt_emb.dtype == torch.bfloat16
    assert reader[0].sub_noise is reader[4].sub_noise, "white is stored once per size"


def test_buckets_hold_every_record_once_and_what_they_hold_stacks(cache):
    reader = CacheReader(cache)
    assert reader.buckets == {
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
    newer = records.SCHEMA_VERSION + 1
    monkeypatch.setattr(records, "SCHEMA_VERSION", newer)
    with pytest.raises(InputError, match=f"has schema {newer - 1}, this version reads {newer}"):
        CacheReader(cache)


def test_no_cache_and_a_damaged_index_are_errors_of_the_user(tmp_path):
    with pytest.raises(InputError, match=r"no finished cache at .*: run with phases"):
        CacheReader(tmp_path)
    (tmp_path / "index.arrow").write_text("nonsense")
    with pytest.raises(InputError, match=r"index\.arrow is damaged"):
        CacheReader(tmp_path)
