"""Pairs that are one picture, saved again or turned, are told from edits, however faint these are."""

import random
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter

from data_prep.check.measures.likeness import TURNS, alike, turn_between
from data_prep.rows.images import open_image
from scripts import photographs
from tests.check_data import EDITS, LOCAL, edit

RNG = random.Random(0)
PHOTOGRAPHS = [photographs.load(path) for path in photographs.HELD_OUT[:3]]
CROPS = [photographs.random_crop(each, 256, RNG).crop((0, 0, 256, 184)) for each in PHOTOGRAPHS]


def relation(source: Path, target: Path):
    return alike(open_image(source), open_image(target), source, target)


def save(image: Image.Image, path: Path, **how) -> Path:
    image.save(path, **how)
    return path


@pytest.mark.parametrize("number", range(len(CROPS)))
@pytest.mark.parametrize("quality", [90, 75, 50, 30])
def test_a_picture_that_was_saved_again_is_told_and_which_of_the_two_it_is(number, quality, tmp_path):
    """From a PNG, from a JPEG of quality 95, and beside a JPEG of the same original; the other way round it is the source."""
    plain = save(CROPS[number], tmp_path / "plain.png")
    first = save(CROPS[number], tmp_path / "first.jpg", quality=95)
    for name, picture in (("of a png", open_image(plain)), ("of a jpeg", open_image(first)), ("beside", CROPS[number])):
        again = save(picture, tmp_path / "again.jpg", quality=quality)
        source = plain if name == "of a png" else first
        assert relation(source, again) == "target_saved_again", name
        assert relation(again, source) == "source_saved_again", name


def test_a_file_that_lies_on_its_side_and_one_without_reduced_colours_are_told_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = save(CROPS[0], tmp_path / "plain.png")
    on_its_side = CROPS[0].transpose(Image.Transpose.ROTATE_90)
    assert relation(plain, save(on_its_side, tmp_path / "turned.jpg", quality=70, exif=exif)) == "target_saved_again"
    assert relation(plain, save(CROPS[0], tmp_path / "full.jpg", quality=70, subsampling=0)) == "target_saved_again"


def test_equal_pictures_and_such_that_hardly_differ(tmp_path):
    plain = save(CROPS[0], tmp_path / "plain.png")
    assert relation(plain, save(CROPS[0], tmp_path / "copy.webp", lossless=True)) == "equal"
    brighter = save(ImageEnhance.Brightness(CROPS[0]).enhance(0.99), tmp_path / "brighter.png")
    assert relation(plain, brighter) == "nearly"
    assert relation(plain, save(ImageEnhance.Brightness(CROPS[0]).enhance(0.97), tmp_path / "darker.png")) is None
    assert relation(plain, save(CROPS[1], tmp_path / "other.jpg")) is None
    assert relation(plain, save(CROPS[0].resize((128, 92)), tmp_path / "small.png")) is None


@pytest.mark.parametrize("name", EDITS)
def test_edits_are_edits_as_jpegs_too(name, tmp_path):
    """But for the one that is itself a JPEG of low quality, here saved as a PNG: its file does not say so."""
    for number, crop in enumerate(CROPS):
        source, target = edit(name, (crop, crop), RNG)
        source, target = save(source, tmp_path / f"{number}.png"), save(target, tmp_path / f"{number}.jpg", quality=85)
        assert relation(source, target) is None
        assert relation(source, save(open_image(target), tmp_path / f"{number}t.png")) is None


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("name", EDITS)
def test_a_turned_target_is_told_by_its_turn_and_an_upright_one_is_not(name, turn):
    """Never by another; what covers up to a quarter of the picture may hide it."""
    for crop in CROPS:
        source, target = edit(name, (crop, crop), RNG)
        assert turn_between(source, target) is None
        told = turn_between(source, target.transpose(TURNS[turn]))
        assert told == turn or (name in LOCAL and told is None)


def test_other_pictures_are_no_turns_of_one_another():
    for number, crop in enumerate(CROPS):
        assert turn_between(crop, CROPS[number - 1]) is None
    plain = Image.new("RGB", (64, 64), "red")
    assert turn_between(plain, plain) is None


@pytest.mark.parametrize("quality", [95, 85, 75])
def test_a_spot_that_is_taken_away_is_an_edit(quality, tmp_path):
    """6 pixels wide, with a soft rim, in a picture that is otherwise the same."""
    spot = Image.new("L", CROPS[0].size)
    ImageDraw.Draw(spot).ellipse((101, 101, 106, 106), fill=40)
    spot = spot.filter(ImageFilter.GaussianBlur(1)).convert("RGB")
    source = save(ImageChops.subtract(CROPS[0], spot), tmp_path / "spot.png")
    assert relation(source, save(CROPS[0], tmp_path / "target.jpg", quality=quality)) is None
