"""A record's key changes with whatever its tensors depend on, and with nothing else."""

import json
import shutil
from dataclasses import replace

import pytest

from data_prep.cache.index import CacheFolder, CacheHeader
from data_prep.cache.keys import latents_key, record_key, text_key
from data_prep.cache.keys import prompts as prompts_of
from data_prep.rows.rows import Row, read_rows
from tests.caching import GEOMETRY, write_dataset, write_image, write_mask, write_rows

PAIR = {"id": "a", "prompt": "edit", "image": "t.png", "edit_image": ["s.png", "r.png"]}
HEADER = (
    '{"caption_dropout": false, "dtype": "bfloat16", "fingerprint": "tiny", '
    '"geometry": {"max_pixels": 9216, "reference_pixels": null, "vision_pixels": 12544}, "negative": false, "schema_version": 2}'
)
"""As checkpoints of earlier runs have it in their identity."""


@pytest.fixture
def key(tmp_path):
    """Of a row that differs from `PAIR` in some columns."""
    for seed, name in enumerate("tsrx"):
        write_image(tmp_path / f"{name}.png", seed)
    shutil.copy(tmp_path / "t.png", tmp_path / "copy.png")
    write_mask(tmp_path / "m.png")
    write_mask(tmp_path / "n.png", 96)

    def of(negative: bool = False, **columns) -> str:
        (row,) = read_rows(write_dataset(tmp_path, [PAIR | columns]))
        assert isinstance(row, Row)
        return record_key(row, CacheHeader("tiny", GEOMETRY, "float32", False, negative))

    return of


def test_everything_that_a_tensor_depends_on_is_in_the_key(key):
    changes = [
        {},
        {"prompt": "another"},
        {"image": "x.png"},
        {"edit_image": ["s.png"]},
        {"edit_image": ["s.png", "x.png"]},
        {"edit_image": ["r.png", "s.png"]},
        {"bridge_image": 1},
        {"back_mask": "m.png"},
        {"back_mask": "n.png"},
    ]
    assert len({key(**columns) for columns in changes}) == len(changes)


def test_a_negative_prompt_counts_where_it_is_encoded(key):
    assert key(negative_prompt="blurry") == key(negative_prompt="noisy") == key()
    assert len({key(True, negative_prompt=text) for text in ("blurry", "noisy", "")}) == 3
    assert key(True) == key(True, negative_prompt="")


def test_what_the_encoders_compute_in_counts_for_records_but_not_for_what_checkpoints_know(tmp_path):
    (row,) = read_rows(write_dataset(tmp_path, write_rows(tmp_path, 1)))
    assert isinstance(row, Row)
    known, one, other = (
        CacheHeader("tiny", GEOMETRY, "bfloat16", False, False, encoder_dtype=dtype)
        for dtype in ("", "bfloat16", "float32")
    )
    assert latents_key(row, one) != latents_key(row, other)
    assert text_key(row, row.prompt, one) != text_key(row, row.prompt, other)
    assert record_key(row, one) == record_key(row, other)
    folder = CacheFolder(tmp_path)
    assert folder.sub_noise(known, 8, 8).name == "8x8-f73c5d94fd61890d.arrow", "where earlier indexes have it"
    assert folder.sub_noise(one, 8, 8) != folder.sub_noise(other, 8, 8)
    assert known.identity_json() == one.identity_json() == other.identity_json() == HEADER


def test_instructions_that_are_preserved_count_where_there_are_some(tmp_path):
    (row, other) = (row for row in read_rows(write_dataset(tmp_path, write_rows(tmp_path, 2))) if isinstance(row, Row))
    plain = CacheHeader("tiny", GEOMETRY, "bfloat16", False, False)
    kept = [replace(plain, preserve=prompts) for prompts in ((), ("blur it",), ("blur it", row.prompt))]
    assert [header.identity_json() == HEADER for header in kept] == [True, False, False]
    assert len({record_key(row, header) for header in kept}) == 3
    assert [CacheHeader.from_json(json.loads(header.to_json())) for header in kept] == kept
    assert "preserve_prompt" not in prompts_of(row, plain)
    assert [prompts_of(each, kept[2])["preserve_prompt"] for each in (row, replace(other, prompt=row.prompt))] == [
        "blur it"
    ] * 2
    later = replace(row, number=row.number + 1)
    two = replace(plain, preserve=("blur it", "make it brighter"))
    assert prompts_of(row, two) != prompts_of(later, two)
    assert record_key(row, two) != record_key(later, two), "rows that moved have other instructions"
    assert record_key(row, plain) == record_key(later, plain)
    alone = replace(plain, preserve=(row.prompt,))
    assert prompts_of(row, alone)["preserve_prompt"] == " ", "one's own instruction is not another one"


def test_names_do_not_count(key):
    assert key(id="b", image="copy.png", ref_gt="x.png", split="validation") == key()
