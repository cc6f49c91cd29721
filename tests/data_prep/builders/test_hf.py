"""Datasets with pictures in them: what is saved has the pixels that were there, in whatever container they came."""

import io
import json
import os
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from data_prep.rows.images import open_image
from data_prep.rows.rows import Row, read_rows
from tests.pictures import contents, dataset, picture, prepare, rejected

pytestmark = pytest.mark.slow

SIZE = (40, 32)


def encode(image: Image.Image, kind: str = "PNG", **options) -> dict[str, Any]:
    """A cell of an image column."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def with_hole(image: Image.Image, left: int, transparent: bool) -> Image.Image:
    """A photograph with a hole of 10x8 pixels, as MagicBrush's masks are."""
    pixels = np.dstack([np.asarray(image), np.full((SIZE[1], SIZE[0]), 255, np.uint8)])
    pixels[4:12, left : left + 10] = (9, 9, 9, 0) if transparent else (255, 255, 255, 255)
    return Image.fromarray(pixels if transparent else pixels[..., :3])


def magicbrush_rows() -> list[dict[str, Any]]:
    photo, edited, again = (picture(seed, SIZE) for seed in (1, 2, 3))
    photo.putpixel((0, 0), (255, 255, 254))
    turns = [("77", 1, photo, edited, True), ("77", 2, edited, again, False), ("78", 1, again, photo, False)]
    return [
        {"img_id": id, "turn_index": turn, "source_img": encode(source), "instruction": f"edit {id} {turn}",
         "target_img": encode(target), "mask_img": encode(with_hole(source, 5 * turn, transparent))}
        for id, turn, source, target, transparent in turns
    ]  # fmt: skip


def as_dataset(rows: list[dict[str, Any]], *pictures: str) -> datasets.Dataset:
    """Like `Dataset.from_list`, with image columns."""
    table = datasets.Dataset.from_list(rows)
    for name in pictures:
        table = table.cast_column(name, datasets.Image())
    return table


