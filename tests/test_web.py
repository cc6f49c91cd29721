"""What the page makes of its form, what it refuses, and what it reads of a run."""

import json
import struct
import zlib

import pytest
from PIL import Image

from data_prep.errors import InputError
from data_prep.geometry import Size
from eval.places import FoundAdapter
from eval.request import AdapterUse, Control, Focus
from eval.web.form import AS_SOURCE, BASE_MODEL, BY_DEFAULT, EXACT, make_request, painted_mask
from eval.web.limits import Limits, check_exposure, is_loopback, parse_auth, read_picture
from eval.web.results import settings_html
from eval.web.runs import chosen_run, curves_html, find_runs, read_history, read_validations, scores_html, summary_html
from tests.pictures import picture, save

LIMITS = Limits(max_image_pixels=10_000, max_count=3)


@pytest.fixture
def form(tmp_path):
    """The form as it is when the page opens, with a source and an instruction."""
    adapters = {"adapter": BASE_MODEL, "weight": 1}
    knobs = {"strength": 0.6, "feather": 8, "focus_x": 0.5, "focus_y": 0.25, "focus_radius": 0.3, "controls": ["canny"]}
    knobs |= {"canny_strength": 1, "lines_strength": 0.5, "depth_strength": 1, "painting": None}
    sampling = {"steps": 0, "cfg_scale": 0, "sampler": BY_DEFAULT, "negative_prompt": "", "seed": 0, "count": 1}
    shape = {"shape": AS_SOURCE, "width": 0, "height": 0}
    images = {"source": str(save(tmp_path / "photo.png")), "reference_1": None, "reference_2": None}
    return {"mode": "edit", "prompt": " Sharpen it. ", **images, **adapters, **knobs, **sampling, **shape}


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
    assert masked.mask.size == (32, 24)  # the source's
    assert masked.mask.getbbox() == (0, 0, 16, 24)
    assert sorted(masked.mask.getcolors()) == [(384, 0), (384, 255)]


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
        ({"seed": -4}, "seed must be 0 or more"),
        ({"steps": -1}, "steps must be positive"),
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
        "large": r"large.png has 0\.0 megapixels \(120x90\); at most 0\.01 go",
        "small": "small.png: 8x8 is too small",
    }.items():
        with pytest.raises(InputError, match=reason) as caught:
            read_picture(str(tmp_path / f"{name}.png"), LIMITS)
        assert str(tmp_path) not in str(caught.value)


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
