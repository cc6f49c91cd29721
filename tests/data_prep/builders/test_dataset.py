"""What every builder keeps to: nobody's files are replaced, and mistakes about folders are told in a sentence."""

import json
import os

import pytest
from PIL import Image

from tests.commands import run_script
from tests.pictures import contents

pytestmark = pytest.mark.slow

COLOURS = ("red", "green", "blue")


@pytest.fixture
def data(tmp_path):
    """Three pairs that differ in a square, with masks in the folder where `mask` writes its own, and a table of them."""
    for folder in ("source", "target", "masks"):
        (tmp_path / folder).mkdir()
    rows = []
    for name in COLOURS:
        image = Image.linear_gradient("L").convert("RGB").resize((64, 64))
        image.save(tmp_path / "target" / f"{name}.png")
        image.paste(name, (10, 10, 40, 40))
        image.save(tmp_path / "source" / f"{name}.png")
        Image.new("L", (64, 64), 255).save(tmp_path / "masks" / f"{name}.png")
        paths = {"image": f"target/{name}.png", "edit_image": f"source/{name}.png", "back_mask": f"masks/{name}.png"}
        rows.append({"id": name, "prompt": "remove it", **paths})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return tmp_path


def refused(*arguments) -> str:
    done = run_script("data_prep/run.py", *arguments, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_dataset_file_that_somebody_else_wrote_or_changed_stays(data):
    pairs = ("pairs", "--folder", data, "--prompt", "remove it")
    (data / "dataset.jsonl").write_text("mine")
    assert "was not made by this command" in refused(*pairs)
    assert (data / "dataset.jsonl").read_text() == "mine"
    (data / "dataset.jsonl").unlink()
    run_script("data_prep/run.py", *pairs)
    run_script("data_prep/run.py", *pairs[:-1], "remove the square")
    assert "remove the square" in (data / "dataset.jsonl").read_text()
    assert "was not made by this command" in refused("table", "--table", data / "dataset.jsonl", "--out", data)
    with open(data / "dataset.jsonl", "a") as file:
        file.write("{}\n")
    assert "or was changed since" in refused(*pairs)


def test_inputs_are_not_written_over(data):
    before = contents(data)
    mask = ("mask", "--dataset", data / "rows.json", "--from", "given", "--invert", "--out", data)
    assert f"is an input, but this command writes to {data}/masks" in refused(*mask)
    synth = ("synth", "--images", data / "source", "--recipes", "add_snow", "--size", 64, "--out", data)
    assert f"is an input, but this command writes to {data}/source" in refused(*synth)
    assert contents(data) == before


def test_going_back_to_earlier_options_makes_the_earlier_dataset(data):
    made = []
    for feather in (20, 0, 20):
        run_script(
            "data_prep/run.py", "mask", "--dataset", data / "rows.json", "--feather", feather, "--out", data / "out"
        )
        made.append(contents(data / "out"))
    assert made[0] == made[2] != made[1]


@pytest.mark.parametrize("command", ["synth", "check"])
def test_an_output_folder_that_cannot_be(command, data):
    (data / "file").touch()
    source = ("--images", data / "source") if command == "synth" else ("--dataset", data / "rows.json")
    assert "cannot make the folder" in refused(command, *source, "--out", data / "file" / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_an_output_folder_without_permission(data):
    (data / "locked").mkdir(mode=0o500)
    assert "permission denied" in refused("synth", "--images", data / "source", "--out", data / "locked")