@pytest.fixture
def hf(tmp_path, tmp_path_factory):
    """Runs the command, far from the network and from the user's cache."""
    cache = tmp_path_factory.getbasetemp() / "hf_home"
    env = os.environ | {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return lambda *arguments, **options: prepare("hf", *arguments, "--out", tmp_path / "out", env=env, **options)


MAGICBRUSH = ("source_img", "target_img", "mask_img")


def test_magicbrush_with_one_flag(tmp_path, hf):
    table = as_dataset(magicbrush_rows(), *MAGICBRUSH)
    datasets.DatasetDict(train=table.select([0, 1]), dev=table.select([2])).save_to_disk(tmp_path / "mb")
    hf("--dataset", tmp_path / "mb", "--layout", "magicbrush")
    rows = dataset(tmp_path / "out")
    assert [(row["id"], row["group"], row["split"], row["prompt"]) for row in rows] == [
        ("77-1", "77", "train", "edit 77 1"),
        ("77-2", "77", "train", "edit 77 2"),
        ("78-1", "78", "validation", "edit 78 1"),
    ]
    assert rows[0]["edit_image"] == "images/train-00000000-source_img.png"
    assert rows[2]["back_mask"] == "images/dev-00000000-mask.png"
    for row, turn in zip(rows, (1, 2, 1), strict=True):
        expected = np.full((SIZE[1], SIZE[0]), 255)
        expected[4:12, 5 * turn : 5 * turn + 10] = 0
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / row["back_mask"])), expected)
    assert all(isinstance(row, Row) for row in read_rows(tmp_path / "out/dataset.jsonl"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".parts", "dataset.jsonl", "images", "rejected.jsonl",
    ]  # fmt: skip


TURNED = Image.Exif()
TURNED[0x0112] = 6

KINDS = {
    "rgb.png": (encode(picture(4, SIZE)), ".png"),
    "grey.png": (encode(picture(4, SIZE).convert("L")), ".png"),
    "photo.jpg": (encode(picture(4, SIZE), "JPEG"), ".jpg"),
    "alpha.png": (encode(picture(4, SIZE).convert("RGBA").rotate(9)), None),
    "palette.png": (encode(picture(4, SIZE).convert("P")), None),
    "16 bit.png": (encode(Image.fromarray(np.arange(1280, dtype=np.uint16).reshape(32, 40) * 50)), None),
    "cmyk.jpg": (encode(picture(4, SIZE).convert("CMYK"), "JPEG"), None),
    "turned.jpg": (encode(picture(4, SIZE), "JPEG", exif=TURNED), None),
    "animated.png": (encode(picture(4, SIZE), save_all=True, append_images=[picture(5, SIZE)]), None),
    "still.webp": (encode(picture(4, SIZE), "WEBP", lossless=True), None),
}  # fmt: skip


def test_ordinary_files_are_kept_and_others_become_png(tmp_path, hf):
    rows = [
        {"original_image": cell, "edited_image": encode(picture(6, SIZE)), "edit_prompt": name}
        for name, (cell, _) in KINDS.items()
    ]
    as_dataset(rows, "original_image", "edited_image").save_to_disk(tmp_path / "ip2p")
    hf("--dataset", tmp_path / "ip2p", "--layout", "instructpix2pix")
    made = {row["prompt"]: tmp_path / "out" / row["edit_image"] for row in dataset(tmp_path / "out")}
    assert list(made) == list(KINDS)
    for name, (cell, ending) in KINDS.items():
        (tmp_path / "original").write_bytes(cell["bytes"])
        assert (made[name].read_bytes() == cell["bytes"]) is (ending is not None)
        assert made[name].suffix == (ending or ".png")
        assert np.array_equal(np.asarray(open_image(made[name])), np.asarray(open_image(tmp_path / "original")))


def test_rows_of_one_original_picture_share_a_group(tmp_path, hf):
    first, second = encode(picture(1, SIZE)), encode(picture(2, SIZE).convert("RGBA"))
    sources = [first, second, first, second]
    rows = [
        {"input_image": source, "edited_image": encode(picture(9, SIZE)), "edit_prompt": "p", "kind": kind}
        for source, kind in zip(sources, "abcd", strict=True)
    ]
    as_dataset(rows, "input_image", "edited_image").to_parquet(tmp_path / "rows.parquet")
    options = ("--dataset", tmp_path / "rows.parquet", "--layout", "instructpix2pix")
    hf(*options, "--prompt", "do {kind}", "--column", "tag=kind", "--limit", 4)
    one, two, *others = [row["group"] for row in dataset(tmp_path / "out")]
    assert one != two
    assert others == [one, two]
    assert [(row["prompt"], row["tag"]) for row in dataset(tmp_path / "out")] == [(f"do {k}", k) for k in "abcd"]


def faulty_rows() -> list[dict[str, Any]]:
    """The second's source is truncated, the third has no target, the fourth's mask has another shape, the fifth is good."""
    rows = magicbrush_rows() + magicbrush_rows()[:2]
    for number, row in enumerate(rows):
        row["img_id"] = str(number)
    rows[1]["source_img"]["bytes"] = rows[1]["source_img"]["bytes"][:2000]
    rows[2]["target_img"] = None
    rows[3]["mask_img"] = encode(picture(1, (32, 40)))
    return rows


@pytest.mark.parametrize("streaming", [(), ("--streaming",)], ids=["local", "stream"])
def test_bad_pictures_are_rejected_alone(streaming, tmp_path, hf):
    as_dataset(faulty_rows(), *MAGICBRUSH).to_parquet(tmp_path / "mb.parquet")
    options = ("--dataset", tmp_path / "mb.parquet", "--layout", "magicbrush", *streaming)
    done = hf(*options, check=False)
    assert done.returncode == 2
    assert "row 2 " in done.stderr
    assert [row["id"] for row in dataset(tmp_path / "out")] == ["0-1", "4-2"]
    found = rejected(tmp_path / "out")
    assert {id: (row, name) for id, (row, name, _) in found.items()} == {
        f"train-0000000{row - 1}": (row, "mb.parquet") for row in (2, 3, 4)
    }
    reasons = [reason for _, _, reason in found.values()]
    for part, reason in zip(
        ["edit_image: cannot be read: ", "image is missing", "back_mask: the mask and its image have different shapes"],
        reasons,
        strict=True,
    ):
        assert part in reason
    assert not (tmp_path / "out/.originals").exists()


def test_a_stream_two_processes_and_a_second_run_give_the_same_bytes(tmp_path, hf):
    rows = [{**row, "img_id": f"{n}-{row['img_id']}"} for n in range(8) for row in magicbrush_rows()]
    as_dataset(rows, *MAGICBRUSH).to_parquet(tmp_path / "mb.parquet")
    options = ("--dataset", tmp_path / "mb.parquet", "--layout", "magicbrush")
    hf(*options)
    first = contents(tmp_path / "out")
    assert len(first) == 2 + 3 * len(rows)
    dates = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/images").iterdir()}
    (tmp_path / "out/images/train-00000001-target_img.png").unlink()
    hf(*options)
    assert contents(tmp_path / "out") == first
    assert sum(path.stat().st_mtime_ns != date for path, date in dates.items()) < len(dates)
    for variant in (("--streaming",), ("--processes", 2)):
        (tmp_path / "out").rename(tmp_path / f"before {variant[0]}")
        hf(*options, *variant)
        assert contents(tmp_path / "out") == first


def test_an_image_folder_with_several_pictures_a_row(tmp_path, hf):
    for name in ("a", "b"):
        picture(ord(name), SIZE).save(tmp_path / f"{name}.png")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").rename(folder / f"{name}.png")
    (folder / "metadata.jsonl").write_text(
        json.dumps({"before_file_name": "a.png", "after_file_name": "b.png", "text": "go"}) + "\n"
    )
    columns = ("--column", "edit_image=before", "--column", "image=after", "--column", "prompt=text")
    hf("--dataset", folder, *columns, "--split", "train")
    (row,) = dataset(tmp_path / "out")
    assert row["prompt"] == "go"
    assert (tmp_path / "out" / row["image"]).read_bytes() == (folder / "b.png").read_bytes()
    assert (tmp_path / "out" / row["edit_image"]).read_bytes() == (folder / "a.png").read_bytes()


def test_lists_of_sources_and_white_means_edit(tmp_path, hf):
    mask = Image.fromarray(np.repeat([[0, 255]], 16, axis=0).astype(np.uint8)).resize(
        (32, 32), Image.Resampling.NEAREST
    )
    row = {"refs": [encode(picture(1)), encode(picture(2).convert("P"))], "image": encode(picture(3, (32, 32))),
           "prompt": "p", "region": encode(mask), "weight": 2.5}  # fmt: skip
    table = as_dataset([row], "image", "region").cast_column("refs", datasets.List(datasets.Image()))
    table.save_to_disk(tmp_path / "data")
    columns = ("--column", "edit_image=refs", "--column", "back_mask=region")
    hf("--dataset", tmp_path / "data", *columns, "--mask", "edit")
    (made,) = dataset(tmp_path / "out")
    assert made["edit_image"] == ["images/train-00000000-refs-1.png", "images/train-00000000-refs-2.png"]
    assert made["weight"] == 2.5
    saved = np.asarray(Image.open(tmp_path / "out" / made["back_mask"]))
    assert np.array_equal(saved, 255 - np.asarray(mask))


WRONG = {
    "has no column 'original_image' or 'input_image'; it has": ("--layout", "instructpix2pix"),
    "the column 'instruction' of": ("--layout", "magicbrush", "--column", "edit_image=instruction"),
    "it has no split 'test', but train": ("--layout", "magicbrush", "--split", "test"),
    "cannot be loaded": ("--layout", "magicbrush", "--dataset", "nobody/nowhere"),
    "its name must end with one of": ("--layout", "magicbrush", "--dataset", "README.md"),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_command_is_answered_in_a_sentence(message, tmp_path, hf):
    as_dataset(magicbrush_rows(), *MAGICBRUSH).save_to_disk(tmp_path / "mb")
    done = hf("--dataset", tmp_path / "mb", *WRONG[message], check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
