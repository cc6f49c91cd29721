"""A picture of any shape is shown whole at a size in multiples of 32, and comes back in its own shape."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops

from data_prep.model.geometry import Geometry, Size, fit
from eval.qwen.frame import Frame
from eval.qwen.modes import result_size
from eval.request.request import EditRequest

SIDES = st.integers(16, 900)


def ramps(size: Size) -> Image.Image:
    """Red grows to the right and green downwards, both from 0 to 255: a place can be read from its colours."""
    rows, columns = (np.linspace(0, 255, side) for side in size)
    values = np.zeros((*size, 3))
    values[..., 0], values[..., 1] = columns[None], rows[:, None]
    return Image.fromarray(values.round().astype(np.uint8))


@given(SIDES, SIDES, st.sampled_from([64 * 64, 128 * 128, 512 * 512, 1024 * 1024]))
def test_the_inner_part_is_the_largest_of_the_pictures_shape(height, width, max_pixels):
    """Of any size that training would give the picture, which stays what is computed."""
    picture = Size(height, width)
    frame = Frame.around(picture, size := Geometry(max_pixels).target_size(picture))
    assert frame.size == size
    assert frame.inner.height == size.height or frame.inner.width == size.width
    scale = min(size.height / height, size.width / width)
    for inner, own, whole in zip(frame.inner, picture, size, strict=True):
        assert 1 <= inner <= whole
        assert abs(inner - own * scale) <= max(0.5, 1 - own * scale)  # a side has a pixel, however long the other is


@pytest.mark.parametrize("picture", [Size(280, 420), Size(420, 280), Size(375, 500), Size(100, 900), Size(61, 61)])
def test_nothing_is_cropped_or_moved(picture):
    """The corners keep their colours, and each place its own, but for Lanczos' rounding at the border."""
    frame = Frame.around(picture, Geometry(128 * 128).target_size(picture))
    image = ramps(picture)
    placed = frame.place(image)
    assert Size.of(placed) == frame.size
    shown = np.asarray(frame.crop(placed)).astype(int)
    assert Size(*shown.shape[:2]) == frame.inner
    assert np.abs(shown - np.asarray(ramps(frame.inner))).max() <= 255 / min(frame.inner) + 2
    assert np.array_equal(shown, np.asarray(fit(image, frame.inner)))


def test_what_is_beside_the_picture_is_its_mirror_image():
    frame = Frame.around(Size(280, 420), Size(96, 160))
    assert frame == Frame(Size(96, 160), Size(96, 144))
    placed = np.asarray(frame.place(ramps(Size(280, 420))))
    assert np.array_equal(placed[:, :8], placed[:, 8:16][:, ::-1])
    assert np.array_equal(placed[:, 152:], placed[:, 144:152][:, ::-1])


def test_a_mask_goes_on_at_its_edge_as_it_is():
    """An edit that reaches the picture's border has no rim there."""
    frame = Frame(Size(64, 96), Size(64, 90))
    mask = np.zeros((64, 90), np.uint8)
    mask[20:40, 50:] = 255
    extended = np.asarray(frame.extend(Image.fromarray(mask)))
    assert np.array_equal(extended[:, 3:93], mask)
    assert (extended[20:40, 93:] == 255).all()
    assert (extended[:, :3] == 0).all()


def request(**values) -> EditRequest:
    return EditRequest(prompt="x", images=[ramps(Size(280, 420))], **values)


def test_another_shape_that_is_asked_for_is_cropped_to():
    """As it was in training, bit for bit."""
    for values in ({"size": Size(96, 160)}, {"aspect": "1:1"}):
        asked = request(**values)
        size = result_size(asked, Geometry(128 * 128))
        frame = Frame.of(asked, size)
        assert frame.is_full
        placed = frame.place(asked.images[0])
        assert ImageChops.difference(placed, fit(asked.images[0], size)).getbbox() is None
        assert frame.crop(placed) is placed
    assert Frame.of(request(), Size(96, 160)).inner == Size(96, 144)


def test_a_picture_whose_shape_is_in_multiples_of_32_is_as_it_was_in_training():
    size = Geometry(1024 * 1024).target_size(Size(864, 1152))
    frame = Frame.around(Size(864, 1152), size)
    assert frame.is_full
    image = ramps(Size(864, 1152))
    assert ImageChops.difference(frame.place(image), fit(image, size)).getbbox() is None
