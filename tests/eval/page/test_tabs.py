"""What the page makes of its form, what it refuses, and what it reads of a run."""

import asyncio
import json
import math
import random
import struct
import threading
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from data_prep.errors import InputError
from data_prep.model.geometry import Geometry, Size
from data_prep.rows.images import file_digest, open_image
from eval.bases.auto import open_editor
from eval.page.jobs import MAX_WAITING, Cancelled, Jobs, Status, shown_edit
from eval.page.limits import Limits, check_exposure, is_loopback, parse_auth, read_picture
from eval.page.server import read_examples
from eval.page.studio import Example, Studio
from eval.page.tabs.blind_pair import draw_example, make_pair
from eval.page.tabs.fields import Asking, build_asking, build_settings, canvas, mode_updates
from eval.page.tabs.form import AS_SOURCE, BASE_MODEL, EXACT, make_request, painted_mask
from eval.page.tabs.kept import OPENED_WITH, PICTURES, restored
from eval.page.tabs.knob_fields import AUTOMATIC, BY_FIELD
from eval.page.tabs.results import beside, settings_html
from eval.page.tabs.runs import (
    chosen_run,
    curves_html,
    find_runs,
    read_history,
    read_validations,
    scores_html,
    summary_html,
)
from eval.page.tabs.runs_tab import show_run
from eval.page.uploads import scaled_in
from eval.report.chart import line_chart
from eval.request.knobs import AdapterUse, Control, Focus, SamplerName
from eval.request.placement import Placement
from eval.request.request import KNOBS, Abilities, EditRequest
from tests.adapters import write_adapter
from tests.children import PATIENCE, wait_until
from tests.pictures import picture, save
from train.record.lookup import FoundAdapter

SIDE = 64
SMALL = Geometry(max_pixels=SIDE * SIDE, vision_pixels=56 * 56)
LIMITS = Limits(max_image_pixels=10_000, max_count=3)


@pytest.fixture
def form(tmp_path):
    """The form as it is when the page opens, with a source and an instruction."""
    adapters = {"adapter": BASE_MODEL, "weight": 1}
    knobs = {"strength": 0.6, "feather": 8, "focus_x": 0.5, "focus_y": 0.25, "focus_radius": 0.3, "controls": ["canny"]}
    knobs |= {"canny_strength": 1, "lines_strength": 0.5, "depth_strength": 1, "painting": None}
    sampling = {
        "steps": 0,
        "cfg_scale": 0,
        "sampler": AUTOMATIC,
        "sizing": AUTOMATIC,
        "negative_prompt": "",
        "seed": 0,
        "count": 1,
    }
    shape = {"shape": AS_SOURCE, "width": 0, "height": 0}
    images = {"source": str(save(tmp_path / "photo.png")), "reference_1": None, "reference_2": None}
    return {"mode": "edit", "prompt": " Sharpen it. ", **images, **adapters, **knobs, **sampling, **shape}


@pytest.fixture(scope="module")
def studio(tmp_path_factory, tiny_model_dir) -> Studio:
    """On the tiny model, with two adapters and an example."""
    folder = tmp_path_factory.mktemp("studio")
    write_adapter(folder / "runs/lbm/checkpoints/step-000002", tiny_model_dir, "lbm", SMALL, bridge_noise=0.0)
    write_adapter(folder / "runs/flow/checkpoints/step-000002", tiny_model_dir, "flow", SMALL)
    editor = open_editor(str(tiny_model_dir), Placement(dtype=torch.float32), SMALL)
    example = Example(save(folder / "photo.png", 3, (SIDE, SIDE)), "Sharpen it.")
    return Studio(editor, "tiny", folder / "out", folder / "runs", LIMITS, [example])


def painted(*boxes: tuple[int, int, int, int], size=(80, 60)) -> dict:
    layer = Image.new("RGBA", size)
    for box in boxes:
        layer.paste((229, 72, 77, 255), box)
    return {"background": None, "layers": [layer], "composite": None}


