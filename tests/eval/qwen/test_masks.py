"""Soft masks, and what is kept."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.errors import InputError
from data_prep.model.geometry import Size, fit, fitted_part
from eval.qwen.masks import Kept, check_mask, focus_mask, soft_mask
from eval.request.knobs import Focus
from tests.pictures import picture


def mask_of(seed: int, width: int, height: int) -> Image.Image:
    """Blobs, with grey between."""
    blocks = np.random.default_rng(seed).integers(0, 2, (4, 5), dtype=np.uint8) * 255
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.BILINEAR)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), width=st.integers(8, 60), height=st.integers(8, 60), feather=st.floats(0, 20))
def test_a_rim_grows_inwards_and_what_is_kept_stays_exactly(seed, width, height, feather):
    mask = mask_of(seed, width, height)
    soft = soft_mask(mask, feather)
    before, after = np.asarray(mask), np.asarray(soft)
    assert soft.size == mask.size
    assert (after <= before).all()
    assert (after[before == 0] == 0).all()
    edited, source = picture(seed, (width, height)), picture(seed + 1, (width, height))
    pasted = np.asarray(Kept(source, soft).with_edit(edited))
    assert (pasted[before == 0] == np.asarray(source)[before == 0]).all()
    assert (pasted[after == 255] == np.asarray(edited)[after == 255]).all()


def test_the_rim_has_the_width_that_was_asked_for():
    mask = Image.new("L", (40, 8), 0)
    mask.paste(255, (10, 0, 40, 8))
    row = np.asarray(soft_mask(mask, 4))[4].astype(int)
    assert (row[:10] == 0).all()
    assert (np.diff(row[9:15]) > 0).all()  # four pixels between 0 and 255
    assert (row[14:] == 255).all()
    assert row[14 - 3] == round(255 * (0.4**2 * (3 - 0.8)))  # smoothstep of 2/5, the second pixel of the rim


@pytest.mark.parametrize("width", [1, 2, 4, 8, 12])
def test_the_middle_of_a_thin_stroke_can_be_edited(width):
    mask = Image.new("L", (60, 40), 0)
    mask.paste(255, (5, 0, 5 + width, 40))
    mask.paste(255, (30, 0, 60, 40))  # beside a part that has room for the whole rim
    soft = np.asarray(soft_mask(mask, 8))
    assert soft[20, 5 : 5 + width].max() == 255
    assert (soft[20, 30:38] < 255).all()
    assert soft[20, 40] == 255


def test_a_disc_is_round_soft_and_nothing_outside():
    values = np.asarray(focus_mask(Size(80, 120), Focus(x=0.25, y=0.5, radius=0.4))).astype(int)
    rows, columns = np.mgrid[:80, :120] + 0.5
    distance = np.hypot(columns - 30, rows - 40)
    assert (values[distance >= 32] == 0).all()
    assert (values[distance <= 16] == 255).all()
    assert (values[distance < 31.5] > 0).all()
    ring = values[np.abs(distance - 24) < 0.3]
    assert (np.abs(ring - 128) < 8).all()


@pytest.mark.parametrize("size", [(97, 61), (61, 97), (40, 30)])  # the last is smaller than what is made of it
def test_an_edit_of_another_size_goes_into_its_own_place_of_the_kept_picture(size):
    """A ramp of 2 levels a pixel that `fit` has cropped and resized comes back where it was, within a twentieth of a pixel."""
    rows, columns = np.mgrid[: size[1], : size[0]]
    ramp = Image.fromarray(np.stack([2 * columns, 2 * rows, columns + rows], 2).astype(np.uint8))
    edited = fit(ramp, Size(64, 96))
    pasted = np.asarray(Kept(Image.new("RGB", size), Image.new("L", size, 255)).with_edit(edited)).astype(int)
    assert pasted.shape == (size[1], size[0], 3)
    height, width = fitted_part(Size(size[1], size[0]), Size(64, 96))
    middle = (np.abs(rows - size[1] / 2) < height / 2 - 4) & (np.abs(columns - size[0] / 2) < width / 2 - 4)
    error = (pasted - np.asarray(ramp))[middle]
    assert np.abs(error).max() <= 2  # resized twice and rounded
    assert np.abs(error.mean(0)).max() < 0.1


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1))
def test_transparency_stays_and_with_it_every_pixel_that_is_kept(seed):
    generator = np.random.default_rng(seed)
    file = Image.fromarray(generator.integers(0, 256, (31, 45, 4), dtype=np.uint8))
    mask = mask_of(seed, 45, 31)
    seen = Image.alpha_composite(Image.new("RGBA", file.size, "white"), file).convert("RGB")
    before, shown, kept = np.asarray(file), np.asarray(seen).astype(int), np.asarray(mask) == 0
    edited = picture(seed, file.size)
    after = np.asarray(Kept(file, mask).with_edit(edited))
    assert (after[kept] == before[kept]).all()
    assert (after[..., 3] == before[..., 3]).all()
    whole = Kept(file, Image.new("L", file.size, 255)).with_edit(seen)  # an edit that changes nothing
    again = Image.alpha_composite(Image.new("RGBA", file.size, "white"), whole).convert("RGB")
    assert np.abs(np.asarray(again).astype(int) - shown).max() <= 1


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Image.new("RGB", (32, 24)), "must have mode L"),
        (Image.new("L", (24, 32), 255), "the mask has 24x32 pixels and the image 32x24"),
        (Image.new("L", (32, 24)), "black everywhere"),
    ],
)
def test_a_mask_that_does_not_suit_is_refused(mask, message):
    with pytest.raises(InputError, match=message):
        check_mask(mask, picture(0))
