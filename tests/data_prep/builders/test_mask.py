"""`mask`: what was pasted is found, whatever JPEG did; given masks are reworked; what cannot be used is told."""

import io
import json
import random

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from data_prep.builders.mask.difference import Difference, soft_mask
from data_prep.errors import InputError
from scripts.photographs import HELD_OUT, TRAIN, load, random_crop
from tests.commands import run_script

pytestmark = pytest.mark.slow

SIDE = 256


def jpeg(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def pasted(number):
    """A piece of a photograph, the same with a piece of another pasted into it, and where, True inside."""
    rng, photographs = random.Random(number), TRAIN + HELD_OUT
    source = random_crop(load(photographs[number % len(photographs)]), SIDE, rng)
    other = random_crop(load(photographs[(number * 7 + 3) % len(photographs)]), SIDE, rng)
    where = Image.new("L", source.size, 0)
    x, y, radius = rng.randint(60, 190), rng.randint(60, 190), rng.randint(30, 60)
    ImageDraw.Draw(where).ellipse((x - radius, y - 0.8 * radius, x + radius, y + 0.8 * radius), fill=255)
    return source, Image.composite(other, source, where), np.asarray(where) > 0


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize(
    ("save", "mean", "least"),
    [
        (lambda source, target: (source, target), 0.97, 0.85),
        (lambda source, target: (source, jpeg(target, 85)), 0.92, 0.75),
        (lambda source, target: (jpeg(source, 75), jpeg(target, 85)), 0.91, 0.75),
    ],
    ids=["exact", "target is JPEG", "both are JPEG"],
)
def test_the_difference_is_what_was_pasted(save, mean, least):
    found, beyond = [], []
    for number in range(20):
        source, target, where = pasted(number)
        edited = Difference()(*save(source, target))
        found.append(overlap(edited, where))
        beyond.append((edited & ~ndimage.binary_dilation(where, iterations=4)).mean())
    assert np.mean(found) > mean
    assert min(found) > least
    assert max(beyond) < 0.001


def test_jpeg_alone_is_no_edit():
    for number in range(16):
        source, _, _ = pasted(number)
        assert Difference()(source, jpeg(source, 85)).mean() < 0.0005


def test_limits_are_those_of_cie_lab():
    """Greys on one of L* 50: what is below `high` counts where it touches what is above."""
    source = Image.new("RGB", (120, 60), "#777777")  # L* = 50.03
    target = source.copy()
    draw = ImageDraw.Draw(target)
    draw.rectangle((10, 10, 29, 49), fill="#888888")  # L* = 56.7: beside nothing stronger
    draw.rectangle((60, 10, 79, 49), fill="#c6c6c6")  # L* = 79.8
    draw.rectangle((80, 10, 99, 49), fill="#969696")  # L* = 62.0: between the limits, and touching
    edited = Difference(low=4, high=16)(source, target)  # at its edge a smoothed area has two thirds of its difference
    assert not edited[:, :55].any()
    assert edited[10:50, 60:100].all()
    assert edited.sum() == 40 * 40


def test_specks_are_dropped_and_gaps_filled():
    source = Image.new("RGB", (100, 60), "black")
    target = source.copy()
    draw = ImageDraw.Draw(target)
    draw.rectangle((5, 5, 10, 10), fill="white")  # 36 pixels
    draw.rectangle((30, 20, 49, 39), fill="white")
    draw.rectangle((58, 20, 79, 39), fill="white")  # a gap of 8
    edited = Difference(speck=100, close=6)(source, target)
    assert not edited[:15, :15].any()
    assert edited[22:38, 30:80].all()
    assert Difference(speck=0, close=0)(source, target)[5:11, 5:11].sum() > 30
    assert not Difference(speck=100, close=0)(source, target)[:, 50:58].any()


def test_a_mask_grows_shrinks_and_rises_by_pixels():
    edited = np.zeros((41, 41), dtype=bool)
    edited[10:31, 10:31] = True
    row = np.asarray(soft_mask(edited, dilate=3))[20]
    assert (row == 0).nonzero()[0].tolist() == list(range(7, 34))
    assert set(row.tolist()) == {0, 255}
    row = np.asarray(soft_mask(edited, dilate=-4))[20]
    assert (row == 0).nonzero()[0].tolist() == list(range(14, 27))
    row = np.asarray(soft_mask(edited, feather=3))[20]
    assert row[5:11].tolist() == [255, 255, 191, 128, 64, 0]
    assert (np.asarray(soft_mask(~np.zeros((9, 9), dtype=bool), dilate=-2)) == 0).all()
    assert (np.asarray(soft_mask(np.zeros((9, 9), dtype=bool), dilate=2)) == 255).all()


def test_limits_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="--low must be above 0 and not above --high, got 9"):
        Difference(low=9, high=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows of every kind: a paste, a source of another size, the same twice, all different, a broken file, and masks."""
    folder = tmp_path_factory.mktemp("mask")
    source, target, where = pasted(2)
    source.save(folder / "source.png")
    target.save(folder / "target.png")
    source.resize((SIDE * 2, SIDE * 2), Image.Resampling.LANCZOS).save(folder / "large.png")
    Image.eval(source, lambda value: (value + 128) % 256).save(folder / "other.png")
    (folder / "broken.png").write_bytes((folder / "source.png").read_bytes()[:500])
    Image.fromarray(np.where(where, 255, 0).astype(np.uint8)).resize((128, 128)).save(folder / "inverted.png")
    Image.new("L", (SIDE, SIDE // 2), 255).save(folder / "thin.png")
    rows = [
        {
            "image": "target.png",
            "edit_image": "source.png",
            "id": "paste",
            "tag": "add",
            "group": "g",
            "split": "validation",
            "weight": 2.5,
        },
        {"image": "target.png", "edit_image": ["other.png", "large.png"], "bridge_image": 1, "id": "a/large"},
        {"image": "source.png", "edit_image": "source.png", "id": "same"},
        {"image": "other.png", "edit_image": "source.png", "id": "all"},
        {"image": "broken.png", "edit_image": "source.png", "id": "broken"},
        {"image": "target.png", "edit_image": "source.png", "id": "mask", "back_mask": "inverted.png"},
        {"image": "target.png", "edit_image": "source.png", "id": "thin", "back_mask": "thin.png"},
    ]
    lines = [json.dumps({"prompt": "paste", **row}) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join([*lines, "{"]))
    return folder, where


def build(folder, out, *options, check=True):
    dataset = folder / "rows.jsonl"
    done = run_script("data_prep/run.py", "mask", "--dataset", dataset, "--out", out, *options, check=check)
    rows = {row["id"]: row for row in map(json.loads, (out / "dataset.jsonl").read_text().splitlines())}
    rejected = {row["row"]: row["reason"] for row in map(json.loads, (out / "rejected.jsonl").read_text().splitlines())}
    return done, rows, rejected


def test_masks_from_differences(folder):
    folder, where = folder
    out = folder / "from-difference"
    done, rows, rejected = build(folder, out, "--processes", "1", "--dilate", "0", check=False)
    assert done.returncode == 2
    assert "error: row 3" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(rows) == ["paste", "a/large", "all", "mask", "thin"]
    assert rejected.keys() == {3, 5, 8}
    assert "differ only by noise" in rejected[3]
    assert "broken.png" in (out / "rejected.jsonl").read_text()

    row = rows["paste"]
    assert (row["tag"], row["group"], row["split"], row["prompt"]) == ("add", "g", "validation", "paste")
    assert [each.get("weight") for each in rows.values()] == [2.5, None, None, None, None]
    assert row["image"] == str(folder / "target.png")
    assert rows["a/large"]["bridge_image"] == 1
    for id in ("paste", "a/large"):
        mask = np.asarray(Image.open(out / rows[id]["back_mask"]))
        assert mask.shape == (SIDE, SIDE)
        assert overlap(mask == 0, where) > 0.9
    assert (np.asarray(Image.open(out / rows["all"]["back_mask"])) == 0).mean() > 0.95


def test_given_masks_and_any_number_of_processes(folder):
    folder, where = folder
    options = ["--from", "given", "--invert", "--binarise", "128", "--dilate", "2", "--on-error", "skip"]
    _, rows, rejected = build(folder, folder / "one", *options, "--processes", "1")
    build(folder, folder / "two", *options, "--processes", "2")
    assert list(rows) == ["mask"]
    assert "has no back_mask" in rejected[1]
    assert "different shapes" in rejected[7]
    edited = np.asarray(Image.open(folder / "one" / rows["mask"]["back_mask"])) == 0
    grown = ndimage.distance_transform_edt(~where) <= 2
    assert edited.shape == (SIDE, SIDE)
    assert overlap(edited, grown) > 0.95
    for name in ("dataset.jsonl", "rejected.jsonl", rows["mask"]["back_mask"]):
        assert (folder / "one" / name).read_bytes() == (folder / "two" / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--invert"], "--invert and --binarise are for given masks"),
        (["--feather", "-1"], "--feather must be 0 or more, got -1"),
        (["--from", "given", "--binarise", "256"], "--binarise must be in 1 to 255, got 256"),
        (["--from", "nothing"], "'nothing' is not one of"),
    ],
)
def test_options_that_cannot_be(folder, options, words):
    dataset, out = folder[0] / "rows.jsonl", folder[0] / "never"
    done = run_script("data_prep/run.py", "mask", "--dataset", dataset, "--out", out, *options, check=False)
    assert done.returncode == 2
    assert words in done.stderr
    assert not out.exists()


def test_the_dataset_itself_is_never_written(folder, tmp_path):
    dataset = tmp_path / "dataset.jsonl"
    dataset.write_text("{}\n")
    done = run_script("data_prep/run.py", "mask", "--dataset", dataset, "--out", tmp_path, check=False)
    assert done.returncode == 2
    assert "would overwrite" in done.stderr
    assert dataset.read_text() == "{}\n"
