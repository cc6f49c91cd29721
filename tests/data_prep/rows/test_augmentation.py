"""Further versions of a row: common to all of its pictures, kept by its id, and only what the instruction allows."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_prep.rows.augmentation import Augment, Augmentation


def noise(seed: int, width: int = 60, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def mask_of(left: int, top: int, right: int, bottom: int) -> Image.Image:
    """60 x 40, the edit (black) inside the box."""
    mask = Image.new("L", (60, 40), 255)
    mask.paste(0, (left, top, right, bottom))
    return mask


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.tobytes() == other.tobytes()


def test_source_target_and_mask_are_cropped_and_mirrored_alike():
    picture, other = noise(0), noise(1, 30, 30)
    levels = picture.convert("L").point(lambda level: max(level, 128))  # all of it is background
    for version in Augment(4, crop=0.6).versions("row", "make it blue"):
        target, references, mask = version(picture, [other, picture], levels, bridge=1)
        assert same(target, references[1])
        assert mask is not None
        assert same(mask, target.convert("L").point(lambda level: max(level, 128)))
        assert target.size < picture.size
        assert same(references[0], ImageOps.mirror(other) if version.flip else other), "an object stays whole"


def test_a_crop_lies_at_the_same_place_in_pictures_of_other_sizes():
    big = noise(0).resize((240, 160), Image.Resampling.NEAREST)
    target, [source], _ = Augmentation(1, False, 0.5, 1.0, 0.5)(big, [noise(0)], None, 0)
    assert same(target.resize((30, 20), Image.Resampling.NEAREST), source)
    assert same(source, noise(0).crop((30, 10, 60, 30)))


def test_a_source_of_another_shape_is_not_cropped():
    target, [source], _ = Augmentation(1, True, 0.5, 1.0, 0.5)(noise(0), [noise(1, 40, 40)], None, 0)
    assert same(target, ImageOps.mirror(noise(0)))
    assert same(source, ImageOps.mirror(noise(1, 40, 40)))


def test_text_to_image_is_cropped():
    target, references, _ = Augmentation(1, False, 0.5)(noise(0), [], None, 0)
    assert references == []
    assert same(target, noise(0).crop((0, 0, 30, 20)))


@pytest.mark.parametrize("edit", [(0, 0, 6, 4), (54, 36, 60, 40), (20, 10, 40, 30), (0, 0, 60, 2)])
def test_a_crop_keeps_all_of_the_edit(edit):
    whole = mask_of(*edit)
    for version in Augment(20, flip=False, crop=0.5).versions("row", "make it blue"):
        _, _, mask = version(whole.convert("RGB"), [whole.convert("RGB")], whole, 0)
        assert mask is not None
        kept, all_of_it = ((np.asarray(each) == 0).sum() for each in (mask, whole))
        assert kept == all_of_it


def test_versions_are_the_rows_own():
    augment = Augment(3, crop=0.8)
    versions = list(augment.versions("a", "make it blue"))
    assert versions == list(augment.versions("a", "make it red"))
    assert versions != list(augment.versions("b", "make it blue"))
    assert versions[:2] == list(Augment(2, crop=0.8).versions("a", "make it blue")), (
        "more copies leave the first as they are"
    )
    assert [each.flip for each in versions] == [True, False, True]
    assert all(0.8 <= each.side <= 1 for each in versions)
    assert len({(each.side, each.across, each.down) for each in versions}) == 3


@pytest.mark.parametrize(
    ("prompt", "allowed"),
    [
        ("Remove the sticker", True),
        ("Make the bright sky darker, and the cup upright", True),
        ("take the left-hand cup", False),
        ("Move the cup to the left", False),
        ("remove the LEFTMOST person", False),
        ("rotate it clockwise", False),
        ("Write hello on the wall", False),
        ("Change the sign", False),
        ('add a "SALE" sticker', False),
        ("Replace 'OPEN' with 'CLOSED'", False),
        ("change ‘A’ to ‘B’", False),
        ("Rewrite the poster to SALE", False),
        ("Add handwriting to the note", False),
        ("Paint the dog's and the cats' bowls, don’t move them", True),
        ("把左边的杯子去掉", False),
        ("添加文字", False),
        ("把天空变成紫色", True),
        ("Design a lettuce salad, context unchanged", True),
    ],
)
def test_what_is_another_thing_in_a_mirror_is_not_mirrored(prompt, allowed):
    assert [each.flip for each in Augment(1).versions("row", prompt)] == [True] * allowed
    assert not any(each.flip for each in Augment(3, flip=False, crop=0.9).versions("row", prompt))
