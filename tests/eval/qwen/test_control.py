"""Control maps against shapes whose edges are known, depth through the real model class, strengths against arithmetic."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps
from safetensors.torch import load_file, save_file
from scipy.ndimage import distance_transform_edt
from transformers import pipeline

from data_prep.errors import InputError
from data_prep.model.directory import ModelDirectory
from data_prep.model.geometry import Geometry, Size
from eval.qwen.control import Strengthened, make_map
from eval.qwen.depth import DepthModel, DepthSource
from eval.qwen.editor import Editor
from eval.qwen.frame import Frame
from eval.request.knobs import Control
from eval.request.request import EditRequest
from losses.batch import Condition
from scripts import photographs
from tests.tiny_depth import write_depth

SIDE = 96


def disc(inside: tuple[int, int, int], outside: tuple[int, int, int]) -> Image.Image:
    """A disc of radius 30 around the middle, drawn large and reduced, so that its rim is smooth."""
    image = Image.new("RGB", (SIDE * 4, SIDE * 4), outside)
    ImageDraw.Draw(image).ellipse([72, 72, 312, 312], fill=inside)
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def from_rim() -> np.ndarray:
    """Distance of every pixel's centre from the disc's rim, pixels."""
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    return np.abs(np.hypot(y - SIDE / 2, x - SIDE / 2) - 30)


def values(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L")) / 255


@pytest.mark.parametrize("kind", ["canny", "lines"])
@pytest.mark.parametrize("bright", [255, 90])
def test_edges_are_where_the_shape_ends_and_nowhere_else(kind, bright):
    drawn = make_map(Control(kind), disc((bright,) * 3, (20, 20, 20)))
    assert (drawn.mode, drawn.size) == ("RGB", (SIDE, SIDE))
    lines = values(drawn) > 0.5
    assert lines[from_rim() > 3].sum() == 0
    near = distance_transform_edt(~lines)[from_rim() < 0.5]
    assert near.max() < 3  # the whole rim, without a gap


def test_canny_is_black_and_white_and_lines_are_soft_and_weigh_contrast():
    """Of two discs the fainter has the fainter lines; Canny draws both alike."""
    scene = Image.new("RGB", (2 * SIDE, SIDE))
    scene.paste(disc((235, 235, 235), (128, 128, 128)), (0, 0))
    scene.paste(disc((150, 150, 150), (128, 128, 128)), (SIDE, 0))
    canny, lines = (values(make_map(Control(kind), scene)) for kind in ("canny", "lines"))
    assert set(np.unique(canny)) == {0, 1}
    rim = from_rim() < 1
    strong, faint = lines[:, :SIDE][rim].mean(), lines[:, SIDE:][rim].mean()
    assert 0.05 < faint < strong / 2
    assert abs(canny[:, :SIDE].sum() - canny[:, SIDE:].sum()) < 0.3 * canny[:, :SIDE].sum()


def test_lines_see_an_edge_of_colour_alone():
    """Red on green of one grey value, which Canny cannot see."""
    picture = disc((200, 0, 0), (0, 59, 0))
    assert values(make_map(Control("canny"), picture)).sum() == 0
    lines = values(make_map(Control("lines"), picture))
    assert lines[from_rim() < 1].mean() > 0.5
    assert lines[from_rim() > 5].max() < 0.1


@pytest.mark.parametrize("kind", ["canny", "lines"])
def test_a_picture_of_nothing_has_no_lines(kind):
    noise = np.random.default_rng(0).integers(126, 130, (SIDE, SIDE, 3), dtype=np.uint8)
    for nothing in (Image.new("RGB", (40, 64), (90, 120, 30)), Image.fromarray(noise)):
        assert values(make_map(Control(kind), nothing)).max() < 0.5


@pytest.mark.parametrize("path", [photographs.TRAIN[0], *photographs.HELD_OUT], ids=lambda path: path.stem)
def test_a_photograph_is_drawn_with_few_lines_that_both_detectors_agree_on(path):
    photograph = ImageOps.fit(photographs.load(path), (256, 256))
    canny, lines = (values(make_map(Control(kind), photograph)) for kind in ("canny", "lines"))
    for drawn in (canny, lines):
        assert 0.02 < (drawn > 0.5).mean() < 0.15
    distance = distance_transform_edt(canny == 0)
    assert (distance[lines > 0.8] <= 2).mean() > 0.8  # by chance about a third


@pytest.fixture(scope="module", params=["relative", "metric"])
def depth_folder(request, tmp_path_factory):
    """A tiny random Depth-Anything in the library's layout."""
    folder = tmp_path_factory.mktemp(request.param)
    return write_depth(folder, request.param)


