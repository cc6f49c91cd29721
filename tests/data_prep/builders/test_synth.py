"""Perfect pairs of plain photographs: exact to the bit, the same from any number of processes, and as their words say."""

import colorsys
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import label
from skimage.color.colorconv import rgb_from_xyz

from data_prep.builders.synth.catalog import GROUPS, RECIPES, instruction, parse_recipes
from data_prep.builders.synth.command import Plan, command
from data_prep.builders.synth.cutouts import object_name
from data_prep.builders.synth.draft import CutOut, Draft, NoEdit, Scene, to_linear, to_srgb
from data_prep.builders.synth.frame import frame_size, framed
from data_prep.builders.synth.recipes import colour, light, objects, outpaint, weather
from data_prep.builders.synth.recipes.grade import load_cube
from data_prep.errors import InputError
from data_prep.rows.rows import Row, read_rows
from scripts.photographs import SKIMAGE_DATA, SKLEARN_DATA
from tests.commands import run_script

pytestmark = pytest.mark.slow

COMBINED = ["remove+relight", "outpaint+denoise+recolour", "insert+remove"]
ALL = [*RECIPES, "remove+relight", "recolour+denoise+outpaint", "insert+remove"]
OPTIONS = ("--recipes", ",".join(["all", *COMBINED]), "--per-image", len(ALL), "--size", 128, "--validation", 3)
NAMES = ("astronaut", "nested__coffee", "flower")
SEEDS = st.integers(0, 10_000)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Three photographs, one of them nested; a truncated file; and one too small."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "nested").mkdir()
    for path, name in (
        (SKIMAGE_DATA / "astronaut.png", "astronaut.jpg"),
        (SKIMAGE_DATA / "coffee.png", "nested/coffee.png"),
        (SKLEARN_DATA / "flower.jpg", "flower.webp"),
    ):
        image = Image.open(path).convert("RGB")
        image.thumbnail((320, 320))
        image.save(folder / name)
    whole = (folder / "astronaut.jpg").read_bytes()
    (folder / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (300, 50), "red").save(folder / "thin.png")
    return folder


def synth(photos: Path, out: Path, *options: str | Path | int, check: bool = True):
    return run_script("data_prep/run.py", "synth", "--images", photos, "--out", out, *options, check=check)


@pytest.fixture(scope="module")
def made(photos, tmp_path_factory):
    """Every recipe on every photograph, by two processes: the folder, and the command that ended."""
    out = tmp_path_factory.mktemp("made")
    return out, synth(photos, out, *OPTIONS, "--processes", 2, check=False)


