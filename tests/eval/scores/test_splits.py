"""Which rows of a dataset file an evaluation scores."""

import json

import pytest

from data_prep.errors import InputError
from data_prep.rows.rows import RejectedRow
from eval.scores.splits import rows_of_split


@pytest.fixture
def write(tmp_path):
    """Writes a dataset file with a row of each of these splits; None is a row that says none."""

    def write(*splits: str | None) -> str:
        rows = [{"prompt": "edit", "image": "t.png", "edit_image": "s.png", "split": split} for split in splits]
        (tmp_path / "pairs.json").write_text(json.dumps(rows))
        return str(tmp_path / "pairs.json")

    return write


def numbers(dataset: str, split: str) -> tuple[list[int], bool]:
    """Numbers of the rows of a split, and whether they are marked."""
    scored = rows_of_split(dataset, None, split)
    return [row.number for row in scored.rows], scored.caution is not None


def test_only_held_out_rows_are_not_marked(write):
    dataset = write("train", "validation", None, "test", "validation")
    assert numbers(dataset, "validation") == ([2, 5], False)
    assert numbers(dataset, "test") == ([4], False)
    assert numbers(dataset, "train") == ([1, 3], True)
    assert numbers(dataset, "all") == ([1, 2, 3, 4, 5], True)


def test_a_file_that_names_no_split_is_scored_whole_and_marked(write):
    dataset = write(None, None)
    assert numbers(dataset, "validation") == numbers(dataset, "all") == numbers(dataset, "train") == ([1, 2], True)
    assert "no column split" in str(rows_of_split(dataset, None, "validation").caution)


@pytest.mark.parametrize(
    ("splits", "wanted", "there"),
    [(("train", "train", "test"), "validation", r"train \(2\), test \(1\)"), ((None,), "test", r"train \(1\)")],
)
def test_a_split_that_is_not_there_is_refused_with_those_that_are(write, splits, wanted, there):
    with pytest.raises(InputError, match=rf"no rows of the split '{wanted}'. Its splits are: {there}. .*--split"):
        rows_of_split(write(*splits), None, wanted)


def test_a_row_that_cannot_be_read_is_reported_whatever_the_split(tmp_path):
    rows = [{"prompt": "", "image": "t.png", "edit_image": "s.png", "split": "train"}]
    rows += [{"prompt": "edit", "image": "t.png", "edit_image": "s.png", "split": "validation"}]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    scored = rows_of_split(str(tmp_path / "pairs.json"), None, "validation")
    assert [type(row) is RejectedRow for row in scored.rows] == [True, False]
    assert scored.caution is None
