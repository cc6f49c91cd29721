"""Which pictures are compared, and what is refused because nobody could tell."""

from pathlib import Path

import pytest

from data_prep.errors import InputError
from data_prep.rows.rows import Row
from eval.scores.methods import edited_methods, found_methods, rows_of_folders
from eval.tables.job_files import KeyedJob
from eval.tables.table import Job


def test_an_adapter_or_a_step_count_without_a_picture_is_named(tmp_path):
    """With `--on-error skip` the report would be of the others alone, and a card beside the first adapter of the second."""
    jobs = [
        Job(number, f"{name}/r{number}", (Path("s.png"),), "s.png")
        for name in ("a/steps_1", "a/steps_4", "b/steps_4")
        for number in (1, 2)
    ]
    with pytest.raises(InputError, match=r"every row failed for a/steps_1, b/steps_4, .*failed\.csv says why"):
        edited_methods(jobs, [KeyedJob(jobs[2], "key", ("a.png",))], tmp_path)


def row(number: int, image: Path) -> Row:
    return Row(number, f"r{number}", "edit", image, (Path("s.png"),))


def names_of(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"named, never opened")


def test_pictures_of_nested_folders_are_told_apart_by_their_folders(tmp_path):
    for folder in ("sources", "targets", "made"):
        names_of(tmp_path / folder, "a/0.png", "b/0.png")
    rows = rows_of_folders(tmp_path / "sources", tmp_path / "targets")
    assert [(row.id, row.edit_image) for row in rows if isinstance(row, Row)] == [
        (name, (tmp_path / "sources" / f"{name}.png",)) for name in ("a/0", "b/0")
    ]
    (made,) = found_methods([tmp_path / "made"], [row for row in rows if isinstance(row, Row)])
    assert made.files == {name: tmp_path / "made" / f"{name}.png" for name in ("a/0", "b/0")}
    dataset = [row(1, tmp_path / "photos/a/0.png"), row(2, tmp_path / "photos/b/0.png")]
    (made,) = found_methods([tmp_path / "made"], dataset)
    assert made.files == {"r1": tmp_path / "made/a/0.png", "r2": tmp_path / "made/b/0.png"}


def test_a_picture_that_could_be_of_two_rows_is_refused(tmp_path):
    names_of(tmp_path / "flat", "0.png")
    dataset = [row(1, Path("/photos/a/0.png")), row(2, Path("/photos/b/0.png"))]
    with pytest.raises(InputError, match=r"flat/0\.png could be of the rows r1 and r2: call pictures by the rows' ids"):
        found_methods([tmp_path / "flat"], dataset)
    names_of(tmp_path / "twice", "x.png", "x.jpg")
    with pytest.raises(InputError, match=r"x\.jpg and .*x\.png have one name: keep one of them"):
        found_methods([tmp_path / "twice"], [row(1, Path("/photos/x.png"))])


def test_a_table_with_several_pictures_of_a_row_is_refused(tmp_path):
    names_of(tmp_path, "r1-key-1.png", "r1-key-2.png")
    (tmp_path / "results.csv").write_text("id,output\nr1,r1-key-1.png\nr2,r1-key-1.png\n")  # of one content
    (made,) = found_methods([tmp_path], [row(1, Path("/photos/x.png")), row(2, Path("/photos/x.png"))])
    assert made.files == dict.fromkeys(("r1", "r2"), tmp_path / "r1-key-1.png")
    (tmp_path / "results.csv").write_text("id,output\nr1,r1-key-1.png\nr1,r1-key-2.png\n")
    with pytest.raises(InputError, match=r"results\.csv lists several pictures of r1: score one picture per row"):
        found_methods([tmp_path], [row(1, Path("/photos/x.png"))])
