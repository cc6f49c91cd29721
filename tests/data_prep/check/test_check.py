"""`check` finds every planted fault, and nothing in 200 clean pairs."""

import json
import random
import re
from pathlib import Path

import pytest
from PIL import Image

from data_prep.cache.order import Order
from data_prep.check import check
from data_prep.rows.images import open_image
from scripts import photographs
from tests.check_data import (
    check_here,
    clean_rows,
    found,
    moved_pair,
    patch_place,
    run_check,
    save_mask,
    save_pair,
    write_jsonl,
)
from tests.commands import run_script

pytestmark = pytest.mark.slow

SMALL = ("--min-side", "64")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("check")


@pytest.fixture(scope="module")
def clean(folder):
    """The rows of 200 clean pairs, their report, and when each part of the measurements was written."""
    rows = clean_rows(folder, 200)
    report = check_here(write_jsonl(folder / "pairs.jsonl", rows), min_side=64)
    return rows, report, {path: path.stat().st_mtime_ns for path in (folder / "check/.parts").glob("*.jsonl")}


@pytest.fixture(scope="module")
def planted(folder, clean):
    """The same with faults after it, in the same report folder: what must be found, and the report."""
    rng, rows, faults = random.Random(7), list(clean[0]), {}

    def plant(kind: str, source: Image.Image, target: Image.Image, **values) -> None:
        name = f"fault{len(rows)}"
        rows.append({"prompt": f"prompt {name}", **save_pair(folder, name, source, target), **values})
        faults[len(rows), kind] = rows[-1]["id"]

    for size in (128, 512):
        for path in (photographs.SKIMAGE_DATA / "astronaut.png", photographs.SKLEARN_DATA / "china.jpg"):
            photograph = photographs.load(path)
            plant("shift", *moved_pair(photograph, size, (8, 0), 0, rng))
            plant("shift", *moved_pair(photograph, size, (-5.7, 5.7), 0, rng))
            plant("zoom", *moved_pair(photograph, size, (0, 0), 0.03, rng))
            plant("zoom", *moved_pair(photograph, size, (0, 0), -0.03, rng))
    source = photographs.random_crop(photographs.load(photographs.SKIMAGE_DATA / "camera.png"), 96, rng)
    target = source.copy()
    target.paste("red", patch_place(source, rng))
    mask = save_mask(folder, "swapped", source, target, swapped=True)
    plant("mask_polarity", source, target, back_mask=mask)
    # What is held out, in another size and file format, as the target of a training row.
    held_out = open_image(folder / rows[4]["image"])
    held_out.resize((100, 100), Image.Resampling.BICUBIC).save(folder / "copy.jpg", quality=85)
    plant("leak", source.rotate(90), open_image(folder / "copy.jpg"))
    rows[9]["group"] = "holiday"  # held out
    plant("leak", *(photographs.random_crop(photographs.load(photographs.TRAIN[1]), 64, rng),) * 2, group="holiday")
    rows[-1]["edit_image"] = rows[0]["edit_image"]
    report = run_check(write_jsonl(folder / "pairs.jsonl", rows), *SMALL, code=2)
    return faults, report


def test_clean_pairs_have_no_findings(clean):
    _, report, _ = clean
    assert report["findings"] == []
    assert (report["rows"], report["usable"], report["rows_with_errors"]) == (200, 200, 0)
    assert report["splits"] == {"train": 160, "validation": 40}
    assert report["spreads"]["shift"]["count"] > 180  # nearly all were compared


def test_every_planted_fault_is_found_and_nothing_else(planted):
    faults, report = planted
    assert found(report) == set(faults)
    assert {(each["row"], each["kind"]): each["id"] for each in report["findings"]} == faults
    assert report["rows_with_errors"] == len(faults)
    assert all(each["severity"] == "error" for each in report["findings"])


def test_a_shift_and_a_zoom_are_measured(planted):
    _, report = planted
    shifts = [
        float(re.findall(r"shifted by ([\d.]+)", each["message"])[0])
        for each in report["findings"]
        if each["kind"] == "shift"
    ]
    assert shifts == pytest.approx([8, 8.06] * 4, abs=0.5)
    zooms = [
        re.findall(r"is ([\d.]+) % (\w+)", each["message"])[0] for each in report["findings"] if each["kind"] == "zoom"
    ]
    assert [float(size) for size, _ in zooms] == pytest.approx([3] * 8, abs=0.3)
    assert [way for _, way in zooms] == ["larger", "smaller"] * 4


def test_a_leak_names_both_rows_and_marks_the_one_that_is_trained(planted):
    _, report = planted
    leaks = [each for each in report["findings"] if each["kind"] == "leak"]
    assert [each["other_row"] for each in leaks] == [5, 10]


def test_what_was_measured_is_not_measured_again(planted, clean, folder):
    """All parts but the last, which has more rows now."""
    _, _, before = clean
    after = {path: path.stat().st_mtime_ns for path in (folder / "check/.parts").glob("*.jsonl")}
    kept = [path for path in before if after.get(path) == before[path]]
    assert len(kept) == len(before)
    assert len(after) > len(before)


def test_buckets_and_groups_are_those_of_training(clean, folder):
    """Recounted from the images: 32-pixel buckets of the 160 training rows, laid out as training does."""
    rows, report, _ = clean
    counts = {64: 0, 96: 0, 128: 0}
    for row in rows:
        if row["split"] == "train":
            counts[open_image(folder / row["image"]).width] += 1
    assert {each["bucket"]: each["rows"] for each in report["buckets"]} == {
        f"{s}x{s}+{s}x{s}": n for s, n in counts.items()
    }
    for groups in report["groups"]:
        size = groups["size"]
        order = Order({f"{side}": range(count) for side, count in counts.items()}, 0, size, 1)
        assert groups["groups"] == order.groups_per_epoch
        assert groups["empty_places"] == sum(-count % size for count in counts.values())
    assert [each["size"] for each in report["groups"]] == [1, 2, 4, 8]


def test_the_page_has_all_in_itself(planted, folder):
    page = (folder / "check/check.html").read_text()
    links = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]{1,30})""", page)
    assert links
    assert all(link.startswith(("data:image/jpeg;base64,", "#")) for link in links)
    assert "url(http" not in page
    assert "@import" not in page
    assert page.count("data:image/jpeg;base64,") > 60
    assert page.count("<svg") == 5
    for kind in ("shift", "zoom", "mask_polarity", "leak"):
        assert f'id="{kind}"' in page
    assert "Row 202" in page


def test_the_terminal_lists_rows_and_tables(planted, folder):
    """And the folder of the report is beside the dataset, where it is not named."""
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    dataset = write_jsonl(folder / "few.jsonl", rows[:3] + rows[200:201])
    options = ("--dataset", dataset, "--micro-batch-sizes", "3", "--processes", 2, *SMALL)
    done = run_script("data_prep/run.py", "check", *options, check=False, env={"COLUMNS": "70", "PATH": ""})
    assert done.returncode == 2
    one_line = r"^row 4: shift: the target is shifted by 8\.\d pixels \(.+ across, .+ down\)$"
    assert re.search(one_line, done.stdout, re.MULTILINE)
    assert re.search(r"error +│ shift +│ +1 ", done.stdout)
    assert re.search(r"3 │ +\d+ │", done.stdout)
    assert done.stderr.splitlines()[-1].startswith("error: 1 of 4 rows must be fixed")
    assert (folder / "few-check/check.html").is_file()
    check.command(dataset=str(dataset), min_side=64, micro_batch_sizes="3", ignore=["shift"], processes=1)