def load_depth_model(path: object = None) -> DepthModel:
    with DepthSource(str(path) if path else None, torch.device("cpu")).model() as depth:
        return depth


def test_depth_is_the_librarys_near_in_white(depth_folder, monkeypatch):
    """Against transformers' pipeline, which has its own resizing: the order of points, and black to white."""
    photograph = ImageOps.fit(photographs.load(photographs.HELD_OUT[0]), (80, 64))
    monkeypatch.setenv("DEPTH_MODEL", str(depth_folder))
    drawn = make_map(Control("depth"), photograph, load_depth_model())
    assert (drawn.mode, drawn.size) == ("RGB", (80, 64))
    ours = values(drawn)
    assert (ours.min(), ours.max()) == (0, 1)
    theirs = pipeline("depth-estimation", str(depth_folder), device="cpu")(photograph)["predicted_depth"].numpy()
    far = "metric" in depth_folder.name  # metres: more is farther
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] * (-1 if far else 1) > 0.9
    where = theirs.argmin() if far else theirs.argmax()
    assert ours.ravel()[where] == 1


def test_a_flat_depth_is_black(depth_folder):
    depth = load_depth_model(depth_folder)
    for weight in depth.model.head.parameters():
        weight.data.zero_()
    assert values(make_map(Control("depth"), disc((9, 9, 9), (200, 0, 0)), depth)).max() == 0