def test_the_untouched_form_asks_for_what_suits(form):
    asked = make_request(form, [], LIMITS)
    request = asked.request
    assert (request.mode, request.prompt, request.seed, request.count) == ("edit", "Sharpen it.", 0, 1)
    assert (request.steps, request.cfg_scale, request.strength, request.sampler) == (None, None, None, None)
    assert (request.mask, request.focus, request.size, request.aspect) == (None, None, None, None)
    assert (list(request.controls), list(request.adapters), request.negative_prompt) == ([], [], " ")
    assert [name for name, _ in asked.sources] == ["photo.png"]


def test_each_mode_takes_its_own_knobs_only(form, tmp_path):
    def request(**changes):
        return make_request(form | changes, [FoundAdapter("lbm/step-000001", tmp_path)], LIMITS).request

    assert request(mode="img2img").strength == 0.6
    assert request(mode="variation").prompt == ""
    assert request(mode="focus", strength=1).focus == Focus(0.5, 0.25, 0.3)
    assert request(mode="focus", strength=1).strength is None  # starts anew anyway
    assert list(request(mode="control", controls=["canny", "lines"]).controls) == [
        Control("canny", 1.0),
        Control("lines", 0.5),
    ]
    assert request(adapter="lbm/step-000001", weight=0.5).adapters == [AdapterUse(tmp_path, 0.5)]
    assert request(shape="16:9").aspect == "16:9"
    assert request(shape=EXACT, width=96, height=64).size == Size(64, 96)
    masked = request(mode="inpaint", painting=painted((0, 0, 40, 60)), strength=1, feather=0)
    assert masked.feather == 0
    assert masked.mask
    assert masked.mask.size == (32, 24)  # the source's
    assert masked.mask.getbbox() == (0, 0, 16, 24)
    assert sorted(masked.mask.getcolors() or []) == [(384, 0), (384, 255)]


@pytest.mark.parametrize("mode", ["focus", "control", "invert", "edit"])
def test_a_form_makes_the_picture_that_its_request_makes(form, studio, tmp_path, mode):
    """`edit` with references; each against a request written by hand."""
    paths = [save(tmp_path / f"{number}.png", number, (SIDE, SIDE)) for number in range(3)]
    changes = {"mode": mode, "source": str(paths[0]), "steps": 2, "seed": 5, "strength": 1.0, "controls": ["lines"]}
    images = [open_image(path) for path in paths[: 3 if mode == "edit" else 1]]
    own = {
        "focus": {"focus": Focus(0.5, 0.25, 0.3)},
        "control": {"controls": [Control("lines", 0.5)]},
        "invert": {"strength": 0.5},
        "edit": {},
    }[mode]
    if mode == "edit":
        changes |= {"reference_1": str(paths[1]), "reference_2": str(paths[2])}
    if mode == "invert":
        changes["strength"] = 0.5
    asked = make_request(form | changes, [], LIMITS)
    assert [digest for _, digest in asked.sources] == [file_digest(path) for path in paths[: len(images)]]
    (made,) = studio.editor.edit(asked.request)
    (expected,) = studio.editor.edit(EditRequest("Sharpen it.", images, mode, seed=5, steps=2, **own))
    assert made.settings == expected.settings
    assert made.image.tobytes() == expected.image.tobytes()
    assert made.settings["mode"] == mode
    assert len(made.settings["image_digests"]) == len(images)
    if mode == "focus":  # the circle is in the upper half
        after, before = np.array(made.image, int), np.array(images[0], int)
        assert np.abs(after - before)[-8:].max() == 0
        assert np.abs(after - before)[:24, 16:48].max() > 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": None}, "choose a source picture first"),
        ({"prompt": "  "}, "write an instruction"),
        ({"mode": "inpaint"}, "nothing is painted yet"),
        ({"mode": "inpaint", "painting": painted()}, "nothing is painted yet"),
        ({"mode": "control", "controls": []}, "choose at least one map"),
        ({"count": 9}, "at most 3 pictures at once, got 9"),
        ({"shape": EXACT}, "give the width and the height"),
        ({"shape": EXACT, "width": 33, "height": 32}, "multiples of 32, got 33x32"),
        ({"seed": -4}, r"seed must be in \[0, "),
        ({"steps": -1}, r"steps must be in \[1, 1000\], got -1"),
        ({"adapter": "../../etc"}, r"the adapter \.\./\.\./etc is not there any more"),
    ],
)
def test_a_wrong_form_is_answered_in_words(form, changes, message):
    with pytest.raises(InputError, match=message):
        make_request(form | changes, [], LIMITS)


