"""Several datasets as one: whatever is asked for, every row's versions together weigh what the row does."""

import json
from collections import defaultdict

import pytest

from data_prep.rows.augmentation import Augment
from data_prep.rows.mixture import DatasetSource, names, read_mixture
from data_prep.rows.rows import RejectedRow, Row


def dataset(folder, name: str, rows: int, **cells) -> str:
    values = [
        {"prompt": f"edit {n}", "image": "t.png", "edit_image": "s.png"} | {key: cell[n] for key, cell in cells.items()}
        for n in range(rows)
    ]
    (folder / f"{name}.json").write_text(json.dumps(values))
    return str(folder / f"{name}.json")


def read(*sources: DatasetSource, augment: Augment | None = None, **options) -> list[Row]:
    rows = list(read_mixture(sources, augment or Augment(), **options))
    assert all(isinstance(row, Row) for row in rows), rows
    return [row for row in rows if isinstance(row, Row)]


def shares(rows: list[Row]) -> dict[str, float]:
    """Of the draws, by dataset."""
    found, total = defaultdict(float), sum(row.weight for row in rows)
    for row in rows:
        found[row.id.split("/")[0]] += row.weight / total
    return found


def test_one_dataset_is_read_as_it_is(tmp_path):
    rows = read(DatasetSource(dataset(tmp_path, "a", 3)))
    assert [(row.id, row.weight, row.max_pixels, row.augmentation) for row in rows] == [
        (f"row-00000{n}", 1.0, None, None) for n in (1, 2, 3)
    ]


def test_weights_are_of_datasets_and_repeats_of_rows(tmp_path):
    a, b = dataset(tmp_path, "a", 10), dataset(tmp_path, "b", 2, weight=[1, 3])
    by_weight = read(DatasetSource(a, weight=3), DatasetSource(b, weight=1))
    assert shares(by_weight) == pytest.approx({"a": 0.75, "b": 0.25})
    assert by_weight[-1].weight == pytest.approx(3 * by_weight[-2].weight)
    by_size = read(DatasetSource(a, repeats=2), DatasetSource(b))
    assert shares(by_size) == pytest.approx({"a": 20 / 24, "b": 4 / 24})


def test_areas_and_versions_share_a_rows_weight(tmp_path):
    prompts = ["move it left", "make it blue"]
    source = DatasetSource(dataset(tmp_path, "a", 2, prompt=prompts), repeats=2, resolutions={4096: 3, 1024: 1})
    rows = read(source, augment=Augment(1))
    assert [row.id for row in rows[:2]] == ["row-000001@4096", "row-000001@1024"], "the first may not be mirrored"
    weights = {n: [row.weight for row in rows if row.number == n] for n in (1, 2)}
    assert weights == {1: [1.5, 0.5], 2: [0.75, 0.75, 0.25, 0.25]}
    assert [(row.max_pixels, row.augmentation is not None) for row in rows if row.number == 2] == [
        (4096, False),
        (4096, True),
        (1024, False),
        (1024, True),
    ]


def test_what_is_held_out_stays_as_it_is(tmp_path):
    path = dataset(tmp_path, "a", 2, split=["validation", "train"])
    rows = read(DatasetSource(path, weight=5, resolutions={1024: 1}), augment=Augment(2, crop=0.9))
    assert [(row.id, row.weight, row.max_pixels) for row in rows if row.split == "validation"] == [
        ("row-000001", 1.0, None)
    ]
    assert len(rows) == 4


def test_a_rows_versions_are_the_same_beside_other_datasets(tmp_path):
    a, b, augment = (
        DatasetSource(dataset(tmp_path, "a", 1)),
        DatasetSource(dataset(tmp_path, "b", 1)),
        Augment(2, crop=0.5),
    )
    alone, beside = read(a, augment=augment), read(a, b, augment=augment)
    assert [row.augmentation for row in alone] == [row.augmentation for row in beside[:3]]
    assert len({row.id for row in beside}) == 6


def test_datasets_of_one_name_are_told_apart():
    sources = [DatasetSource(path) for path in ("a/pairs.json", "b/pairs.json", "owner/photos")]
    assert names(sources) == ["pairs", "pairs-2", "photos"]
    sources = [DatasetSource(path) for path in ("a/p.json", "b/p.json", "p-2.json", "c/p.json")]
    assert names(sources) == ["p", "p-3", "p-2", "p-4"]


def test_rows_without_a_source_are_taken_where_they_can_be_trained(tmp_path):
    path = dataset(tmp_path, "a", 3, edit_image=[None, ["s.png", "r.png"], ""])
    assert [row.edit_image for row in read(DatasetSource(path), text_to_image=True)] == [
        (),
        (tmp_path / "s.png", tmp_path / "r.png"),
        (),
    ]
    rejected = [row for row in read_mixture([DatasetSource(path)], Augment()) if isinstance(row, RejectedRow)]
    assert [str(row) for row in rejected] == [
        f"row {n} ({path}): edit_image is missing or empty: only training with flow matching (loss=flow) takes text to image"
        for n in (1, 3)
    ]


@pytest.mark.parametrize("weight", [0, -1, "much", True, float("inf")])
def test_a_weight_is_a_number_above_0(tmp_path, weight):
    [row] = read_mixture([DatasetSource(dataset(tmp_path, "a", 1, weight=[weight]))], Augment())
    assert "weight must be a number above 0" in str(row)
