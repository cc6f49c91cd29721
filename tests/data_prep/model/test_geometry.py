"""Properties of the geometry: whatever the image's size, the rules of DESIGN hold."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from data_prep.model.geometry import (
    Geometry,
    Size,
    background_cells,
    fit,
    fit_back_mask,
    fit_mask,
    mask_to_latent,
    stretch,
    to_image,
    to_pixels,
)

SIZES = st.builds(Size, st.integers(1, 9000), st.integers(1, 9000))
AREAS = st.integers(32 * 32, 2048 * 2048)


@given(SIZES, AREAS)
def test_a_target_is_a_multiple_of_32_within_the_area_and_never_larger_than_its_image(size, max_pixels):
    target = Geometry(max_pixels).target_size(size)
    assert target.height % 32 == 0
    assert target.width % 32 == 0
    assert 0 < target.height * target.width <= max_pixels
    assert target.height <= max(32, size.height)
    assert target.width <= max(32, size.width)


@given(SIZES, AREAS)
def test_a_target_is_its_own_target(size, max_pixels):
    geometry = Geometry(max_pixels)
    target = geometry.target_size(size)
    assert geometry.target_size(target) == target


@given(SIZES, AREAS)
def test_the_aspect_is_kept_within_one_step_of_rounding(size, max_pixels):
    scale = min(1.0, math.sqrt(max_pixels / (size.height * size.width)))
    ideal = Size(size.height * scale, size.width * scale)  # pyright: ignore
    if min(ideal) < 32:
        return  # the sides that had to become 32 have no aspect to keep
    target = Geometry(max_pixels).target_size(size)
    assert abs(target.height - ideal.height) < 32
    assert abs(target.width - ideal.width) < 32


PHOTOGRAPHS = st.builds(lambda height, width: Size(64 * height, 64 * width), st.integers(4, 60), st.integers(4, 60))


@given(PHOTOGRAPHS, st.sampled_from([1 / 4, 1 / 2, 3 / 4, 5 / 4, 2, 4]), AREAS)
def test_the_bridges_source_follows_the_target_whatever_the_sizes_of_the_two_files(target, scale, max_pixels):
    source = Size(round(scale * target.height), round(scale * target.width))
    geometry = Geometry(max_pixels)
    first, second = geometry.reference_sizes([source, source], target, 0)
    assert first == geometry.target_size(target)
    assert second == geometry.target_size(source)  # no bridge starts from it
    own = Geometry(max_pixels, reference_pixels=512 * 512)
    assert own.reference_sizes([source], target, 0) == (Geometry(512 * 512).target_size(source),)


def test_a_source_of_another_aspect_is_sized_by_its_own_file():
    geometry, target = Geometry(1024 * 1024), Size(768, 1024)
    assert geometry.reference_sizes([Size(3000, 4000)], target, 0) == (target,)
    assert geometry.reference_sizes([Size(3000, 4028)], target, 0) == (target,)  # 0.7 % wider
    for other in (Size(3000, 4200), Size(3000, 3800), Size(4000, 3000)):
        assert geometry.reference_sizes([other], target, 0) == (geometry.reference_size(other),)
    assert geometry.reference_sizes([target, Size(3000, 4000)], target, 1)[1] == target


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (Size(1024, 1024), Size(1024, 1024)),
        (Size(2000, 2000), Size(1024, 1024)),
        (Size(1080, 1920), Size(768, 1344)),
        (Size(1000, 1000), Size(992, 992)),
        (Size(1, 1), Size(32, 32)),
        (Size(20, 2000), Size(32, 1984)),
    ],
)
def test_targets_of_known_sizes(size, expected):
    assert Geometry(1024 * 1024).target_size(size) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [(Size(1024, 1024), Size(384, 384)), (Size(1080, 1920), Size(288, 512)), (Size(8, 8), Size(384, 384))],
)
def test_the_vision_size_has_one_area(size, expected):
    assert Geometry(1024 * 1024).vision_size(size) == expected


def test_an_area_below_one_cell_is_refused():
    with pytest.raises(ValueError, match="max_pixels must be at least 1024"):
        Geometry(1000)


def test_fit_crops_the_centre_and_stretch_keeps_everything():
    image = Image.new("RGB", (300, 100), "red")
    image.paste("blue", (100, 0, 200, 100))
    assert fit(image, Size(32, 32)).getpixel((8, 16)) == (0, 0, 255)
    stretched = stretch(image, Size(32, 96))
    assert stretched.size == (96, 32)
    assert stretched.getpixel((8, 16)) == (255, 0, 0)


@pytest.mark.parametrize("resize", [fit, stretch])
def test_a_smaller_picture_is_the_mean_of_what_it_covers(resize):
    """A board of single black and white pixels becomes grey: a filter that drops pixels would leave black or white ones."""
    board = (np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)
    reduced = np.array(resize(Image.fromarray(np.stack([board] * 3, axis=-1)), Size(32, 32)), dtype=float)
    assert np.abs(reduced - 127.5).max() < 8  # the rim covers less than a whole filter


def test_fit_leaves_an_image_of_the_right_size_alone():
    image = to_image(torch.rand(3, 32, 64) * 2 - 1)
    assert fit(image, Size(32, 64)).tobytes() == image.tobytes()


def test_pixels_round_trip_exactly():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([values] * 3, axis=-1))
    pixels = to_pixels(image)
    assert pixels.shape == (3, 16, 16)
    assert pixels.min() == -1.0
    assert pixels.max() == 1.0
    assert to_image(pixels).tobytes() == image.tobytes()


@given(st.integers(1, 400), st.integers(1, 400), st.data())
def test_one_pixel_of_the_edit_is_never_lost(height, width, data):
    target = Geometry(64 * 64).target_size(Size(height, width))
    row, column = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[row, column] = 255
    fitted = fit_mask(Image.fromarray(mask), target)
    assert Size.of(fitted) == target
    kept_height = min(height, width * target.height / target.width)
    kept_width = min(width, height * target.width / target.height)
    inside = abs(row + 0.5 - height / 2) < kept_height / 2 and abs(column + 0.5 - width / 2) < kept_width / 2
    if inside:
        assert mask_to_latent(fitted).max() == 1.0
    back_mask = Image.fromarray(255 - mask)
    assert fit_back_mask(back_mask, target).tobytes() == ImageOps.invert(fitted).tobytes()
    assert torch.equal(background_cells(ImageOps.invert(fitted)), 1 - mask_to_latent(fitted))


def test_a_cell_of_which_a_pixel_is_edited_is_edited():
    """Thin strokes on background: by the other pooling the mask of a text would keep no cell of it."""
    mask = np.full((32, 32), 255, dtype=np.uint8)
    mask[3, 2:30] = 0
    mask[20, 25] = 51
    expected = torch.ones(1, 4, 4)
    expected[0, 0] = 0.0
    expected[0, 2, 3] = 51 / 255
    torch.testing.assert_close(background_cells(Image.fromarray(mask)), expected)


def test_a_cell_that_touches_white_counts_as_white():
    mask = np.zeros((32, 32), dtype=np.uint8)
    mask[8:16, 8:16] = 255
    mask[16, 0] = 128
    latent = mask_to_latent(Image.fromarray(mask))
    expected = torch.zeros(1, 4, 4)
    expected[0, 1, 1] = 1.0
    expected[0, 2, 0] = 128 / 255
    torch.testing.assert_close(latent, expected)


@pytest.mark.parametrize("resize", [fit, stretch])
def test_a_smaller_picture_averages_the_pixels_that_it_covers(resize):
    """A chessboard of single pixels becomes grey; to take the nearest pixel would give black and white."""
    board = Image.fromarray((np.indices((128, 192)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    values = np.asarray(resize(board, Size(32, 48)))[4:-4, 4:-4]
    assert abs(values.astype(int) - 127).max() <= 2