@pytest.fixture(scope="module")
def rows(made) -> list[Row]:
    found = list(read_rows(made[0] / "dataset.jsonl"))
    assert all(isinstance(row, Row) for row in found)
    return found


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def files_of(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and ".parts" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_unusable_photographs_are_reported_and_the_rest_survives(made, rows):
    out, done = made
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    reasons = {(Path(line["path"]).name, line["reason"]) for line in rejected}
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert ("thin.png", "300x50 is too small: a pair needs 64 pixels a side") in reasons
    assert any(name == "broken.jpg" and "truncated" in reason for name, reason in reasons)
    assert {name for name, _ in reasons} == {"thin.png", "broken.jpg"}
    assert {row.group for row in rows} == set(NAMES)


def test_each_recipe_is_made_of_each_photograph(rows):
    made = {(row.group, row.tag) for row in rows}
    assert made == {(name, recipe) for name in NAMES for recipe in ALL}
    assert len({row.id for row in rows}) == len(rows)


@pytest.mark.parametrize("recipe", ALL)
def test_masks_are_exact(rows, recipe):
    """White exactly where source and target are the same; no mask where no latent's worth of pixels is."""
    for row in (row for row in rows if row.tag == recipe):
        source, target = pixels(row.edit_image[0]), pixels(row.image)
        assert source.shape == target.shape
        assert not any(side % 32 for side in source.shape[:2])
        same = (source == target).all(axis=-1)
        if row.back_mask:
            assert np.array_equal(pixels(row.back_mask), np.where(same, 255, 0))
        else:
            cells = same.reshape(same.shape[0] // 8, 8, same.shape[1] // 8, 8)
            assert not cells.all(axis=(1, 3)).any()
        assert (~same).mean() >= 0.003
        assert re.fullmatch(r"[A-Z][^{}]+[a-z1]\.", row.prompt), row.prompt
        assert len(row.edit_image) == 1 + recipe.count("insert")


@pytest.mark.parametrize("recipe", ["insert", "remove", "insert+remove", "recolour", "outpaint", "remove_snow"])
def test_local_edits_preserve_something(rows, recipe):
    masks = [pixels(row.back_mask) for row in rows if row.tag == recipe and row.back_mask]
    assert len(masks) == len(NAMES)
    assert all((mask == 255).mean() > 0.3 for mask in masks)


def test_validation_holds_out_whole_photographs(rows):
    held_out = {row.group for row in rows if row.split == "validation"}
    assert held_out
    assert held_out != set(NAMES)
    assert not held_out & {row.group for row in rows if row.split == "train"}


def test_a_photograph_and_its_copies_are_on_one_side(tmp_path):
    (tmp_path / "photos").mkdir()
    for name in ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg"):
        image = Image.open(SKIMAGE_DATA / name).convert("RGB").resize((160, 160))
        image.save(tmp_path / "photos" / f"{Path(name).stem}.png")
        image.resize((128, 128)).save(tmp_path / "photos" / f"{Path(name).stem}-small.jpg", quality=80)
    options = ("--recipes", "add_snow", "--per-image", 1, "--size", 64, "--validation", 3)
    synth(tmp_path / "photos", tmp_path / "out", *options)
    rows = [row for row in read_rows(tmp_path / "out" / "dataset.jsonl") if isinstance(row, Row)]
    groups = {row.split: sorted(other.group for other in rows if other.split == row.split) for row in rows}
    assert len(groups["validation"]) == 2
    assert len(set(groups["validation"])) == 1
    assert len(set(groups["train"])) == 3
    done = synth(tmp_path / "photos", tmp_path / "out", *options[:-1], 1, check=False)
    assert "no photograph can be held out: each has duplicates" in done.stderr


def test_the_same_from_one_process(made, photos, tmp_path):
    synth(photos, tmp_path / "again", *OPTIONS, "--processes", 1, "--on-error", "skip")
    assert files_of(tmp_path / "again") == files_of(made[0])


def test_another_seed_makes_other_pairs(photos, tmp_path):
    few = ("--recipes", "remove,relight", "--per-image", 2, "--size", 96, "--on-error", "skip", "--processes", 1)
    for seed in (1, 2):
        synth(photos, tmp_path / str(seed), *few, "--seed", seed)
    first, second = (files_of(tmp_path / str(seed)) for seed in (1, 2))
    sources = [name for name in first if name.startswith("source/") and name in second]
    assert sources
    assert not any(first[name] == second[name] for name in sources)


def test_own_objects_and_own_look(photos, tmp_path):
    """Objects are named by their files; an opaque one is reported; a LUT that swaps red and blue does just that."""
    (tmp_path / "things").mkdir()
    mug = Image.new("RGBA", (90, 90))
    mug.paste((250, 0, 240, 255), (10, 10, 80, 80))
    mug.save(tmp_path / "things" / "pink_mug-01.png")
    Image.new("RGB", (50, 50)).save(tmp_path / "things" / "wall.png")
    steps = [f"{b} {g} {r}" for b in (0, 1) for g in (0, 1) for r in (0, 1)]  # red changes fastest
    (tmp_path / "swap.cube").write_text('# ours\nTITLE "Swapped Channels"\nLUT_3D_SIZE 2\n' + "\n".join(steps) + "\n")
    options = ("--recipes", "remove,grade", "--per-image", 6, "--size", 96, "--processes", 1, "--validation", 0)
    out = tmp_path / "out"
    done = synth(photos, out, *options, "--objects", tmp_path / "things", "--lut", tmp_path / "swap.cube", check=False)
    assert done.returncode == 2
    assert "it has no transparent background" in (out / "rejected.jsonl").read_text()
    made = list(read_rows(out / "dataset.jsonl"))
    removed, graded = ([row for row in made if row.tag == tag] for tag in ("remove", "grade"))
    assert removed
    assert len(graded) == 3 * len(NAMES)
    assert all("pink mug" in row.prompt for row in removed)
    for row in graded:
        assert "Swapped Channels" in row.prompt
        assert np.abs(pixels(row.edit_image[0])[..., ::-1] - pixels(row.image)).max() <= 1


def test_a_photograph_that_does_not_suit_a_recipe_is_left_out_and_counted(tmp_path):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (96, 96), (90, 90, 90)).save(tmp_path / "photos" / "plain.png")
    options = ("--per-image", 2, "--validation", 0, "--size", 64)
    done = synth(tmp_path / "photos", tmp_path / "out", "--recipes", "upscale,add_rain", *options)
    assert done.stdout.splitlines()[1] == "1 pairs left out: the recipe does not suit the photograph"
    assert [row.tag for row in read_rows(tmp_path / "out" / "dataset.jsonl")] == ["add_rain"]
    done = synth(tmp_path / "photos", tmp_path / "out", "--recipes", "upscale", *options, check=False)
    assert done.returncode == 2
    assert "error: no row was made: 2 pairs left out" in done.stderr


def test_a_wrong_recipe_is_answered_with_the_nearest(photos, tmp_path):
    done = synth(photos, tmp_path, "--recipes", "relihgt", check=False)
    assert done.returncode == 2
    assert "did you mean 'relight'?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 100}, "multiple of 32"),
        ({"per_image": 0}, "must be 1 or more"),
        ({"validation": 5}, "leave none to train on"),
        ({"validation": 1.5}, "a share from 0 to 1 or a whole number"),
        ({"out": "nested/pairs"}, "inside the folder of photographs"),
        ({"recipes": "remve"}, "did you mean 'remove'"),
    ],
)
def test_options_that_cannot_be(photos, tmp_path, options, message):
    out = photos / options.pop("out") if "out" in options else tmp_path / "out"
    with pytest.raises(InputError, match=message):
        command(photos, out, **options)
    assert not out.exists()


