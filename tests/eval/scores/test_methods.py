"""Which pictures are compared, and what is refused because nobody could tell."""

import json
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from data_prep.errors import InputError
from data_prep.rows.rows import Row
from eval.request.base import BaseEditor
from eval.request.knobs import AdapterUse
from eval.scores.methods import Contest, Method, edited_methods, found_methods, own_names, rows_of_folders
from eval.scores.recorder import baselines, label
from eval.tables.job_files import KeyedJob
from eval.tables.runner import share_out
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
    with pytest.raises(
        InputError, match=r"flat/0\.png could belong to the rows r1 and r2: name the images by the rows' ids"
    ):
        found_methods([tmp_path / "flat"], dataset)
    names_of(tmp_path / "twice", "x.png", "x.jpg")
    with pytest.raises(InputError, match=r"x\.jpg and .*x\.png have the same name: rename or remove"):
        found_methods([tmp_path / "twice"], [row(1, Path("/photos/x.png"))])


def test_a_table_with_several_pictures_of_a_row_is_refused(tmp_path):
    names_of(tmp_path, "r1-key-1.png", "r1-key-2.png")
    (tmp_path / "results.csv").write_text("id,output\nr1,r1-key-1.png\nr2,r1-key-1.png\n")  # of one content
    (made,) = found_methods([tmp_path], [row(1, Path("/photos/x.png")), row(2, Path("/photos/x.png"))])
    assert made.files == dict.fromkeys(("r1", "r2"), tmp_path / "r1-key-1.png")
    (tmp_path / "results.csv").write_text("id,output\nr1,r1-key-1.png\nr1,r1-key-2.png\n")
    with pytest.raises(InputError, match=r"results\.csv lists several pictures of r1: score one picture per row"):
        found_methods([tmp_path], [row(1, Path("/photos/x.png"))])


def test_only_rows_that_are_measured_say_which_sizes_there_are(tmp_path):
    """A row that one folder lacks is left out of all, and its size makes no second source."""
    for name, sides in {"a1": (8, 8), "a2": (16, 8), "b1": (8, 8), "c1": (16, 16)}.items():
        Image.new("RGB", sides).save(tmp_path / f"{name}.png")
    a = Method("a", {"r1": tmp_path / "a1.png", "r2": tmp_path / "a2.png"})
    b, c = Method("b", {"r1": tmp_path / "b1.png"}), Method("c", {"r1": tmp_path / "c1.png"})
    rows = [row(1, Path("/photos/x.png"))]
    assert baselines(rows, [a, b, c]) == {"a": "source", "b": "source", "c": "source-2"}


def test_no_adapter_has_the_name_of_a_source_or_target():
    """Neither as a folder nor in a table, whatever the folders are called."""
    names = list(own_names(["target", "source", "source-2", "lbm", "lbm", "target-removal"]))
    assert names == ["target (2)", "source (2)", "source-2 (2)", "lbm", "lbm (2)", "target-removal"]
    assert [label(name, "edit") for name in ("target (2)", "source-2/steps_4")] == ["target (2)", "source-2, 4 steps"]
    assert [label("source-2", "source"), label("target", "target")] == ["source unchanged, size 2", "target"]


def test_processes_share_out_rows_and_not_step_counts():
    """Jobs alternate between 4 and 20 steps; of two processes one would make all the long edits."""
    jobs = [
        Job(number, f"{name}/steps_{steps}/r{number}", (Path("s.png"),), "s.png", {"steps": steps})
        for name in ("a", "b")
        for number in range(1, 5)
        for steps in (4, 20)
    ]
    todo = [KeyedJob(job, job.id, (job.id,)) for job in jobs]
    shares = [share_out(todo, rank, 2) for rank in range(2)]
    assert [[each.job.knobs["steps"] for each in share] for share in shares] == [[4, 20] * 4] * 2
    assert sorted(each.key for share in shares for each in share) == sorted(each.key for each in todo)


def test_a_note_says_that_modules_edit_rows_with_masks_without(tmp_path):
    extra = {"extra_modules": json.dumps({"file": "extra_modules.safetensors", "in_full": [], "added": {"ste": {}}})}
    for name, metadata in (("ste", extra), ("lora", {})):
        (tmp_path / name).mkdir()
        save_file({"w": torch.zeros(1)}, tmp_path / name / "adapter_model.safetensors", {"format": "pt", **metadata})
    uses = [AdapterUse(tmp_path / name / "adapter_model.safetensors") for name in ("ste", "lora")]
    contest = Contest(cast(BaseEditor, None), uses, base=False, knobs={})
    plain = row(1, Path("/photos/x.png"))
    (note,) = contest.notes([plain, replace(plain, back_mask=Path("m.png"))])
    assert note.startswith("1 of 2 rows have a mask, but the modules that ste adds do not see it here")
    assert contest.notes([plain]) == []
