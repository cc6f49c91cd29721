"""Folders of pictures become rows, and every file is accounted for."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_prep.builders.common.prompts import make_templates
from data_prep.rows.rows import Row, read_rows
from tests.pictures import dataset, prepare, rejected, save


def make_pairs(folder: Path, stems: list[str], parts: tuple[str, ...] = ("source", "target")) -> Path:
    for part in parts:
        for stem in stems:
            save(folder / part / f"{stem}.png", hash(part) % 100)
    return folder


@pytest.fixture(scope="module")
def nested(tmp_path_factory):
    """Two source folders, sub-folders, masks and ground truths of some, sidecars of both kinds, and files that do not fit."""
    folder = make_pairs(tmp_path_factory.mktemp("pairs"), ["a", "ö/b.v2", "ö/c"], ("source", "source_2", "target"))
    (folder / "source" / "a.png").rename(folder / "source" / "a.png.tmp")
    save(folder / "source" / "a.jpg")
    Image.new("L", (64, 48), 255).save(_parent(folder / "mask/ö/c.png"))
    save(folder / "mask/nobody.png")
    save(folder / "ref_gt/a.png")
    (folder / "target/a.txt").write_text("\ufeffremove it\n", encoding="utf-8")
    (folder / "target/readme.txt").write_text("not a caption")
    (folder / "source/ö/b.v2.txt").write_text("paint\nit red", encoding="utf-8")
    more = {"caption": " make it snow ", "tag": "weather", "negative_prompt": "rain", "group": "g", "width": 3}
    (folder / "target/ö/c.json").write_text(json.dumps(more))
    (folder / "target/ö/c.txt").write_text("the JSON file goes first")
    done = prepare("pairs", "--folder", folder)
    return folder, done.stdout


def _parent(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def test_files_of_one_stem_are_a_row(nested):
    folder, _ = nested
    sources = lambda stem, ending=".png": [f"source/{stem}{ending}", f"source_2/{stem}.png"]  # noqa: E731
    assert dataset(folder) == [
        {"id": "a", "prompt": "remove it", "image": "target/a.png", "edit_image": sources("a", ".jpg"),
         "ref_gt": "ref_gt/a.png"},
        {"id": "ö/b.v2", "prompt": "paint\nit red", "image": "target/ö/b.v2.png", "edit_image": sources("ö/b.v2")},
        {"id": "ö/c", "prompt": "make it snow", "image": "target/ö/c.png", "edit_image": sources("ö/c"),
         "back_mask": "mask/ö/c.png", "negative_prompt": "rain", "tag": "weather", "group": "g"},
    ]  # fmt: skip
    rows = list(read_rows(folder / "dataset.jsonl"))
    assert all(isinstance(row, Row) and row.image.is_file() for row in rows)


def test_what_fits_nowhere_is_told(nested):
    folder, told = nested
    for line in (
        f"{folder}/source: left out 1 file(s) without the file ending of an image (1 .tmp)",
        f"{folder}/mask: nothing for 2 of 3 targets, e.g. a",
        f"{folder}/mask: left out 1 file(s) that belong to no target, such as nobody.png",
        f"{folder}/ref_gt: nothing for 2 of 3 targets, e.g. ö/b.v2",
        f"{folder}/target: left out 1 file(s) that belong to no target, such as readme.txt",
        f"3 rows in {folder}/dataset.jsonl",
    ):
        assert line in told.splitlines()


def test_a_caption_folder_goes_before_sidecars_and_a_row_without_caption_is_rejected(tmp_path):
    make_pairs(tmp_path / "in", ["a", "b"])
    (tmp_path / "in/target/a.txt").write_text("beside")
    (tmp_path / "in/target/b.txt").write_text("beside")
    (tmp_path / "in/caption").mkdir()
    (tmp_path / "in/caption/a.txt").write_text("in the folder")
    prepare("pairs", "--folder", tmp_path / "in", "--out", tmp_path / "out", "--on-error", "skip")
    (row,) = dataset(tmp_path / "out")
    assert row["prompt"] == "in the folder"
    assert row["image"] == str(tmp_path / "in/target/a.png")
    assert rejected(tmp_path / "out") == {"b": (2, "b.png", "there is no caption file of this name, as others have")}


def test_templates_are_drawn_by_seed_and_id(tmp_path):
    stems = [f"k/{number}" for number in range(40)]
    make_pairs(tmp_path, stems)
    (tmp_path / "caption.txt").write_text("Remove {stem} of {folder}\n\nAdd {{x}} to {stem}\n")

    def prompts(*options) -> dict[str, str]:
        prepare("pairs", "--folder", tmp_path, *options)
        return {row["id"]: row["prompt"] for row in dataset(tmp_path)}

    first = prompts()
    kinds = {id: text.split()[0] for id, text in first.items()}
    assert 8 < sum(kind == "Add" for kind in kinds.values()) < 32
    assert first == {
        id: f"Add {{x}} to {id[2:]}" if kind == "Add" else f"Remove {id[2:]} of k" for id, kind in kinds.items()
    }
    for part in ("source", "target"):
        (tmp_path / part / "k/0.png").unlink()
    again = prompts("--processes", 2)
    assert again == {id: text for id, text in first.items() if id != "k/0"}
    assert prompts("--seed", 1) != again


def test_the_same_bytes_whatever_the_processes(tmp_path):
    make_pairs(tmp_path / "in", [f"{number:03}" for number in range(60)])
    (tmp_path / "in/target/007.png").write_bytes(b"")
    for processes in (1, 2):
        out = tmp_path / f"out{processes}"
        prepare(
            "pairs",
            "--folder",
            tmp_path / "in",
            "--out",
            out,
            "--prompt",
            "p",
            "--processes",
            processes,
            "--on-error",
            "skip",
        )
    for file in ("dataset.jsonl", "rejected.jsonl"):
        assert (tmp_path / "out1" / file).read_bytes() == (tmp_path / "out2" / file).read_bytes()


def test_a_template_that_a_row_cannot_fill_rejects_it(tmp_path):
    make_pairs(tmp_path, ["a", "b"])
    (tmp_path / "target/a.json").write_text('{"tag": "hat"}')
    (tmp_path / "target/b.txt").write_bytes(b"\xff is not read: the template says the instruction")
    done = prepare("pairs", "--folder", tmp_path, "--prompt", "Remove the {tag}", check=False)
    assert done.returncode == 2
    assert "row 2" in done.stderr
    assert [row["prompt"] for row in dataset(tmp_path)] == ["Remove the hat"]
    assert "needs {tag}" in rejected(tmp_path)["b"][2]


@given(st.text().filter(str.strip), st.text().filter(str.strip))
def test_any_text_can_be_a_template_or_fill_one(text, value):
    literal = text.replace("{", "{{").replace("}", "}}")
    templates = make_templates(f"{literal}{{stem}}", None, 0)
    assert templates is not None
    assert templates.fill("id", {"stem": value}) == text + value.strip()


@pytest.mark.parametrize(
    ("names", "options", "folders"),
    [
        (("before", "after"), (), ("before", "after")),
        (("Input 2", "input_1", "outputs", "masks"), (), ("Input 2", "input_1", "outputs")),
        (("source", "target", "original", "results"), (), ("source", "target")),
        (("raw", "source", "final"), ("--source", "raw", "--target", "final"), ("raw", "final")),
    ],
)
def test_folders_have_the_names_that_people_give_them(names, options, folders, tmp_path):
    make_pairs(tmp_path, ["a"], names)
    prepare("pairs", "--folder", tmp_path, "--prompt", "p", *options)
    (row,) = dataset(tmp_path)
    found = [*(row["edit_image"] if isinstance(row["edit_image"], list) else [row["edit_image"]]), row["image"]]
    assert found == [f"{name}/a.png" for name in folders]
    assert row.get("back_mask") == ("masks/a.png" if "masks" in names else None)


WRONG = {
    "several folders of": lambda folder: (folder / "Targets").mkdir(),
    "there is no folder raw in": lambda folder: ("--source", "raw"),
    "there are no instructions in": lambda folder: (),
    "unknown field {colour} in a prompt template: known here are {stem}, {folder}, {tag}": lambda folder: (
        "--prompt", "{colour}",
    ),
    "is not a template": lambda folder: ("--prompt", "an open { brace"),
    "use only one of them": lambda folder: ("--prompt", "p", "--templates", folder / "x"),
    "cannot be read: No such file": lambda folder: ("--templates", folder / "x"),
    "--prompt is empty": lambda folder: ("--prompt", " "),
    "has 4 folders of sources (source, source_0, source_1, source_2), the model takes at most 3": lambda folder: [
        (folder / f"source_{number}").mkdir() for number in range(3)
    ],
    "there is no image file in": lambda folder: (folder / "source/a.png").unlink(),
    "there are no pairs in": lambda folder: shutil.rmtree(folder / "target"),
    "no picture in": lambda folder: save(folder / "mask/a_mask.png") and (),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_command_is_answered_in_a_sentence(message, tmp_path):
    make_pairs(tmp_path, ["a"])
    options = WRONG[message](tmp_path)
    options = options if isinstance(options, tuple) else ()
    done = prepare("pairs", "--folder", tmp_path, *options, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