def test_a_folder_without_photographs(tmp_path):
    (tmp_path / "empty").mkdir()
    done = synth(tmp_path / "empty", tmp_path / "out", check=False)
    assert done.returncode == 2
    assert "there is no image file in" in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cutout+relight", "cutout cannot be combined"),
        ("add_fog+remove_fog", "contradict"),
        ("grade+relight", "contradict"),
        ("remove+remove", "twice"),
        (" , ", "names no recipe"),
    ],
)
def test_recipes_that_cannot_be(text, message):
    with pytest.raises(InputError, match=message):
        parse_recipes(text)


def test_recipes_by_group_and_combined_in_the_order_of_the_work():
    assert parse_recipes("restore,denoise") == list(GROUPS["restore"])
    assert parse_recipes("relight+remove, remove+relight") == ["remove+relight"]
    assert instruction(("Remove the fog", "Make it snow")) == "Remove the fog, then make it snow."


def test_held_out_photographs_borrow_from_their_own_split_alone():
    paths = [Path(f"/photos/{i}.jpg") for i in range(20)]
    held_out = frozenset(paths[:4])
    originals = {path: path.stem for path in paths}
    plan = Plan(originals, Path("/photos"), ["remove"], 3, 0, held_out, None, None)
    for item in plan.items():
        photograph, *lenders = item.files
        assert lenders
        assert photograph not in lenders
        assert all((lender in held_out) == (photograph in held_out) for lender in lenders)


def test_no_object_is_on_both_sides_of_the_split():
    paths = [Path(f"/photos/{i}.jpg") for i in range(20)]
    things = [Path(f"/things/{i}.png") for i in range(5)]
    originals = {path: path.stem for path in paths}
    plan = Plan(originals, Path("/photos"), ["remove"], 3, 0, frozenset(paths[:4]), things, None)
    used = {True: set(), False: set()}
    for item in plan.items():
        used[item.values["held_out"]].update(item.files[1:])
    assert len(used[True]) == 1
    assert len(used[False]) == 4
    assert not used[True] & used[False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("LUT_1D_SIZE 2\n0 0 0\n1 1 1\n", "not a three-dimensional LUT"),
        ("LUT_3D_SIZE 2\n0 0 0\n", "need 8 lines"),
        ("LUT_3D_SIZE 2\nDOMAIN_MAX 2 2 2\n", "domain from 0 to 1"),
        ("LUT_3D_SIZE two\n", "should be numbers"),
    ],
)
def test_luts_that_cannot_be_used(tmp_path, text, message):
    (tmp_path / "look.cube").write_text(text)
    with pytest.raises(InputError, match=message):
        load_cube(tmp_path / "look.cube")


@pytest.mark.parametrize(
    ("size", "wanted", "expected"),
    [
        ((2000, 2000), 512, (512, 512)),
        ((4000, 3000), 512, (576, 448)),  # 512·sqrt(4/3) = 591, 512/sqrt(4/3) = 443
        ((100, 90), 512, (96, 64)),
        ((1920, 1080), 512, (672, 384)),  # 683 x 384
        ((700, 70), 512, (128, 64)),
    ],
)
def test_frames_are_multiples_of_32_and_never_enlarged(size, wanted, expected):
    image = Image.new("RGB", size)
    assert frame_size(image, wanted) == expected
    assert framed(image, wanted, np.random.default_rng(0), whole=False).shape == (*expected[::-1], 3)