def test_a_depth_model_that_cannot_be_had_says_how_to_get_one(depth_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.delenv("DEPTH_MODEL", raising=False)
    with pytest.raises(InputError, match=r"V2-Small-hf: give a folder .*--depth-model or DEPTH_MODEL.*hf download"):
        load_depth_model()
    with pytest.raises(InputError, match="no model at /nowhere/depth"):
        load_depth_model("/nowhere/depth")
    config = json.loads((depth_folder / "config.json").read_text())
    for broken, message in (
        ("", "no depth model could be read from"),
        ("{}", "no depth model could be read from"),
        (json.dumps(config), "no depth model could be read from"),  # without weights
        (json.dumps({"model_type": "bert"}), "is a bert model: a map of depth needs Depth-Anything"),
    ):
        (tmp_path / "config.json").write_text(broken)
        with pytest.raises(InputError, match=message):
            load_depth_model(tmp_path)


def test_missing_tensors_are_not_left_random(depth_folder, tmp_path):
    for file in depth_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(depth_folder / "model.safetensors")
    save_file(
        {name: weight for name, weight in weights.items() if not name.startswith("head.")},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(InputError, match="no depth model could be read"):
        load_depth_model(tmp_path)


def condition(number: float) -> Condition:
    return Condition(torch.tensor([[[number]]], dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool), [])


class Toy:
    """A velocity in float64 that is not linear in its condition, and counts its calls."""

    def __init__(self):
        self.asked: list[float] = []

    def __call__(self, latents, sigma, condition):
        number = condition.prompt_emb.item()
        self.asked.append(number)
        return torch.sin(latents * (1 + number)) + sigma[:, None, None, None] * number**2


LATENTS = torch.randn(2, 16, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SIGMA = torch.tensor([0.3, 0.8], dtype=torch.float64)


@pytest.mark.parametrize(("strength", "asked"), [(0.0, [1.0]), (1.0, [2.0]), (0.25, [1.0, 2.0]), (1.5, [1.0, 2.0])])
def test_a_controls_strength_is_linear_from_without_to_with(strength, asked):
    toy, base, controlled = Toy(), condition(1.0), condition(2.0)
    velocity = Strengthened(toy, base, [controlled], [strength])(LATENTS, SIGMA, base)
    assert toy.asked == asked  # and no call more than that
    without, with_it = toy(LATENTS, SIGMA, base), toy(LATENTS, SIGMA, controlled)
    assert torch.allclose(velocity, without + strength * (with_it - without), rtol=0, atol=1e-14)
    if strength in (0, 1):
        assert torch.equal(velocity, with_it if strength else without)


def test_several_controls_add_up_and_other_conditions_pass_through():
    toy, base, negative = Toy(), condition(1.0), condition(5.0)
    both = Strengthened(toy, base, [condition(2.0), condition(3.0)], [0.5, 0.25])
    alone = [toy(LATENTS, SIGMA, condition(number)) for number in (1.0, 2.0, 3.0)]
    expected = alone[0] + 0.5 * (alone[1] - alone[0]) + 0.25 * (alone[2] - alone[0])
    assert torch.allclose(both(LATENTS, SIGMA, base), expected, rtol=0, atol=1e-14)
    assert torch.equal(both(LATENTS, SIGMA, negative), toy(LATENTS, SIGMA, negative))
    twice = Strengthened(both, negative, [condition(6.0)], [0.5])
    halves = toy(LATENTS, SIGMA, negative) / 2 + toy(LATENTS, SIGMA, condition(6.0)) / 2
    assert torch.allclose(twice(LATENTS, SIGMA, negative), halves, rtol=0, atol=1e-14)
    assert torch.allclose(twice(LATENTS, SIGMA, base), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("depth_folder", ["relative"], indirect=True)
def test_the_editor_shows_depth_to_the_model_and_asks_for_it_first(tiny_model_dir, depth_folder):
    photograph = photographs.load(photographs.HELD_OUT[0])
    geometry = Geometry(max_pixels=64 * 64, vision_pixels=64 * 64)
    request = EditRequest("Make it darker.", [photograph], "control", controls=[Control("depth", 0.5)], steps=1)
    editor = Editor(ModelDirectory(tiny_model_dir), geometry=geometry, depth_model=str(depth_folder))
    result = editor.edit(request)[0]
    depth = load_depth_model(depth_folder)
    own = Size.of(photograph)
    shown = Frame.around(own, geometry.reference_size(own)).place(photograph)
    assert result.maps[0].tobytes() == make_map(request.controls[0], shown, depth).tobytes()
    without = editor.edit(EditRequest(request.prompt, [photograph], steps=1))[0]
    assert without.image.tobytes() != result.image.tobytes()
    assert result.settings["depth_model"] == {
        "path": str(depth_folder),
        "fingerprint": editor.identity(request)["depth_model"],
    }


def test_a_depth_model_is_looked_for_once_and_before_anything_is_loaded(tiny_model_dir, tmp_path, monkeypatch):
    request = EditRequest("x", [disc((9, 9, 9), (200, 0, 0))], "control", controls=[Control("depth")])
    monkeypatch.setenv("DEPTH_MODEL", str(tmp_path / "depth"))
    editor = Editor(ModelDirectory(tiny_model_dir))
    monkeypatch.setenv("DEPTH_MODEL", "another/one")  # it is the one of the moment when the editor was opened
    for ask in (editor.check, editor.edit):
        with pytest.raises(InputError, match=f"no model at {tmp_path}/depth"):
            ask(request)
    write_depth(tmp_path / "depth")
    with pytest.raises(InputError, match=f"no model at {tmp_path}/depth"):
        editor.check(request)
    editor.check(EditRequest("x", request.images))
    before = DepthSource(str(tmp_path / "depth"), torch.device("cpu")).files()
    write_depth(tmp_path / "depth", seed=1)
    after = DepthSource(str(tmp_path / "depth"), torch.device("cpu")).files()
    assert (before.path, before.folder) == (after.path, after.folder)
    assert before.fingerprint != after.fingerprint
