"""Shift and zoom are measured as they were made, whatever was edited; what has not moved is never said to have."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageOps

from data_prep.check.measures.drift import measure_drift
from scripts import photographs
from tests.check_data import EDITS, LOCAL, edit, moved_pair

DETAILED = [photographs.load(photographs.SKIMAGE_DATA / name) for name in ("astronaut.png", "camera.png", "gravel.png")]
ALL = [photographs.load(path) for path in photographs.TRAIN + photographs.HELD_OUT]
seeds = st.integers(0, 10**6)


@settings(max_examples=40, deadline=None)
@given(
    photograph=st.sampled_from(DETAILED),
    size=st.sampled_from([192, 256, 384]),
    shift=st.tuples(st.floats(-14, 14), st.floats(-14, 14)),
    zoom=st.floats(-0.06, 0.06),
    name=st.sampled_from([*LOCAL, "sepia", "relight", "jpeg"]),
    seed=seeds,
)
def test_what_was_moved_is_measured(photograph, size, shift, zoom, name, seed):
    rng = random.Random(seed)
    drift = measure_drift(*edit(name, moved_pair(photograph, size, shift, zoom, rng), rng))
    reach = math.hypot(*shift) + abs(zoom) * size / 2
    if drift is None or reach < 1:  # nothing is claimed of what hardly moved
        assert reach < 1 or name in LOCAL, "a movement of a detailed picture must be found"
        return
    assert (drift.x, drift.y) == pytest.approx(shift, abs=0.5)
    assert 100 * drift.zoom == pytest.approx(100 * zoom, abs=0.3)


@settings(max_examples=60, deadline=None)
@given(
    photograph=st.sampled_from(ALL),
    size=st.sampled_from([64, 96, 128, 256]),
    names=st.lists(st.sampled_from(EDITS), min_size=1, max_size=2),
    seed=seeds,
)
def test_what_was_edited_in_place_has_not_moved(photograph, size, names, seed):
    rng = random.Random(seed)
    pair = (photographs.random_crop(photograph, size, rng),) * 2
    for name in names:
        pair = edit(name, pair, rng)
    drift = measure_drift(*pair)
    assert drift is None or (drift.shift < 0.6 and abs(drift.zoom) < 0.009)


@pytest.mark.parametrize(("shift", "zoom"), [((90, -60), 0.0), ((0, 0), 0.25), ((-40, 30), -0.15), ((60, 10), 0.1)])
def test_large_movements_are_found_too(shift, zoom):
    pair = moved_pair(DETAILED[0], 384, shift, zoom, random.Random(3))
    drift = measure_drift(*pair)
    assert drift is not None
    assert (drift.x, drift.y) == pytest.approx(shift, abs=0.5)
    assert drift.zoom == pytest.approx(zoom, abs=0.003)


def test_a_large_picture_is_measured_in_its_own_pixels():
    pair = moved_pair(DETAILED[0], 1024, (11, -7), 0.01, random.Random(1))
    drift = measure_drift(*pair)
    assert drift is not None
    assert (drift.x, drift.y) == pytest.approx((11, -7), abs=0.6)
    assert drift.zoom == pytest.approx(0.01, abs=0.003)


def test_a_source_of_another_size_is_compared_as_training_sees_it():
    source, target = moved_pair(DETAILED[1], 256, (6, 0), 0, random.Random(2))
    drift = measure_drift(source.resize((512, 512), Image.Resampling.LANCZOS), target)
    assert drift is not None
    assert (drift.x, drift.y, drift.zoom) == pytest.approx((6, 0, 0), abs=0.5)
    wider = ImageOps.expand(target, (40, 0), "grey")  # the same in the middle, where training cuts it out
    still = measure_drift(wider, target)
    assert still is not None
    assert still.shift < 0.1


def test_something_that_moves_in_a_still_picture_is_no_drift():
    rng = random.Random(5)
    scene = photographs.random_crop(DETAILED[0], 256, rng)
    thing = photographs.random_crop(DETAILED[2], 90, rng)
    source, target = scene.copy(), scene.copy()
    source.paste(thing, (30, 80))
    target.paste(thing, (110, 90))
    drift = measure_drift(source, target)
    assert drift is not None
    assert drift.shift < 0.1


@pytest.mark.parametrize("seed", range(12))
def test_pictures_that_have_nothing_in_common_cannot_be_compared(seed):
    first, second = random.Random(seed).sample(ALL[3:], 2)
    rng = random.Random(seed)
    if {id(first), id(second)} == {id(ALL[3]), id(ALL[4])}:  # two views of one motorcycle
        return
    pair = (photographs.random_crop(each, 160, rng) for each in (first, second))
    assert measure_drift(*pair) is None


def test_plain_small_and_thin_pictures_cannot_be_compared():
    plain = Image.new("RGB", (200, 200), "white")
    assert measure_drift(plain, plain) is None
    small = photographs.random_crop(DETAILED[0], 40, random.Random(0))
    assert measure_drift(small, small) is None
    thin = DETAILED[0].crop((0, 0, 500, 20))
    assert measure_drift(thin, thin) is None


def test_a_mask_says_where_to_look():
    """Most of the picture is new; what is to be preserved has moved."""
    source, target = moved_pair(DETAILED[0], 256, (5, 0), 0, random.Random(4))
    mask = Image.new("L", target.size, 0)
    ImageDraw.Draw(mask).rectangle((0, 0, 256, 110), fill=255)
    noise = np.random.default_rng(0).integers(0, 256, (146, 256, 3), dtype=np.uint8)
    target.paste(Image.fromarray(noise), (0, 110))
    drift = measure_drift(source, target, mask)
    assert drift is not None
    assert (drift.x, drift.y) == pytest.approx((5, 0), abs=0.5)