def test_a_photograph_of_the_wanted_size_is_not_resampled():
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    assert np.array_equal(framed(Image.fromarray(noise), 128, np.random.default_rng(1), whole=True), noise)


def test_srgb():
    """Two values of IEC 61966-2-1, computed by hand, and there and back."""
    levels = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=-1)
    assert np.array_equal(to_srgb(to_linear(levels)), levels)
    assert to_linear(levels)[0, 128, 0] == pytest.approx(0.2158605)
    assert to_linear(levels)[0, 5, 0] == pytest.approx(5 / 255 / 12.92)


def test_daylight():
    """D50's published chromaticity, through scikit-image's matrix."""

    def rgb(x, y):
        return rgb_from_xyz @ np.array([x / y, 1, (1 - x - y) / y])

    d50_to_d65 = rgb(0.34567, 0.35850) / rgb(0.31272, 0.32903)
    assert light.light_colour(5003) == pytest.approx(d50_to_d65, rel=0.01)
    assert light.light_colour(6504) == pytest.approx(1)
    assert np.argmax(light.light_colour(4000)) == 0
    assert np.argmax(light.light_colour(12000)) == 2


@given(seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_light_comes_from_where_the_words_say(seed):
    change = light.relight(np.full((64, 96, 3), 110, np.uint8), np.random.default_rng(seed))
    lit = change.picture.astype(int)
    halves = {
        "left": (lit[:, :48], lit[:, 48:]),
        "right": (lit[:, 48:], lit[:, :48]),
        "above": (lit[:32], lit[32:]),
        "below": (lit[32:], lit[:32]),
        "upper": (lit[:32], lit[32:]),
    }
    named = [word for word in change.words["side"].split() if word in halves]
    for word in named:
        bright, dark = halves[word]
        assert bright.mean() > dark.mean() + 10
        red_over_blue = (bright[..., 0] - bright[..., 2]).mean()
        assert np.sign(np.round(red_over_blue)) == {"warm": 1, "neutral": 0, "cool": -1}[change.words["tone"]]
    assert named


@given(seed=SEEDS)
@settings(max_examples=25, deadline=None)
def test_a_pasted_object_and_its_shadow_are_one_spot(seed):
    """On a plain wall: the object has its colour, the shadow is darker than the wall, and nothing else is touched."""
    wall = np.full((160, 192, 3), 200, np.uint8)
    ball = np.zeros((80, 80, 4), np.uint8)
    y, x = np.mgrid[:80, :80]
    ball[(x - 40) ** 2 + (y - 40) ** 2 < 38**2] = (20, 30, 220, 255)
    scene = Scene(np.random.default_rng(seed), lambda rng: CutOut(Image.fromarray(ball), "blue ball"))
    draft = objects.remove(Draft(wall, wall), scene)
    changed = (draft.source != wall).any(axis=-1)
    blue = draft.source[..., 2].astype(int) - draft.source[..., 0] > 100
    assert np.array_equal(draft.target, wall)
    assert label(changed, np.ones((3, 3)))[1] == 1
    assert blue.sum() > 300
    shadow = changed & (draft.source[..., 0] == draft.source[..., 2])
    assert shadow.sum() > 20
    assert (draft.source[shadow] < 200).all()
    rows, columns = np.nonzero(blue)
    size = max(np.ptp(rows), np.ptp(columns)) + 1
    middle = np.array([rows.mean(), columns.mean()])
    assert np.abs(np.argwhere(changed) - middle).max() < 2 * size
    assert "blue ball" in draft.prompts[0]
    near = {("left", "", "right")[int(3 * (middle[1] + off) / 192)] for off in (-2, 0, 2)}  # pixels: edges are soft
    assert next((word for word in ("left", "right") if word in draft.prompts[0]), "") in near


def test_an_object_like_its_background_is_not_pasted():
    wall = np.full((96, 96, 3), 200, np.uint8)
    pale = CutOut(Image.new("RGBA", (60, 60), (204, 200, 198, 255)))
    with pytest.raises(NoEdit, match="stand out"):
        objects.remove(Draft(wall, wall), Scene(np.random.default_rng(0), lambda rng: pale))


def test_cutout_shows_the_object_alone_on_white():
    ground = np.random.default_rng(0).integers(0, 120, (128, 128, 3), np.uint8)
    red = CutOut(Image.new("RGBA", (60, 60), (230, 10, 10, 255)), "red card")
    draft = objects.on_white(Draft(ground, ground), Scene(np.random.default_rng(3), lambda rng: red))
    is_red = (draft.source == (230, 10, 10)).all(axis=-1)
    assert is_red.sum() > 1000
    assert (draft.target[is_red] == (230, 10, 10)).all()
    untouched = (draft.source == ground).all(axis=-1)
    assert untouched.any()
    assert (draft.target[untouched] == 255).all()


HUES = {"red": (335, 22), "orange": (8, 48), "yellow": (40, 75), "green": (70, 165), "turquoise": (150, 205)}
HUES |= {"blue": (195, 265), "purple": (250, 315), "pink": (285, 380), "brown": (0, 60), "olive": (40, 90)}
"""Degrees of HSV, generously."""


@given(seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_recolouring_says_what_it_does(seed):
    """A blue square on a grey wall, with texture: only what the words name changes, and it becomes what they say."""
    rng = np.random.default_rng(seed)
    picture = np.full((128, 128, 3), 150) + rng.integers(-6, 7, (128, 128, 1))
    picture[30:100, 20:90] = np.array((40, 70, 190)) + rng.integers(-6, 7, (70, 70, 1))
    picture = picture.astype(np.uint8)
    draft = colour.recolour(Draft(picture, picture), Scene(rng, lambda rng: pytest.fail("no object is needed")))
    named = re.findall("|".join([*HUES, "grey"]), draft.prompts[0])
    changed = (draft.target != picture).any(axis=-1)
    assert len(named) == 2
    assert (changed[33:97, 23:87].mean() > 0.95) == (named[0] == "blue")
    assert (changed[:20].mean() > 0.95) == (named[0] == "grey")
    part = draft.target[40:90, 30:80] if named[0] == "blue" else draft.target[:20]
    hue = 360 * colorsys.rgb_to_hsv(*part.mean(axis=(0, 1)) / 255)[0]
    low, high = HUES[named[1]]
    assert (hue - low) % 360 <= (high - low) % 360, (draft.prompts, hue)


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((220, 30, 30), "red"),
        ((255, 150, 20), "orange"),
        ((250, 220, 40), "yellow"),
        ((40, 160, 60), "green"),
        ((40, 80, 220), "blue"),
        ((130, 50, 180), "purple"),
        ((255, 150, 190), "pink"),
        ((110, 70, 40), "brown"),
        ((128, 128, 128), "grey"),
        ((250, 250, 250), "white"),
        ((8, 8, 8), "black"),
    ],
)
def test_colour_names(rgb, name):
    lab = colour.rgb2lab(np.array([[rgb]], np.uint8))
    assert colour.colour_names(lab)[0, 0] == name


