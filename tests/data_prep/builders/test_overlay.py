"""`data_prep/run.py overlay`: texts and pictures laid over photographs, legible, in place, with the exact mask."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFont

from data_prep.builders.overlay.composite import contrast
from data_prep.builders.overlay.typography import DEFAULT_FONT, break_lines, lay_out
from data_prep.rows.images import open_image
from tests.commands import run_script

pytestmark = pytest.mark.slow

SIZE = (160, 120)
TEXTS = {
    "latin": "Summer sale: fünfzig Prozent!",
    "greek": "Καλημέρα κόσμε",
    "cyrillic": "Съешь ещё этих булок",
    "arabic": "مرحبا بالعالم",
    "hebrew": "שלום עולם 123",
}
CHINESE = "你好 Berlin"
FIELDS = ["id", "image_id", "overlay_text", "overlay_image", "text", "prompt", "prompt_remove", "direction"]
FIELDS += ["position", "font_size", "overlay_size", "colour", "opacity", "rotation", "note"]

BAD = {
    "no photo": ({"image_id": "nobody", "text": "a"}, "no image 'nobody'"),
    "broken photo": ({"image_id": "broken", "text": "a"}, "cannot be read"),
    "ambiguous": ({"image_id": "twice", "text": "a"}, "twice.jpg or twice.png: write the ending"),
    "leaves": ({"image_id": "../white", "text": "a"}, "is outside the root folder"),
    "no text file": ({"overlay_text": "texts/none.txt"}, "cannot be read: No such file"),
    "text leaves": ({"overlay_text": "../../x.txt"}, "is outside the root folder"),
    "latin-1": ({"overlay_text": "texts/latin-1.txt"}, "is not UTF-8 text"),
    "empty": ({"overlay_text": "texts/empty.txt"}, "is empty"),
    "binary": ({"overlay_text": "texts/binary.txt"}, "control characters"),
    "chinese": ({"overlay_text": "texts/chinese.txt"}, "no picture for 你 (U+4F60), 好 (U+597D)"),
    "too long": ({"text": "word " * 390}, "does not fit into the 160x120 photograph"),
    "both": ({"text": "a", "overlay_image": "logo.png"}, "this one fills overlay_image and text"),
    "neither": ({}, "this one fills none"),
    "colour": ({"text": "a", "colour": "#12345"}, "colour must be auto"),
    "see-through": ({"text": "a", "colour": "#11223344"}, "colour must be auto"),
    "opacity": ({"text": "a", "opacity": "nan"}, "opacity must be a number from 0.05 to 1"),
    "position": ({"text": "a", "position": "1.2,0"}, "position must be random"),
    "size": ({"text": "a", "font_size": "0.5:0.1"}, "font_size"),
    "direction": ({"text": "a", "direction": "up"}, "direction must be add, remove or both"),
    "no instruction": ({"text": "a", "prompt": ""}, "no instruction to add"),
    "no picture": ({"overlay_image": "none.png"}, "no such file"),
    "invisible": ({"overlay_image": "invisible.png"}, "changes no pixel"),
    "repeated": ({"id": "latin", "text": "a"}, "the id 'latin' is already used"),
    "not UTF-8": ({"text": "caf\udce9"}, "text is not UTF-8"),
}


def good() -> dict[str, dict[str, str]]:
    rows = {name: {"overlay_text": f"texts/{name}.txt", "image_id": "busy.jpg"} for name in TEXTS}
    return rows | {
        "coco": {"image_id": "139", "text": "by number", "direction": "remove", "prompt": "clean it"},
        "nested": {
            "image_id": "sub/deep",
            "text": "two\nlines",
            "direction": "both",
            "prompt_remove": "own {text} {word}",
        },
        "template": {"image_id": "white", "text": "Hi {you}", "direction": "both", "prompt": "write it"},
        "logo": {"image_id": "grey", "overlay_image": "logo.png", "position": "bottom-right", "overlay_size": "0.5"},
        "faint": {"image_id": "grey", "overlay_image": "red.png", "position": "0.5,0.5", "opacity": "0.5"},
        "turned": {"image_id": "busy", "text": "turned around", "rotation": "90", "position": "left"},
        "corner": {"image_id": "white", "text": "corner", "position": "top-left", "colour": "navy", "id": "corner"},
        "fit": {"image_id": "black", "text": "Enormous", "font_size": "fit"},
        "long word": {"image_id": "busy", "text": "Donaudampfschifffahrtsgesellschaftskapitän" * 2},
    }


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Photographs, texts, overlays, and a table of good and bad rows."""
    folder = tmp_path_factory.mktemp("overlay")
    for name in ("photos/sub", "texts"):
        (folder / name).mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8)
    Image.fromarray(noise).save(folder / "photos/busy.jpg")
    for name in ("000000000139.jpg", "sub/deep.webp", "twice.jpg", "twice.png"):
        Image.fromarray(noise).save(folder / "photos" / name)
    for name in ("white", "black", "grey"):
        Image.new("RGB", SIZE, name).save(folder / f"photos/{name}.png")
    (folder / "photos/broken.jpg").write_bytes((folder / "photos/busy.jpg").read_bytes()[:3000])

    for name, text in TEXTS.items():
        (folder / f"texts/{name}.txt").write_text(text, encoding="utf-8-sig" if name == "greek" else "utf-8")
    (folder / "texts/chinese.txt").write_text(CHINESE, encoding="utf-8")
    (folder / "texts/latin-1.txt").write_bytes("Café".encode("latin-1"))
    (folder / "texts/empty.txt").write_text(" \n ")
    (folder / "texts/binary.txt").write_text("a\x07b")

    logo = np.zeros((40, 80, 4), np.uint8)
    logo[10:30, 20:60] = (255, 0, 0, 255)
    Image.fromarray(logo).save(folder / "logo.png")
    Image.new("RGB", (40, 40), "red").save(folder / "red.png")
    Image.new("RGBA", (40, 40), (255, 0, 0, 0)).save(folder / "invisible.png")

    rows = [{"id": name, "prompt": f"do {name}", **row} for name, row in good().items()]
    rows += [{"id": name, "image_id": "white", "prompt": "x", **row} for name, (row, _) in BAD.items()]
    with open(folder / "table.csv", "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        table = csv.DictWriter(file, FIELDS)
        table.writeheader()
        table.writerows(rows)
    return folder


def build(inputs: Path, out: Path, *options: str | Path, **more):
    paths = ("--table", inputs / "table.csv", "--images", inputs / "photos", "--out", out)
    return run_script("data_prep/run.py", "overlay", *paths, "--prompt-remove", 'Remove "{text}"', *options, **more)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def built(inputs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("built")
    done = build(inputs, out, "--processes", "1", check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    return out


@pytest.fixture(scope="module")
def rows(built) -> dict[str, dict]:
    return {row["id"]: row for row in read(built / "dataset.jsonl")}


def pixels(built: Path, row: dict, name: str) -> np.ndarray:
    return np.asarray(open_image(built / row[name])).astype(int)


def changed(built: Path, row: dict) -> np.ndarray:
    mask = np.asarray(Image.open(built / row["back_mask"]))
    assert set(np.unique(mask)) <= {0, 255}
    return mask == 0


def box(built: Path, row: dict) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what changed."""
    high, wide = np.nonzero(changed(built, row))
    return wide.min(), high.min(), wide.max() + 1, high.max() + 1


def test_every_good_row_is_there(rows):
    both = {"nested", "template"}
    assert set(rows) == (set(good()) - both) | {f"{name}-{each}" for name in both for each in ("add", "remove")}


def test_masks_are_black_exactly_where_source_and_target_differ(built, rows):
    for row in rows.values():
        differ = (pixels(built, row, "image") != pixels(built, row, "edit_image")).any(axis=-1)
        np.testing.assert_array_equal(changed(built, row), differ)
        assert 0 < differ.mean() < 0.9, row["id"]


def test_directions_and_instructions(inputs, rows):
    photo = str(inputs / "photos/000000000139.jpg")
    assert rows["coco"] | {"prompt": "clean it", "image": photo, "tag": "remove-text"} == rows["coco"]
    assert rows["latin"]["edit_image"] == str(inputs / "photos/busy.jpg")
    assert rows["latin"]["tag"] == "add-text"
    assert (rows["nested-add"]["prompt"], rows["nested-remove"]["prompt"]) == ("do nested", "own two lines {word}")
    assert (rows["template-add"]["prompt"], rows["template-remove"]["prompt"]) == ("write it", 'Remove "Hi {you}"')
    assert rows["nested-add"]["image"] == rows["nested-remove"]["edit_image"]
    assert rows["nested-add"]["edit_image"] == rows["nested-remove"]["image"]
    assert {rows[name]["group"] for name in ("nested-add", "nested-remove")} == {"sub/deep.webp"}
    assert rows["logo"]["tag"] == "add-image"


def test_pictures_are_blended_as_their_transparency_and_the_opacity_say(built, rows):
    # 80x40 in half of 160x120: as it is. Its visible part, 40x20, is inset by 20 and 10; the margin is 2 % of 120.
    assert box(built, rows["logo"]) == (160 - 2 - 60, 120 - 2 - 30, 160 - 2 - 20, 120 - 2 - 10)
    assert set(map(tuple, pixels(built, rows["logo"], "image")[changed(built, rows["logo"])])) == {(255, 0, 0)}
    # 30 % of the height: 36 pixels in the middle. Half red over grey 128.
    assert box(built, rows["faint"]) == (62, 42, 98, 78)
    colours = pixels(built, rows["faint"], "image")[changed(built, rows["faint"])]
    np.testing.assert_allclose(colours, np.broadcast_to([191.5, 64, 64], colours.shape), atol=1)


def test_texts_are_where_and_as_large_as_wanted(built, rows):
    left, top, right, bottom = box(built, rows["corner"])
    assert (left, top) < (8, 8)
    assert (right, bottom) < (SIZE[0] // 2, SIZE[1] // 3)
    assert tuple(pixels(built, rows["corner"], "image").reshape(-1, 3).min(axis=0)) == (0, 0, 128)  # navy
    left, top, right, bottom = box(built, rows["turned"])
    assert bottom - top > 3 * (right - left) > 0
    left, top, right, bottom = box(built, rows["fit"])
    assert right - left > 0.7 * SIZE[0]
    for row in rows.values():
        left, top, right, bottom = box(built, row)
        assert 0 < left < right < SIZE[0], row["id"]  # nothing is cut off at a border
        assert 0 < top < bottom < SIZE[1], row["id"]


def test_colours_contrast_with_what_they_are_on(built, rows):
    assert pixels(built, rows["template-add"], "image").min() < 60  # dark on white
    assert pixels(built, rows["fit"], "image").max() > 190  # light on black
    texts = [pixels(built, rows[name], "image") for name in TEXTS]
    for target, name in zip(texts, TEXTS, strict=True):  # on noise no colour is enough: letters stand on black or white
        part = target[changed(built, rows[name])]
        assert (part.max(axis=-1) < 70).mean() > 0.1 or (part.min(axis=-1) > 185).mean() > 0.1


@pytest.mark.parametrize("name", BAD)
def test_unusable_rows_are_told(built, name):
    number = 1 + len(good()) + list(BAD).index(name)
    (line,) = [line for line in read(built / "rejected.jsonl") if line["row"] == number]
    assert BAD[name][1] in line["reason"]
    file = next((BAD[name][0][key] for key in ("overlay_text", "overlay_image") if key in BAD[name][0]), "")
    if not any(text in line["reason"] for text in ("is outside the root", "exactly one of")):
        assert line["path"].endswith(file)


def test_any_number_of_processes_makes_the_same_and_another_seed_does_not(inputs, built, tmp_path):
    build(inputs, tmp_path / "two", "--processes", "2", "--on-error", "skip")
    files = sorted(
        path.relative_to(built) for path in built.rglob("*.*") if path.is_file() and ".parts" not in str(path)
    )
    assert len(files) == 2 + 2 * len(good())
    for file in files:
        assert (built / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    build(inputs, tmp_path / "other", "--processes", "1", "--on-error", "skip", "--seed", "1")
    name = "pictures/latin.png"
    assert (built / name).read_bytes() != (tmp_path / "other" / name).read_bytes()


def test_coco_names_fonts_and_other_tables(inputs, tmp_path):
    coco = {"images": [{"id": 7, "file_name": "sub/deep.webp"}], "annotations": []}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    table = tmp_path / "table.jsonl"
    table.write_text(json.dumps({"image_id": 7.0, "text": "∑ ½", "prompt": "p"}) + "\n")
    serif = DEFAULT_FONT.with_name("DejaVuSerif.ttf")
    only_letters = DEFAULT_FONT.with_name("cmr10.ttf")
    options = ("--coco", tmp_path / "coco.json", "--font", only_letters, "--font", serif, "--table", table)
    build(inputs, tmp_path / "out", *options, "--processes", "1")
    (row,) = read(tmp_path / "out/dataset.jsonl")
    assert row["group"] == "sub/deep.webp"
    assert row["id"] == "row-000001"


@pytest.mark.parametrize(
    ("header", "options", "message"),
    [
        ("image_id,text,colors", (), "did you mean 'colour'?"),
        ("image,text", (), "no column image_id"),
        ("image_id,note", (), "none of the columns overlay_text"),
        ("image_id,text", ("--font", "README.md"), "not a font"),
        ("image_id,text", ("--colour", "reddish"), "colour must be auto"),
        ("image_id,text", ("--prompt-add", "{txt}"), "unknown field {txt}"),
    ],
)
def test_mistakes_are_one_sentence(inputs, tmp_path, header, options, message):
    table = tmp_path / "table.csv"
    table.write_text(f"{header}\nwhite,a\n")
    done = build(inputs, tmp_path / "out", "--table", table, *options, "--processes", "1", check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") <= 2


def test_contrast_is_that_of_wcag():
    white = Image.new("RGB", (4, 4), "white")
    assert contrast((0, 0, 0), white) == pytest.approx(21)
    assert contrast((118, 118, 118), white) == pytest.approx(4.54, abs=0.01)  # the well-known greyest grey that passes
    assert contrast((0, 0, 255), white) == pytest.approx(8.59, abs=0.01)
    assert contrast((0, 0, 0), white, opacity=0.5) == pytest.approx(3.98, abs=0.03)  # 127.5


@given(st.text("ab -日本、。「」é́", max_size=40), st.integers(1, 8))
def test_lines_fit_and_lose_nothing_but_spaces(text, longest):
    lines = break_lines(text, lambda line: len(line) <= longest)
    assert "".join("".join(lines).split()) == "".join(text.split())
    for line in lines:
        assert len(line) <= longest or len(line.replace("\u0301", "")) <= 1, "a letter and its accents stay together"


def test_lines_break_as_each_script_does():
    def short(line: str) -> bool:
        return len(line) <= 10

    assert break_lines("the quick brown fox", short) == ["the quick", "brown fox"]
    assert break_lines("well-known authors", short) == ["well-known", "authors"]
    assert break_lines("extraordinarily", short) == ["extraordin", "arily"]
    assert break_lines("これは長い日本語です。「はい」と", short) == ["これは長い日本語で", "す。「はい」と"]


def draw(text: str, width: float = 1000, border: int = 0) -> np.ndarray:
    return np.asarray(lay_out(text, DEFAULT_FONT, 40, width, "left").draw(border))


def test_right_to_left_and_joined_letters():
    first, word = draw("א"), draw("אה")
    np.testing.assert_array_equal(word[:, -first.shape[1] :], first)  # the first letter is at the right
    font = ImageFont.truetype(DEFAULT_FONT, 40)
    assert draw("بب").shape[1] < 1.8 * font.getlength("ب")  # the first of two takes its short, joined form


@pytest.mark.parametrize("text", ["fÁ̂̃̄gj", "Å\nÅ", "ﷺ", "سلام", "_"])
def test_nothing_is_clipped(text):
    outlined = np.asarray(lay_out(text, DEFAULT_FONT, 40, 1000, "center").draw(6, stroke=4))
    plain = draw(text, border=30)
    assert outlined.max() == 255
    assert not [rim for rim in (outlined[0], outlined[-1], outlined[:, 0], outlined[:, -1]) if rim.any()]
    high, wide = np.nonzero(plain)
    assert np.count_nonzero(draw(text, border=6)) == len(high) == len(wide)
