"""`data_prep/run.py coco`: pairs with masks of what is annotated, cut-outs on white, and annotations that cannot be used."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from data_prep.builders.coco.segmentations import to_rle, union
from data_prep.rows.tables import BadRow
from tests.commands import run_script
from tests.pictures import contents

pytestmark = pytest.mark.slow

WIDTH, HEIGHT = 48, 32
CATEGORIES = [
    {"id": 18, "name": "dog", "supercategory": "animal"},
    {"id": 17, "name": "cat", "supercategory": "animal"},
    {"id": 3, "name": "car", "supercategory": "vehicle"},
    {"id": 5, "name": "half a character \ud800", "supercategory": "none"},
]


def box(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    """True inside, in pixels; rows first."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top:bottom, left:right] = True
    return mask


def polygon(left: int, top: int, right: int, bottom: int) -> list[list[float]]:
    return [[left, top, right, top, right, bottom, left, bottom]]


def run_lengths(mask: np.ndarray) -> dict:
    """Uncompressed, as COCO counts: down the columns, background first."""
    counts, value = [0], False
    for pixel in mask.T.ravel():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


def compressed(mask: np.ndarray) -> dict:
    rle: Any = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


GOOD = {
    # name: (category, segmentation, the mask by hand)
    "polygon": (18, polygon(8, 4, 24, 20), box(8, 4, 24, 20)),
    "two parts": (18, [*polygon(2, 2, 10, 10), *polygon(30, 20, 40, 30)], box(2, 2, 10, 10) | box(30, 20, 40, 30)),
    "overhang": (18, polygon(40, 10, 60, 20), box(40, 10, 48, 20)),
    "run lengths": (17, run_lengths(box(0, 5, 12, 9)), box(0, 5, 12, 9)),
    "compressed": (3, compressed(box(10, 10, 20, 30)), box(10, 10, 20, 30)),
    "crowd": (3, run_lengths(box(20, 0, 48, 6)), box(20, 0, 48, 6)),
}
BAD = {
    "odd": ([[1, 2, 3, 4, 5, 6, 7]], "three or more x, y"),
    "short polygon": ([[1, 2, 3, 4]], "three or more x, y"),
    "far away": ([[1, 1, 1e9, 1, 5, 5]], "far outside"),
    "infinite": ([[1, 1, float("inf"), 1, 5, 5]], "far outside"),
    "none": ([], "no segmentation"),
    "empty": (polygon(4, 4, 4, 4), "covers no pixel"),
    "too few": ({"size": [HEIGHT, WIDTH], "counts": [100, 50]}, "of 150 pixels in a 48x32 image"),
    "negative": ({"size": [HEIGHT, WIDTH], "counts": [WIDTH * HEIGHT + 6, -6]}, "not whole numbers"),
    "other size": (run_lengths(np.ones((20, 20), bool)), "of size [20, 20], height first, in a 48x32 image"),
    "cut off": (compressed(box(10, 10, 20, 30)) | {"counts": "`"}, "cut off"),
    "garbage": (compressed(box(10, 10, 20, 30)) | {"counts": "zzé"}, "which does not occur"),
    "shorter": (
        compressed(box(1, 1, 2, 2)) | {"counts": compressed(box(1, 1, 2, 2))["counts"][:2]},
        "has run lengths of",
    ),
}


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    """Photographs of noise, edited pictures, and an annotation file, good and bad."""
    folder = tmp_path_factory.mktemp("coco")
    rng = np.random.default_rng(0)
    images, annotations = [], []

    def save(name: str, width: int = WIDTH, height: int = HEIGHT, **options) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 200, (height, width, 3), np.uint8)).save(folder / name, **options)

    def add(name: str, segmentation=None, category: int = 18, size=(WIDTH, HEIGHT), **more) -> int:
        id = 100 + len(images)
        images.append({"id": id, "file_name": name, "width": size[0], "height": size[1]})
        if segmentation is not None:
            annotations.append(
                {
                    "id": 1000 + len(annotations),
                    "image_id": id,
                    "category_id": category,
                    "segmentation": segmentation,
                    **more,
                }
            )
        return id

    for name, (category, segmentation, _) in GOOD.items():
        add(f"{name}.png", segmentation, category, iscrowd=int(name == "crowd"))
        save(f"photos/{name}.png")
        save(f"edited/{name}.png")
    for name, (segmentation, _) in BAD.items():
        add(f"{name}.png", segmentation)
        save(f"photos/{name}.png")
        save(f"edited/{name}.png")

    united = add("united.png", polygon(0, 0, 10, 10))
    for category, where in ((17, (20, 20, 30, 30)), (18, (40, 0, 48, 8))):
        annotations.append({"id": 2000 + category, "image_id": united, "category_id": category})
        annotations[-1]["segmentation"] = polygon(*where)
    save("photos/united.png")
    save(f"edited/{united:012d}.png")  # by image id
    save("edited/united_2017.png")  # by annotation
    save("edited/united_2018.png")

    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    add("stored.jpg", polygon(0, 0, 8, 16))  # the size of the stored pixels
    save("photos/stored.jpg", exif=exif)
    save("edited/stored.png", HEIGHT, WIDTH)
    add("upright.jpg", polygon(0, 0, 8, 16), size=(HEIGHT, WIDTH))
    save("photos/upright.jpg", exif=exif)
    save("edited/upright.png", HEIGHT, WIDTH)
    add("square.jpg", polygon(0, 0, 8, 16), size=(32, 32))
    save("photos/square.jpg", 32, 32, exif=exif)
    save("edited/square.png", 32, 32)

    add("missing.png", polygon(0, 0, 8, 8))
    save("edited/missing.png")
    add("smaller.png", polygon(0, 0, 8, 8))
    save("photos/smaller.png", 24, 16)
    save("edited/smaller.png", 24, 16)
    add("reshaped.png", polygon(0, 0, 8, 8))
    save("photos/reshaped.png")
    save("edited/reshaped.png", 32, 32)
    add("stranger.png", polygon(0, 0, 8, 8), category=99)
    save("photos/stranger.png")
    save("edited/stranger.png")
    add("../outside.png", polygon(0, 0, 8, 8))
    add("unannotated.png")
    save("photos/unannotated.png")
    add("unedited.png", polygon(0, 0, 8, 8))
    save("photos/unedited.png")
    save("edited/nobody.png")
    for corner in (0, 20):
        annotations.append({"id": 3000, "image_id": images[-1]["id"], "category_id": 17})
        annotations[-1]["segmentation"] = polygon(corner, corner, corner + 10, corner + 10)
    add("half category.png", polygon(0, 0, 8, 8), category=5)
    images.append({"id": united, "file_name": "again.png"})
    images.append({"id": "\ud800", "file_name": "half id.png"})
    annotations.append({"id": 9999, "image_id": 5, "category_id": 18, "segmentation": polygon(0, 0, 8, 8)})

    data = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (folder / "instances.json").write_text(json.dumps(data))
    captions = [
        {"image_id": united, "id": 1, "caption": "Two animals. "},
        {"image_id": united, "id": 2, "caption": "Half a character \ud800"},
        {"image_id": 77, "id": 3, "caption": "Nothing."},
    ]
    (folder / "captions.json").write_text(json.dumps({"annotations": captions}))
    return folder