@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_what_is_left_of_an_outpainted_photograph_is_untouched(seed):
    picture = np.random.default_rng(0).integers(1, 128, (96, 128, 3), np.uint8)
    change = outpaint.crop_border(picture, np.random.default_rng(seed))
    canvas = (change.picture == outpaint.CANVAS[change.words["colour"]]).all(axis=-1)
    assert np.array_equal(change.picture[~canvas], picture[~canvas])
    rows, columns = np.nonzero(~canvas)
    assert canvas.sum() == canvas.size - (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    missing = {"left": columns.min() > 0, "right": columns.max() < 127, "up": rows.min() > 0, "down": rows.max() < 95}
    words = change.words["where"]
    assert {side for side in missing if missing[side]} == {side for side in missing if side in words or "all" in words}


def test_weather():
    night = np.zeros((96, 96, 3), np.uint8)
    for seed in range(5):
        for fall in (weather.rain, weather.snow):
            change = fall(night, np.random.default_rng(seed))
            assert 0.01 < (change.picture > 0).any(axis=-1).mean() < 0.7
        fog = weather.fog(night, np.random.default_rng(seed)).picture.astype(int)
        assert fog[:24].mean() > fog[-24:].mean()  # far off there is more air


@pytest.mark.parametrize(
    ("stem", "name"), [("red_mug-02", "red mug"), ("IMG_2041", ""), ("Ball", "ball"), ("0001", ""), ("x1", "")]
)
def test_object_names(stem, name):
    assert object_name(stem) == name
