"""Each kind of bad input is told with its row, its path and its reason; the other rows survive, and --fix keeps them."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from data_prep.check.check import command
from data_prep.check.cleaning import write_cleaned
from data_prep.errors import InputError
from scripts import photographs
from tests.caching import write_image
from tests.check_data import check_here, found, run_check, write_jsonl
from tests.commands import run_script

pytestmark = pytest.mark.slow

RED = Image.new("RGB", (80, 60), "red")


def photograph(path: Path) -> None:
    """Something that is like no other, by the path."""
    write_image(path, seed=sum(path.name.encode()), width=80, height=60)


def picture(path: Path) -> Image.Image:
    photograph(path)
    with Image.open(path) as image:
        return image.convert("RGB")


def truncate(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, format="JPEG")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def forbid(path: Path) -> None:
    photograph(path)
    path.chmod(0)


def rotate(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(path).transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


def animate(path: Path) -> None:
    picture(path).save(path, save_all=True, append_images=[RED])


def half_transparent(path: Path) -> None:
    image = picture(path).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    image.save(path)


def sixteen_bits(path: Path) -> None:
    values = np.random.default_rng(1).integers(0, 65536, (6, 8), dtype=np.uint16)
    Image.fromarray(values.repeat(10, 0).repeat(10, 1)).save(path)


UNUSABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated.jpg": (truncate, "truncated"),
    "empty.jpg": (Path.touch, "zero bytes"),
    "page.jpg": (lambda path: path.write_text("<html>404</html>"), "not an image"),
    "missing.png": (lambda path: None, "no such file"),
    "pixel.png": (lambda path: Image.new("RGB", (1, 1)).save(path), "1x1 is too small"),
    "long.png": (lambda path: Image.new("L", (30000, 200)).save(path), "30000x200 is too thin"),
    "bomb.png": (lambda path: Image.new("1", (12000, 12000)).save(path), "decompression-bomb limit"),
    "loop.png": (lambda path: path.symlink_to(path), "symbolic links"),
    "secret.png": (forbid, "Permission denied"),
    "folder.png": (Path.mkdir, "directory"),
}
CONVERTED: dict[str, tuple[Callable[[Path], object], str]] = {
    "liar.jpg": (
        lambda path: picture(path.with_suffix(".png")).save(path, format="PNG"),
        "its name says JPEG, it is PNG",
    ),
    "print.jpg": (lambda path: picture(path).convert("CMYK").save(path), "CMYK"),
    "deep.png": (sixteen_bits, "16 bits"),
    "half.png": (half_transparent, "transparency"),
    "moving.gif": (animate, "animated: the first frame"),
    "moving.webp": (animate, "animated: the first frame"),
    "phone.jpg": (rotate, "EXIF"),
}
PLAIN: dict[str, Callable[[Path], object]] = {
    "ünï 图.png": photograph,
    "palette.png": lambda path: picture(path).quantize(64).save(path),
    "grey.png": lambda path: picture(path).convert("L").save(path),
}
CELLS = {
    "no prompt": ({"prompt": "  "}, "prompt is missing or empty"),
    "outside": ({"image": "../outside.png"}, "is outside the root folder"),
    "a link": ({"image": "https://example.org/a.png"}, "must be the path of a file"),
    "second id": ({"id": "plain ünï 图.png"}, "is already used by an earlier row"),
    "not UTF-8": ({"prompt": "caf\udce9"}, "prompt is not UTF-8 text"),
    "no source": ({"edit_image": "[]"}, "edit_image is an empty list"),
}
ROWS = {
    **{f"plain {name}": ("", "") for name in PLAIN},
    **{f"converted {name}": ("converted", reason) for name, (_, reason) in CONVERTED.items()},
    **{f"unusable {name}": ("file", reason) for name, (_, reason) in UNUSABLE.items()},
    **{f"cell {name}": ("row", reason) for name, (_, reason) in CELLS.items()},
}
"""Row's name -> the kind of its only finding, and its reason."""
NUMBERS = {name: number for number, name in enumerate(ROWS, 1)}
OPTIONS = ("--min-side", "16", "--max-aspect", "90")


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A CSV with a byte-order mark, a row of each kind, and a cell that is not UTF-8; its report."""
    folder = tmp_path_factory.mktemp("bad")
    for name, write in {**PLAIN, **{n: w for n, (w, _) in {**CONVERTED, **UNUSABLE}.items()}}.items():
        write(folder / name)
    lines = ["id,prompt,image,edit_image"]
    for name in ROWS:
        photograph(folder / f"source {NUMBERS[name]}.png")
        row = {"id": name, "prompt": f"prompt of {name}", "image": name.split(" ", 1)[1]}
        row["edit_image"] = f"source {NUMBERS[name]}.png"
        row |= CELLS[name.removeprefix("cell ")][0] if name.startswith("cell ") else {}
        lines.append(",".join(f'"{row[column]}"' for column in lines[0].split(",")))
    text = "\ufeff" + "\r\n".join(lines)
    (folder / "rows.csv").write_bytes(text.encode(errors="surrogateescape"))
    return folder / "rows.csv", run_check(folder / "rows.csv", *OPTIONS, code=2)


@pytest.mark.parametrize("name", ROWS)
def test_each_row_has_its_finding_with_number_path_and_reason(name, bad):
    if name == "unusable secret.png" and os.geteuid() == 0:
        pytest.skip("root reads everything")
    dataset, report = bad
    kind, reason = ROWS[name]
    findings = [each for each in report["findings"] if each["row"] == NUMBERS[name]]
    assert [each["kind"] for each in findings] == ([kind] if kind else [])
    for each in findings:
        assert reason in each["message"]
        assert each["severity"] == ("warning" if kind == "converted" else "error")
        expected = dataset if kind == "row" else dataset.parent / name.split(" ", 1)[1]
        assert each["path"] == str(expected)


def test_the_page_shows_what_can_be_shown(bad):
    dataset, report = bad
    page = (dataset.parent / "check/check.html").read_text()
    assert report["usable"] == len(PLAIN) + len(CONVERTED) + (os.geteuid() == 0)
    assert page.count("zero bytes") >= 2


def test_fix_writes_the_other_rows_beside_the_file_and_never_over_one(bad):
    dataset, report = bad
    before = dataset.read_bytes()
    run_check(dataset, *OPTIONS, "--fix")
    cleaned = dataset.with_name("rows.cleaned.jsonl")
    rows = [json.loads(line) for line in cleaned.read_text().splitlines()]
    assert dataset.read_bytes() == before
    errors = {each["row"] for each in report["findings"] if each["severity"] == "error"}
    assert [row["id"] for row in rows] == [name for name in ROWS if NUMBERS[name] not in errors]
    assert rows[0]["image"] == "ünï 图.png"
    again = check_here(cleaned, min_side=16, max_aspect=90)
    assert again["rows_with_errors"] == 0
    has_error = bytearray(number in errors for number in NUMBERS.values())
    assert write_cleaned(str(dataset), None, has_error, cleaned) == len(rows)  # the same rows once more
    cleaned.write_text("mine\n")
    with pytest.raises(InputError, match="exists with other rows"):
        write_cleaned(str(dataset), None, has_error, cleaned)
    assert cleaned.read_text() == "mine\n"
    with pytest.raises(InputError, match="is without errors"):
        write_cleaned(str(dataset), None, bytearray(b"\1" * len(ROWS)), dataset.with_name("none.jsonl"))
    assert not dataset.with_name("none.jsonl").exists()


def test_a_dataset_without_a_usable_row_is_reported_too(tmp_path):
    dataset = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "x", "image": "a.png", "edit_image": "b.png"}])
    with pytest.raises(InputError, match="is without errors"):
        check_here(dataset, fix=True)
    report = json.loads((tmp_path / "check/check.json").read_text())
    assert (report["rows"], report["usable"], report["buckets"], report["cache"]["bytes"]) == (1, 0, [], 0)
    assert "no such file" in (tmp_path / "check/check.html").read_text()
    assert not list(tmp_path.glob("*cleaned*"))


def test_what_is_left_of_a_folder_is_read_beside_it_or_with_the_root(tmp_path, capsys):
    """A dataset of `save_to_disk`, whose paths start in its folder: seen from the new file, they start beside it."""
    import datasets

    folder, rows = tmp_path / "pairs", []
    for number, name in enumerate(("one", "two", "bad")):
        rows.append({"prompt": name, "image": f"{name}1.png", "edit_image": [f"{name}0.png"]})
        for place in range(2 if name != "bad" else 0):
            write_image(tmp_path / f"{name}{place}.png", 2 * number + place)
    datasets.Dataset.from_list(rows).save_to_disk(folder)
    for path in tmp_path.glob("*.png"):
        path.rename(folder / path.name)
    cleaned = tmp_path / "pairs.cleaned.jsonl"
    check_here(folder, fix=True, min_side=60)
    assert "data.root" not in capsys.readouterr().out
    assert [json.loads(line)["image"] for line in cleaned.read_text().splitlines()] == [
        "pairs/one1.png",
        "pairs/two1.png",
    ]
    assert check_here(cleaned, min_side=60)["findings"] == []

    cleaned.unlink()
    check_here(folder, fix=True, min_side=60, root=folder)
    assert capsys.readouterr().out.rstrip().replace("\n", "").endswith(f"use them with data.root={folder}")
    assert json.loads(cleaned.read_text().splitlines()[0])["edit_image"] == ["one0.png"]
    assert check_here(cleaned, min_side=60, root=folder)["findings"] == []


def test_lists_in_lists_in_lists_are_not_json(tmp_path):
    (tmp_path / "rows.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="is not JSON"):
        check_here(tmp_path / "rows.json")


def test_a_wrong_option_is_one_sentence(bad):
    arguments = ("--dataset", bad[0], "--out", bad[0].with_name("check"), "--ignore", "file")
    done = run_script("data_prep/run.py", "check", *arguments, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no finding 'file' can be ignored: choose from shift,")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_shift": 0}, "--max-shift must be above 0, got 0"),
        ({"micro_batch_sizes": "1,x"}, "--micro-batch-sizes must be whole numbers"),
        ({"ignore": ["drift"]}, "no finding 'drift' can be ignored"),
        ({"time_caching": 2}, "--time-caching needs --model"),
        ({"max_pixels": 100}, "--max-pixels must be 1024 or more, got 100"),
        ({"model": "runs/models/tiny"}, "no tiny model at runs/models/tiny"),
        ({"dataset": "missing.json"}, "there is no dataset at missing.json"),
        ({"root": Path("missing")}, "missing is not a folder"),
    ],
)
def test_mistakes_are_told_in_one_sentence(options, message, bad):
    with pytest.raises(InputError, match=message):
        command(**{"dataset": str(bad[0]), "out": bad[0].with_name("check"), "processes": 1, **options})


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> tuple[dict[str, int], dict[str, Any]]:
    """Rows that can be used and have something about them: the numbers by name, and the report."""
    folder, rows = tmp_path_factory.mktemp("odd"), []

    def add(name: str, target: tuple[int, int] = (80, 80), source: tuple[int, int] = (80, 80), **values) -> None:
        for place, size in enumerate((source, target)):
            write_image(folder / f"{name}{place}.png", 2 * len(rows) + place, *size)
        row = {"id": name, "prompt": f"prompt {name}", "image": f"{name}1.png", "edit_image": f"{name}0.png"}
        rows.append({**row, **values})

    def mask(name: str, levels: int, size: tuple[int, int] = (80, 80)) -> str:
        Image.new("L", size, levels).save(folder / name)
        return name

    add("plain")
    add("small", target=(48, 80), source=(48, 80))
    add("aspect", target=(400, 64), source=(400, 64))
    add("cropped", source=(80, 64))
    add("upscaled", target=(200, 200), source=(64, 64))
    add("long_prompt", prompt="word " * 21)
    add("mask_white", back_mask=mask("white.png", 255))
    add("mask_black", back_mask=mask("black.png", 0))
    add("mask_grey", back_mask=mask("grey.png", 128))
    halves = Image.open(folder / mask("halves.png", 0, (40, 40)))
    ImageDraw.Draw(halves).rectangle((0, 0, 19, 39), fill=255)
    halves.save(folder / "halves.png")
    add("mask_size", back_mask="halves.png")
    scattered = Image.open(folder / mask("scattered.png", 255))
    for place in range(100):  # a pixel of edit in every cell of 8 x 8: no cell is background
        scattered.putpixel((8 * (place % 10) + 3, 8 * (place // 10) + 5), 0)
    scattered.save(folder / "scattered.png")
    add("mask_vanishes", back_mask="scattered.png")
    add("file", back_mask=mask("other.png", 255, (80, 40)))
    deep = np.zeros((80, 80), np.uint16)
    deep[:40] = 65535
    Image.fromarray(deep).save(folder / "deep.png")
    add("converted", back_mask="deep.png")
    add("identical")
    shutil.copy(folder / "identical0.png", folder / "identical1.png")
    add("duplicate", prompt="prompt plain")
    for place in "01":
        shutil.copy(folder / f"plain{place}.png", folder / f"duplicate{place}.png")
    add("near_duplicate", prompt="prompt plain")
    for place in "01":
        with Image.open(folder / f"plain{place}.png") as image:
            image.resize((100, 100), Image.Resampling.BICUBIC).save(folder / f"near_duplicate{place}.png")
    add("other", image="plain1.png", edit_image="plain0.png")  # another prompt for the same pictures is normal
    add("unused", split="test")
    dataset = write_jsonl(folder / "rows.jsonl", rows)
    with pytest.raises(InputError, match="rows must be fixed"):
        check_here(dataset, min_side=60, max_tokens=20, max_pixels=200 * 200, vision_pixels=112 * 112)
    report = json.loads((folder / "check/check.json").read_text())
    return {row["id"]: number for number, row in enumerate(rows, 1)}, report


def test_what_is_odd_about_usable_rows_is_told_by_kind(odd):
    numbers, report = odd
    expected = {(number, name) for name, number in numbers.items() if name not in ("plain", "other", "unused")}
    assert found(report) == expected
    severities = {each["kind"]: each["severity"] for each in report["findings"]}
    assert {kind for kind, severity in severities.items() if severity == "error"} == {"mask_white", "file", "identical"}
    others = {each["kind"]: each["other_row"] for each in report["findings"] if "other_row" in each}
    assert others == {"duplicate": numbers["plain"], "near_duplicate": numbers["plain"]}


def test_rows_of_another_split_are_in_no_bucket(odd):
    numbers, report = odd
    assert report["splits"] == {"train": len(numbers) - 2, "test": 1}  # one cannot be used
    assert sum(bucket["rows"] for bucket in report["buckets"]) == len(numbers) - 2


def test_tokens_are_the_tokenizers_and_caching_is_measured(tiny_model_dir, tmp_path):
    """Of one row of 64 x 64 pixels the cache holds target and source, which is the reference, 8 x 8 cells of 16 channels, and the
    embeddings of its text, in 16 bits; the vision tower sees 128 x 128 pixels, 5 x 5 tokens."""
    rows = []
    for number, prompt in enumerate(("Remove the sticker.", "把天空变成蓝色", "x")):
        names = [write_image(tmp_path / f"{number}{part}.png", 2 * number + place) for place, part in enumerate("st")]
        rows.append({"prompt": prompt, "image": names[1], "edit_image": names[0]})
    model = ("--model", tiny_model_dir, "--vision-pixels", str(112 * 112), "--min-side", "64")
    report = run_check(write_jsonl(tmp_path / "rows.jsonl", rows), *model, "--time-caching", "2")
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer.from_pretrained(tiny_model_dir / "processor")
    counts = [len(tokenizer.tokenize(row["prompt"])) for row in rows]
    assert report["spreads"]["tokens"]["p100"] == max(counts)
    assert report["spreads"]["tokens"]["p50"] == sorted(counts)[1]
    assert "tokenizer of" in report["tokenizer"]
    width = json.loads((tiny_model_dir / "transformer/config.json").read_text())["joint_attention_dim"]
    texts = sum(counts) + 3 * (5 * 5 + 5 + 7)
    assert report["cache"]["bytes"] == 2 * (3 * 2 * 16 * 8 * 8 + texts * width)
    assert report["cache"]["seconds"] == pytest.approx(3 * report["cache"]["seconds_per_row"])
    assert 0 < report["cache"]["seconds_per_row"] < 60


def test_what_happens_to_files_on_the_way_is_told_by_row_with_its_meaning(tmp_path, capsys):
    """A photograph saved again as its own target, a target whose turn was lost, a mere turn by EXIF, a small one, split=val."""
    crop = photographs.random_crop(photographs.load(photographs.HELD_OUT[0]), 256, random.Random(0)).crop(
        (0, 0, 256, 160)
    )
    other = photographs.random_crop(photographs.load(photographs.TRAIN[0]), 256, random.Random(1)).crop(
        (0, 0, 256, 160)
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    on_its_side = {"exif": exif, "quality": 95}

    def row(name: str, source: Image.Image, target: Image.Image, source_how: Any, target_how: Any, **values: str):
        source.save(tmp_path / f"{name}0.jpg", **source_how)
        target.save(tmp_path / f"{name}1.jpg", **target_how)
        return {"id": name, "prompt": name, "image": f"{name}1.jpg", "edit_image": f"{name}0.jpg", **values}

    again, inverted = {"quality": 60}, ImageOps.invert(crop)
    rows = [
        row("again", crop, crop, {"quality": 95}, again),
        row("lost", other.rotate(90, expand=True), other.rotate(90, expand=True), on_its_side, {"quality": 95}),
        row("phone", inverted.rotate(90, expand=True), crop.filter(ImageFilter.CONTOUR), on_its_side, {"quality": 95}),
        row("tiny", crop.resize((96, 64)), inverted.resize((96, 64)), {}, {}, split="val"),
    ]
    dataset = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InputError, match="2 of 4 rows must be fixed"):
        check_here(dataset, min_side=128, ignore=["leak", "near_duplicate"])
    shown = capsys.readouterr().out
    assert "row 1 (" in shown
    assert "identical: the target is the source, saved again as a JPEG" in shown
    assert "turned: the target is turned by 270 degrees clockwise against its source: turn one of the files" in shown
    assert "may have dropped the EXIF orientation" in shown
    assert "small: 96x64, a side under 128 pixels; it is trained at 96x64" in shown
    assert (
        "split=val (first in row 4) is neither trained on nor validated with: write validation if it is held out"
        in shown
    )
    report = json.loads((tmp_path / "check/check.json").read_text())
    assert found(report) == {
        *((1, "identical"), (2, "turned"), (2, "converted"), (3, "converted"), (4, "small")),
    }
    assert all(f"row {each['row']} (" in shown for each in report["findings"])
    told = " ".join(shown.replace("│", " ").replace("┃", " ").split())
    assert "nothing to do" in told