def build(coco: Path, out: Path, *options: str | Path, **more):
    paths = ("--annotations", coco / "instances.json", "--images", coco / "photos", "--out", out)
    return run_script("data_prep/run.py", "coco", *paths, *options, **more)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def pairs(coco: Path, tmp_path_factory) -> tuple[Path, str]:
    """Rows of the edited pictures, and what was printed."""
    out = tmp_path_factory.mktemp("pairs")
    options = ("--targets", coco / "edited", "--prompt", "Remove the {category}.", "--processes", "1")
    done = build(coco, out, *options, check=False)
    assert done.returncode == 2, done.stderr
    return out, done.stdout + done.stderr


def by_photo(out: Path) -> dict[str, dict]:
    return {Path(row["edit_image"]).stem: row for row in read(out / "dataset.jsonl")}


def background(out: Path, row: dict) -> np.ndarray:
    mask = np.asarray(Image.open(out / row["back_mask"]))
    assert set(np.unique(mask)) <= {0, 255}
    return mask == 255


@pytest.mark.parametrize("name", GOOD)
def test_pairs_have_masks_of_every_form_of_segmentation(pairs, coco, name):
    out, _ = pairs
    row = by_photo(out)[name]
    assert (row["edit_image"], row["image"]) == (str(coco / f"photos/{name}.png"), str(coco / f"edited/{name}.png"))
    category = {entry["id"]: entry["name"] for entry in CATEGORIES}[GOOD[name][0]]
    assert (row["prompt"], row["tag"], row["group"]) == (f"Remove the {category}.", category, f"{name}.png")
    np.testing.assert_array_equal(background(out, row), ~GOOD[name][2])


def test_annotations_of_an_image_are_united(pairs):
    out, _ = pairs
    row = by_photo(out)["united"]
    assert row["prompt"] == "Remove the dog and cat."
    np.testing.assert_array_equal(background(out, row), ~(box(0, 0, 10, 10) | box(20, 20, 30, 30) | box(40, 0, 48, 8)))


def test_exif_turns_masks_of_the_stored_picture_and_no_others(pairs):
    out, _ = pairs
    drawn = np.zeros((HEIGHT, WIDTH), bool)
    drawn[0:16, 0:8] = True
    turned = np.rot90(drawn, k=-1)  # clockwise
    np.testing.assert_array_equal(background(out, by_photo(out)["stored"]), ~turned)
    upright = np.zeros((WIDTH, HEIGHT), bool)
    upright[0:16, 0:8] = True
    np.testing.assert_array_equal(background(out, by_photo(out)["upright"]), ~upright)