def test_strokes_of_all_layers_count():
    both = {"layers": [*painted((0, 0, 10, 60))["layers"], *painted((70, 0, 80, 60))["layers"]]}
    mask = painted_mask(both, Size(60, 80))
    assert [mask.getpixel((x, 30)) for x in (5, 40, 75)] == [255, 0, 255]


def test_pictures_are_refused_by_their_header_and_by_name_alone(tmp_path):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)  # 30 GB when decoded, in 100 bytes
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")
    )
    (tmp_path / "bomb.png").write_bytes(bomb)
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    whole = save(tmp_path / "whole.png", size=(64, 64)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    save(tmp_path / "large.png", size=(120, 90))
    save(tmp_path / "small.png", size=(8, 8))
    for name, reason in {
        "bomb": "bomb.png has",
        "text": "text.png is not an image that can be read",
        "empty": "empty.png is not an image that can be read",
        "cut": "cut.png: cannot be read",
        "large": r"large.png has 0\.0 megapixels \(120x90\); at most 0\.01 megapixels",
        "small": "small.png: 8x8 is too small",
    }.items():
        with pytest.raises(InputError, match=reason) as caught:
            read_picture(str(tmp_path / f"{name}.png"), LIMITS)
        assert str(tmp_path) not in str(caught.value)


def arrived(path: Path, limits: Limits, folder: Path) -> Image.Image | None:
    scaled = scaled_in(path, limits, folder)
    return None if scaled is None else read_picture(str(scaled), limits)


def test_large_pictures_are_scaled_as_they_arrive(tmp_path):
    """As Pillow scales the whole picture by averages, within what JPEG changes; upright, and in the colours of the profile."""
    smooth = picture(3, (6, 4)).resize((300, 200), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90°
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    smooth.save(tmp_path / "photo.jpg", quality=95, exif=exif, icc_profile=profile)
    smooth.save(tmp_path / "photo.png")
    smooth.quantize(256).save(tmp_path / "palette.png")
    smooth.save(tmp_path / "progressive.jpg", quality=95, progressive=True)
    save(tmp_path / "small.png", size=(100, 100))
    for name, turned in {"photo.jpg": True, "photo.png": False, "palette.png": False, "progressive.jpg": False}.items():
        large = Limits(max_image_pixels=20_000)  # of 60,000
        image = arrived(tmp_path / name, large, tmp_path / "made")
        assert image
        assert image.width * image.height <= 20_000
        upright = image.transpose(Image.Transpose.ROTATE_90) if turned else image
        found = np.asarray(upright.resize((100, 66), Image.Resampling.BOX), dtype=float)
        with Image.open(tmp_path / name) as whole:
            exact = np.asarray(whole.convert("RGB").resize((100, 66), Image.Resampling.BOX), dtype=float)
        assert np.abs(found - exact).mean() < 4, name
    assert scaled_in(tmp_path / "small.png", Limits(max_image_pixels=10_000), tmp_path) is None


def test_what_is_decoded_as_it_arrives_has_an_end(tmp_path):
    """JPEG is decoded at a fraction of its sides: its end is farther."""
    Image.new("RGB", (300, 200)).save(tmp_path / "photo.jpg")
    Image.new("RGB", (300, 200)).save(tmp_path / "slow.jpg", progressive=True)
    Image.new("RGB", (300, 200)).save(tmp_path / "photo.png")
    Image.new("I;16", (300, 200)).save(tmp_path / "deep.png")
    for most, taken in {
        15_000: ("photo.jpg", "slow.jpg", "photo.png"),
        14_999: ("photo.jpg",),
        3_750: ("photo.jpg",),
        3_749: (),
    }.items():
        for name in ("photo.jpg", "slow.jpg", "photo.png"):
            limits = Limits(max_image_pixels=most)
            if name in taken:
                assert arrived(tmp_path / name, limits, tmp_path / "made")
            else:
                with pytest.raises(
                    InputError, match=rf"{name} has 0\.06 megapixels \(300x200\): at most 0\.0\d+ can be"
                ):
                    scaled_in(tmp_path / name, limits, tmp_path / "made")
    with pytest.raises(InputError, match="more than 8 bits a channel"):
        scaled_in(tmp_path / "deep.png", Limits(max_image_pixels=30_000), tmp_path / "made")


def built(studio: Studio) -> Asking:
    """The form. Gradio opens an event loop where none runs, and leaves it open."""

    async def build() -> Asking:
        with gr.Blocks():
            asking = build_asking(studio)
            build_settings(studio, asking)
        return asking

    return asyncio.run(build())


def test_the_form_is_made_of_the_table_of_knobs(studio):
    """Each knob has a field, with the table's label, range and choices; those of one mode are shown with it alone."""
    asking = built(studio)
    fields = asking.fields
    several = {"adapters": ("adapter",), "focus": ("focus_x",), "size": ("width", "height"), "aspect": ("shape",)}
    for each in KNOBS:
        for name in several.get(each.field, (each.field,)):
            field = fields[name]
            if each.field in several and each.field != "adapters":
                continue
            assert field.label == each.label
            if isinstance(field, gr.Number | gr.Slider):
                assert field.minimum >= (each.knob.least or 0)
                assert field.maximum <= each.knob.most
            if isinstance(field, gr.Number):
                assert (field.minimum, field.maximum) == (each.knob.least, each.knob.most)
            if each.knob.help and isinstance(field, gr.Number | gr.Slider) and each.field != "count":
                assert field.info.startswith(each.knob.help)
    assert [value for _, value in fields["sampler"].choices] == [AUTOMATIC, *get_args(SamplerName)]
    for mode in studio.editor.abilities.modes:
        shown = mode_updates(mode, asking)
        assert {name for name, group in asking.groups.items() if shown[group].visible} == {
            each.field for each in KNOBS if each.field in asking.groups and mode in each.knob.modes
        }


def test_a_base_without_a_knob_shows_no_field_for_it(studio):
    few = Abilities("sd15", ("img2img", "inpaint"), 1)
    asking = built(replace(studio, editor=SimpleNamespace(abilities=few)))
    assert not asking.fields["sampler"].visible
    assert asking.fields["steps"].visible
    assert not few.has(BY_FIELD["controls"])
    assert few.has(BY_FIELD["strength"])
    assert (asking.groups["strength"].visible, asking.groups["feather"].visible) == (True, False)


def test_what_a_browser_kept_is_taken_where_the_form_can_hold_it(studio):
    asking = built(studio)
    fields = {name: field for name, field in asking.fields.items() if name not in PICTURES}
    good = {"prompt": "x", "mode": "focus", "steps": 7, "cfg_scale": None, "strength": 0.5, "shape": "16:9", "seed": 3}
    good |= {"controls": ["depth"], "sampler": "bridge", "width": 96, "adapter": "flow/step-000002", OPENED_WITH: None}
    found = restored(good, studio, fields, asking)
    assert found[fields["mode"]]["value"] == "focus"
    assert found[fields["prompt"]].value == "x"
    assert found[fields["adapter"]].value == "flow/step-000002"
    plain = ("steps", "strength", "shape", "seed", "controls", "sampler", "width")
    assert {name: found[fields[name]] for name in plain} == {name: good[name] for name in plain}
    assert fields["cfg_scale"] not in found
    assert fields["adapter"] not in restored(good | {OPENED_WITH: "lbm/step-000002"}, studio, fields, asking)
    bad = {"prompt": 3, "mode": "<b>", "steps": 1001, "cfg_scale": "2", "strength": 7, "shape": "5:1", "seed": True}
    bad |= {"controls": ["x"], "sampler": [], "width": -1, "adapter": "../../etc", OPENED_WITH: None, "unknown": 1}
    found = restored(bad, studio, fields, asking)
    assert [name for name, field in fields.items() if field in found and name not in ("mode", "prompt")] == []
    assert (found[fields["mode"]]["value"], found[fields["prompt"]].value) == (studio.editor.abilities.modes[0], "")


def test_progress_is_in_whole_numbers_and_words(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("data_prep.jobs.progress.time.monotonic", lambda: now[0])
    status = Status()
    status(None, "Waiting: 1 before this one")
    assert status.html() == '<div class="status told">Waiting: 1 before this one<progress></progress></div>'
    status((13, 1000), "Editing")
    assert "Editing: step 13 of 1,000<progress" in status.html()
    now[0] = 10.0
    status((413, 1000), "Editing")
    assert (
        'Editing: step 413 of 1,000, 15 s left<progress value="413" max="1000">' in status.html()
    )  # 587 at 40 a second
    now[0] = 1000.0
    assert "25 min left" in status.html()


def test_an_edit_is_followed_to_its_result_or_its_error():
    def work(on_status):
        on_status((1, 2), "Editing")
        assert wait_until(lambda: looked) is None
        return ["picture"]

    looked: list = []
    for shown in shown_edit("The edit", work, 1):
        looked.append(shown)
    assert "Editing: step 1 of 2" in looked[0][-1]
    assert looked[-1] == ["picture", ""]

    def fail(on_status):
        raise InputError("no <b>")

    *_, last = shown_edit("The edit", fail, 1)
    assert "no &lt;b&gt;" in last[-1]
    assert last[0] == gr.skip()

    def stopped(on_status):
        raise Cancelled

    *_, last = shown_edit("The edit", stopped, 1)
    assert last == [gr.skip(), ""]


def test_pictures_are_upright_and_opaque(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(1, (40, 20)).save(tmp_path / "turned.jpg", exif=turned)
    assert read_picture(str(tmp_path / "turned.jpg"), LIMITS).size == (20, 40)
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_picture(str(tmp_path / "clear.png"), LIMITS).getpixel((0, 0)) == (255, 255, 255)


def test_only_this_machine_without_a_password():
    for host in ("127.0.0.1", "::1", "localhost", "127.3.2.1"):
        assert is_loopback(host)
        check_exposure(host, False, None)
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org", "localhost.example.org"):
        assert not is_loopback(host)
        with pytest.raises(InputError, match="lets other machines in: give --auth"):
            check_exposure(host, False, None)
        check_exposure(host, True, ("user", "password"))
    with pytest.raises(InputError, match="--share makes the page public"):
        check_exposure("127.0.0.1", True, None)
    assert parse_auth("anna:pass:word") == ("anna", "pass:word")
    for text in ("anna", ":secret", "anna:"):
        with pytest.raises(InputError, match="USER:PASSWORD") as caught:
            parse_auth(text)
        assert "secret" not in str(caught.value)


def test_a_result_may_be_larger_than_what_is_taken_in(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    Limits(max_image_pixels=100).apply()
    before, after = beside(picture(1, (10, 10)), save(tmp_path / "result.png", 2, (1024, 1024)))
    assert before.size == after.size == (1024, 1024)


def test_settings_are_readable_and_escaped():
    html = settings_html(
        {"dtype": "float32", "prompt": "<img onerror=x>", "sampler": {"name": "Flow", "cfg_scale": 4.0}}
    )
    assert "&lt;img" in html
    assert "name: Flow, cfg scale: 4" in html
    assert html.index("prompt") < html.index("dtype")


def test_runs_are_read_while_they_are_written(tmp_path):
    for name in ("team/lbm", "young"):
        (tmp_path / name).mkdir(parents=True)
    lines = [{"step": 1, "loss": 0.5, "loss/main": 0.5}, {"step": 2, "loss": 0.25, "loss/main": 0.25, "lr": 1e-4}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "team/lbm/metrics.jsonl").write_text(text + '{"step": 3, "lo')
    (tmp_path / "young/metrics.jsonl").touch()
    assert find_runs(tmp_path).keys() == {"team/lbm", "young"}
    history = read_history(tmp_path / "team/lbm/metrics.jsonl")
    assert [line["step"] for line in history] == [1, 2]
    assert "<polyline" in curves_html("lbm", history)
    assert "<b>2</b><span>step</span>" in summary_html(history, 0)
    assert "0.25" in summary_html(history, 0)
    assert "No numbers yet" in curves_html("young", read_history(tmp_path / "young/metrics.jsonl"))
    assert read_validations(tmp_path / "young") == []
    folder = tmp_path / "young/validation/step-000010"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text('{"num_r')
    (validation,) = read_validations(tmp_path / "young")
    assert (validation.step, validation.metrics, validation.grid) == (10, None, None)
    assert "no metrics.json" in scores_html("young", validation)
    with pytest.raises(InputError, match="there is no run"):
        chosen_run("../team", tmp_path / "young")


def test_a_run_without_a_finite_loss_shows_that_and_nothing_of_another_run(tmp_path):
    (tmp_path / "bad").mkdir()
    lines = [{"step": step, "loss": math.nan, "loss/main": math.inf} for step in (1, 2)]
    (tmp_path / "bad/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    numbers, charts, steps, scores, grid = show_run("bad", tmp_path)
    assert "<b>2</b><span>step</span>" in numbers
    assert "<b>nan</b><span>loss</span>" in numbers
    assert "None of its losses is a finite number" in charts
    assert (steps.visible, grid.visible) == (False, False)
    assert "has not validated" in scores
    drawn = line_chart({"bad": [(1, math.nan)], "good": [(1, 2.0), (2, math.inf), (3, 1.0)]}, "step")
    assert drawn.count("<polyline") == 1
    assert 'aria-label="good"' in drawn
    with pytest.raises(ValueError, match="finite"):
        line_chart({"bad": [(1, math.nan)]}, "step")


def test_a_run_that_cannot_be_read_clears_what_was_shown(tmp_path):
    (tmp_path / "bad/metrics.jsonl").parent.mkdir()
    (tmp_path / "bad/metrics.jsonl").write_text('{"step": NaN, "loss": 1.0}\n')
    for name, words in {
        "bad": "Reading the run failed: ValueError",
        "<b>": "there is no run &lt;b&gt; any more",
    }.items():
        numbers, charts, steps, scores, grid = show_run(name, tmp_path)
        assert words in numbers
        assert (charts, scores, steps.visible, grid.visible) == ("", "", False, False)


def test_a_bad_file_under_the_brush_is_answered_in_words(studio, tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.warns(UserWarning, match=r"text\.png is not an image that can be read"):
        assert canvas(str(tmp_path / "text.png"), studio) is None
    assert canvas(str(save(tmp_path / "good.png")), studio)["background"].size == (800, 600)


def test_drawn_examples_are_the_files_themselves_and_held_out(studio, tmp_path):
    path, prompt = draw_example(studio, random.Random(0))
    assert (file_digest(path), prompt) == (file_digest(studio.examples[0].image), "Sharpen it.")
    assert Path(path).is_relative_to(studio.cache)
    for name in ("a", "b"):
        save(tmp_path / f"{name}.png")
    row = {"prompt": "x", "image": "a.png", "edit_image": "a.png"}
    (tmp_path / "all.json").write_text(json.dumps([row, row | {"edit_image": "b.png", "split": "validation"}]))
    assert [each.image.name for each in read_examples(str(tmp_path / "all.json"), None)] == ["b.png"]
    (tmp_path / "train.json").write_text(json.dumps([row]))
    assert [each.image.name for each in read_examples(str(tmp_path / "train.json"), None)] == ["a.png"]


def test_which_is_a_and_which_is_made_first_are_drawn_apart(studio, monkeypatch):
    names = ["lbm/step-000002", "flow/step-000002"]
    image = studio.examples[0].image
    values = {
        "first": names[0],
        "second": names[1],
        "source": str(image),
        "prompt": "Sharpen it.",
        "seed": 7,
        "steps": 1,
    }
    paths = {each.name: each.path for each in studio.adapters()}
    edit, made = studio.editor.edit, []
    expected = {
        name: edit(
            EditRequest("Sharpen it.", [open_image(image)], adapters=[AdapterUse(paths[name])], seed=7, steps=1)
        )[0]
        for name in names
    }
    assert expected[names[0]].image.tobytes() != expected[names[1]].image.tobytes()

    def recorded(request, on_progress=None):
        made.append(request.adapters[0].path)
        return edit(request, on_progress)

    monkeypatch.setattr(studio.editor, "edit", recorded)
    orders = set()
    for number in range(12):
        left, right, pair = make_pair(studio, values, lambda *_: None, random.Random(number))
        for side, shown in ((pair.a, left), (pair.b, right)):
            assert shown.tobytes() == expected[side.name].image.tobytes()
            settings = expected[side.name].settings
            assert side.digest == file_digest(paths[side.name] / "adapter_model.safetensors")
            assert (side.steps, side.base, side.model) == (1, "qwen-image-edit", settings["model_fingerprint"])
            assert f"name={settings['sampler']['name']}" in side.sampler
        orders.add((pair.a.name, paths[pair.a.name] == made[-2]))
    assert len(orders) == 4  # A is either, and is made first or second


class Recorded:
    """Keeps what it is told of an edit."""

    def __init__(self):
        self.shown: list = []

    def __call__(self, steps, words):
        self.shown.append((steps, words))


def test_a_comparison_shows_no_counts():
    jobs, blind, counted = Jobs(), Recorded(), Recorded()
    with jobs.running("s", "compare", blind, "Making both", counted=False) as on_progress:
        for total in (80, 8):
            on_progress(3, total)
        jobs.cancel("s", "compare")
        with pytest.raises(Cancelled):
            on_progress(4, 8)
    assert blind.shown == [(None, "Making both")]
    with jobs.running("s", "edit", counted, "Editing") as on_progress:
        on_progress(3, 8)
    assert counted.shown == [(None, "Preparing"), ((3, 8), "Editing")]


def test_edits_wait_in_order_and_each_tab_cancels_its_own():
    jobs, order, left, bars = Jobs(), [], [], {}

    def edit(session: str, tab: str) -> None:
        bars[session, tab] = Recorded()
        try:
            with jobs.running(session, tab, bars[session, tab], "Editing"):
                order.append((session, tab))
        except Cancelled:
            left.append((session, tab))

    threads = []
    with jobs.running("anna", "edit", Recorded(), "Editing") as on_progress:
        for owner in (("anna", "compare"), ("bert", "edit"), ("carl", "edit"), ("carl", "compare")):
            threads.append(threading.Thread(target=edit, args=owner))
            threads[-1].start()
            wait_until(lambda owner=owner: owner in bars and bars[owner].shown)
        assert bars["bert", "edit"].shown == [(None, "Waiting: 2 before this one")]
        assert jobs.cancel("anna", "compare") == "waiting"
        wait_until(lambda: left == [("anna", "compare")])
        on_progress(1, 2)  # goes on
        wait_until(lambda: bars["bert", "edit"].shown[-1] == (None, "Waiting: 1 before this one"))
        assert jobs.cancel("nobody", "edit") == "none"
        jobs.leave("carl")
        wait_until(lambda: len(left) == 3)
        assert jobs.cancel("anna", "edit") == "running"
        with pytest.raises(Cancelled):
            on_progress(2, 2)
        assert order == []
    for thread in threads:
        thread.join(PATIENCE)
    assert order == [("bert", "edit")]
    assert jobs.cancel("bert", "edit") == "none"


def test_the_line_has_an_end():
    jobs, full = Jobs(), []

    def edit() -> None:
        try:
            with jobs.running("s", "edit", Recorded(), "Editing"):
                pass
        except (Cancelled, InputError) as error:
            full.append(error)

    with jobs.running("s", "edit", Recorded(), "Editing"):
        threads = [threading.Thread(target=edit) for _ in range(MAX_WAITING + 1)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(full) == 1)
        assert "64 edits are waiting already" in str(full[0])
        jobs.cancel_all()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(full) == MAX_WAITING + 1