REJECTED = {
    **{f"{name}.png": reason for name, (_, reason) in BAD.items()},
    "square.jpg": "it is not known whether the annotations are for the turned image",
    "missing.png": "no such file",
    "smaller.png": "24x16, its annotations are for 48x32",
    "reshaped.png": "another shape: 32x32, the photograph is 48x32",
    "stranger.png": "unknown category_id 99",
    "outside.png": "is outside the root folder",
    "nobody.png": "name of this target",
    "again.png": "already used by united.png",
    "half category.png": "is not UTF-8 text",
    "half id.png": "the id of the image is not UTF-8 text",
    "instances.json": "unknown image_id 5",
}


@pytest.mark.parametrize("name", REJECTED)
def test_unusable_ones_are_told(pairs, name):
    out, _ = pairs
    lines = [line for line in read(out / "rejected.jsonl") if Path(line["path"]).name == name]
    assert len(lines) == 1, lines
    assert REJECTED[name] in lines[0]["reason"]
    assert lines[0]["row"] >= 1


def test_the_rest_is_counted(pairs):
    out, printed = pairs
    named = {Path(line["path"]).stem for line in read(out / "rejected.jsonl")}
    assert named == {Path(name).stem for name in REJECTED} | {"united_2017", "united_2018"}
    assert len(by_photo(out)) == len(GOOD) + 3
    assert "1 images have no wanted object" in printed
    assert "1 have no edited picture" in printed
    assert not [text for text in ("loading annotations", "Traceback", "Warning") if text in printed]


def test_rows_of_annotations_filters_and_captions(coco, tmp_path):
    template = tmp_path / "templates.txt"
    template.write_text("{caption} Take away the {category}.\n")
    options = ("--targets", coco / "edited", "--per", "annotation", "--templates", template, "--on-error", "skip")
    filters = ("--categories", "dog,cat", "--min-area", "0.05", "--captions", coco / "captions.json")
    build(coco, tmp_path / "out", *options, *filters, "--processes", "1")
    (row,) = read(tmp_path / "out/dataset.jsonl")  # 2018 covers 64 of 1536 pixels
    assert row["id"].endswith("_2017")
    assert row["prompt"] == "Two animals. Take away the cat."
    assert row["image"] == str(coco / "edited/united_2017.png")
    np.testing.assert_array_equal(background(tmp_path / "out", row), ~box(20, 20, 30, 30))
    reasons = {Path(line["path"]).name: line["reason"] for line in read(tmp_path / "out/rejected.jsonl")}
    assert "several have '3000'" in reasons["unedited.png"]
    assert reasons["captions.json"] == "annotation has an id or a caption that is not UTF-8 text"


def test_cut_outs_are_the_same_with_any_number_of_processes(coco, tmp_path):
    options = ("--make", "cutout", "--prompt", "The {category} on white.", "--on-error", "skip")
    build(coco, tmp_path / "one", *options, "--processes", "1")
    build(coco, tmp_path / "two", *options, "--processes", "2")
    assert len(contents(tmp_path / "one")) > 10
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    rows = by_photo(tmp_path / "one")
    assert "crowd" not in rows
    assert rows["polygon"]["tag"] == "cutout"
    target = np.asarray(Image.open(tmp_path / "one" / rows["polygon"]["image"])).astype(int)
    photo = np.asarray(Image.open(coco / "photos/polygon.png")).astype(int)
    same = (target == photo).all(axis=-1)
    np.testing.assert_array_equal(background(tmp_path / "one", rows["polygon"]), same)
    assert same[8:16, 12:20].all()  # well inside the object
    assert (target[~box(5, 1, 27, 23)] == 255).all()  # well outside
    assert not same[~box(5, 1, 27, 23)].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", "x"), "either --targets FOLDER"),
        (("--make", "cutout"), "rows need an instruction"),
        (("--make", "cutout", "--prompt", "a {categry}"), "unknown field {categry}"),
        (("--make", "cutout", "--prompt", "x", "--categories", "dgo"), "did you mean 'dog'?"),
        (("--make", "cutout", "--prompt", "x", "--annotations", "README.md"), "not a JSON file"),
    ],
)
def test_mistakes_are_one_sentence(coco, tmp_path, options, message):
    done = build(coco, tmp_path, *options, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") <= 2


@pytest.mark.parametrize("name", BAD)
def test_broken_segmentations_never_reach_the_library(name):
    """pycocotools reads foreign memory for run lengths that are too short."""
    with pytest.raises(BadRow):
        to_rle(BAD[name][0], (WIDTH, HEIGHT))


def test_compressed_run_lengths_are_read_as_the_library_writes_them():
    rng = np.random.default_rng(1)
    for share in (0.01, 0.3, 0.9):
        mask = rng.random((61, 47)) < share
        decoded = union([to_rle(compressed(mask), (47, 61))])
        np.testing.assert_array_equal(np.asarray(decoded) == 255, mask)
