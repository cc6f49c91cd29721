"""What a request means: its sampler, its size, and what it may not ask."""

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from data_prep.errors import InputError
from data_prep.model.geometry import Geometry, Size
from eval.qwen.inversion import InversionSampler
from eval.qwen.modes import check_request, make_plan, result_size
from eval.qwen.samplers import BridgeSampler, FlowSampler
from eval.request.knobs import AdapterUse, Control, Focus
from eval.request.request import ASPECTS, EditRequest

PHOTO = Image.new("RGB", (640, 480))
MASK = Image.new("L", (640, 480), 255)
ADAPTER = (AdapterUse(Path("adapter")),)
BRIDGE = {"objective": "lbm", "loss": json.dumps({"bridge_noise": 0.01, "prediction": "drift", "sub_prob": 0.25})}

KEEPING = {"objective": "lbm", "loss": json.dumps({"preserve": 0.25})}
"""A bridge that has kept the base model's way from noise."""


def request(**values) -> EditRequest:
    return EditRequest(**({"prompt": "x", "images": [PHOTO]} | values))


@pytest.mark.parametrize(
    ("values", "metadata", "sampler", "steps"),
    [
        ({}, {}, FlowSampler(4.0), 40),
        ({"steps": 7, "cfg_scale": 1.0}, {}, FlowSampler(1.0), 7),
        ({"adapters": ADAPTER}, BRIDGE, BridgeSampler("source", False, 0.01, "drift"), 4),
        ({"adapters": ADAPTER, "sampler": "bridge-white"}, BRIDGE, BridgeSampler("white", False, 0.01, "drift"), 4),
        (
            {"adapters": ADAPTER, "sampler": "bridge-stochastic"},
            BRIDGE,
            BridgeSampler("source", True, 0.01, "drift"),
            4,
        ),
        ({"adapters": ADAPTER, "mode": "turbo"}, BRIDGE, BridgeSampler("source", False, 0.01, "drift"), 4),
        ({"adapters": ADAPTER, "mode": "turbo"}, {}, FlowSampler(1.0, shift="lightning"), 4),
        ({"adapters": ADAPTER, "mode": "turbo", "steps": 8}, {}, FlowSampler(1.0, shift="lightning"), 8),
        ({"adapters": ADAPTER, "sampler": "flow"}, KEEPING, FlowSampler(4.0), 40),
        ({"adapters": ADAPTER}, KEEPING, BridgeSampler("source"), 4),
        ({"mode": "img2img"}, {}, FlowSampler(4.0, strength=0.6), 40),
        ({"mode": "img2img", "strength": 0.3}, {}, FlowSampler(4.0, strength=0.3), 40),
        ({"mode": "variation", "prompt": ""}, {}, FlowSampler(4.0, strength=0.6), 40),
        ({"mode": "inpaint", "mask": MASK}, {}, FlowSampler(4.0), 40),
        ({"mode": "inpaint", "mask": MASK, "strength": 0.5}, {}, FlowSampler(4.0, strength=0.5), 40),
        (
            {"mode": "inpaint", "mask": MASK, "adapters": ADAPTER},
            BRIDGE,
            BridgeSampler("source", False, 0.01, "drift"),
            4,
        ),
        ({"mode": "invert", "strength": 0.5}, {}, InversionSampler(FlowSampler(4.0), 0.5), 20),
    ],
)
def test_mode_and_adapter_decide_the_sampler(values, metadata, sampler, steps):
    plan = make_plan(request(**values), metadata)
    assert (plan.sampler, plan.steps) == (sampler, steps)


@pytest.mark.parametrize(
    ("values", "metadata", "message"),
    [
        ({"mode": "turbo"}, {}, "mode=turbo needs an adapter"),
        ({"adapters": ADAPTER, "mode": "turbo", "cfg_scale": 4.0}, {}, "distilled to work without guidance"),
        (
            {"mode": "img2img", "steps": 1, "strength": 1e-20},
            {},
            r"strength=1e-20 of 1 step\(s\) is less than one step",
        ),
        ({"mode": "invert", "steps": 2, "strength": 1e-20}, {}, "less than one step"),
        ({"mode": "invert", "sampler": "heun"}, {}, "method of its own for both ways: leave out sampler=heun"),
        ({"mode": "img2img", "adapters": ADAPTER}, BRIDGE, "starts from noise, but the adapter is a bridge"),
        ({"mode": "invert", "adapters": ADAPTER}, BRIDGE, "starts from noise"),
        ({"adapters": ADAPTER, "cfg_scale": 3.0}, BRIDGE, r"sampled without guidance: leave out cfg_scale=3\.0"),
        (
            {"adapters": ADAPTER, "mode": "inpaint", "mask": MASK, "strength": 0.5},
            BRIDGE,
            "a bridge has no denoising strength",
        ),
        (
            {"adapters": ADAPTER, "sampler": "flow"},
            BRIDGE,
            "sampler=flow does not suit a bridge.* use sampler=bridge. Only a bridge trained with loss.preserve",
        ),
        (
            {"adapters": ADAPTER, "sampler": "bridge"},
            {},
            "sampler=bridge needs an adapter that is a bridge.* use sampler=flow",
        ),
        ({"sampler": "bridge"}, {}, "sampler=bridge needs an adapter that is a bridge.* use sampler=flow"),
        (
            {"adapters": ADAPTER, "sampler": "bridge-white"},
            {"objective": "lbm", "loss": '{"sub_prob": 0}'},
            "trained without",
        ),
        (
            {"mode": "invert", "count": 2},
            {},
            "uses no random noise, so all 2 images would be the same: leave out count$",
        ),
        ({"adapters": ADAPTER, "count": 3}, BRIDGE, "all 3 images.* or use sampler=bridge-stochastic"),
        ({"adapters": ADAPTER}, {"objective": "gan"}, "objective is 'gan'"),
    ],
)
def test_what_an_adapter_cannot_do_is_refused(values, metadata, message):
    with pytest.raises(InputError, match=message):
        make_plan(request(**values), metadata)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"images": []}, "1 to 3 images, got 0"),
        ({"images": [PHOTO] * 4}, "1 to 3 images, got 4"),
        ({"images": [PHOTO] * 3, "mode": "control", "controls": (Control("canny"),)}, "got 3 and 1 control map"),
        ({"mode": "paint"}, "mode must be one of edit, img2img"),
        ({"steps": 0}, r"steps must be in \[1, 1000\], got 0"),
        ({"cfg_scale": 0.5}, r"cfg_scale must be in \[1, 100\]"),
        ({"cfg_scale": math.nan}, "cfg_scale must be"),
        ({"cfg_scale": math.inf}, "cfg_scale must be"),
        ({"feather": math.nan, "mode": "inpaint", "mask": MASK}, "feather must be"),
        ({"feather": 8.0}, "feather is given, but mode=edit takes none: use mode=inpaint or control-inpaint"),
        ({"size": Size(99968, 99968)}, "size 99968x99968 is more than 16,777,216 pixels"),
        ({"prompt": "\udcff"}, "prompt is not UTF-8 text"),
        ({"strength": 0.0, "mode": "img2img"}, r"strength must be in \(0, 1\]"),
        ({"strength": 0.5}, "strength is given, but mode=edit takes none"),
        ({"count": 0}, r"count must be in \[1, 64\]"),
        ({"seed": -1}, r"seed must be in \[0, "),
        ({"size": Size(0, 32)}, "size must be in multiples of 32, got 32x0"),
        ({"size": Size(32, 32), "aspect": "1:1"}, "leave out aspect=1:1"),
        ({"aspect": "5:4"}, "aspect must be one of 1:1, 16:9"),
        ({"prompt": " "}, "mode=edit needs an instruction"),
        ({"mode": "variation"}, "variation takes no instruction"),
        ({"mask": MASK}, "mask is given, but mode=edit takes none: use mode=inpaint or control-inpaint"),
        ({"mode": "inpaint"}, "mode=inpaint needs a mask"),
        ({"mode": "control"}, "mode=control needs at least one control"),
        ({"focus": Focus()}, "use mode=focus"),
    ],
)
def test_wrong_requests_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        request(**values)


@pytest.mark.parametrize("aspect", ASPECTS)
def test_an_aspect_keeps_the_number_of_pixels(aspect):
    size = result_size(request(aspect=aspect), Geometry(1024 * 1024))
    assert 0.85 * 640 * 480 < size.height * size.width <= 640 * 480
    assert abs(size.width / size.height / ASPECTS[aspect] - 1) < 0.1
    assert (size.height % 32, size.width % 32) == (0, 0)


def test_an_adapters_weight_is_a_number():
    with pytest.raises(InputError, match="the weight of adapter must be a number, got nan"):
        AdapterUse(Path("adapter"), math.nan)


def test_a_disc_smaller_than_a_pixel_is_refused():
    with pytest.raises(InputError, match="covers no pixel of 32x64: enlarge it"):
        check_request(request(mode="focus", focus=Focus(radius=0.003)), Size(64, 32))


def test_sizes():
    assert result_size(request(), Geometry(1024 * 1024)) == Size(480, 640)
    assert result_size(request(size=Size(64, 96)), Geometry(1024 * 1024)) == Size(64, 96)
    small = result_size(request(), Geometry(128 * 128))
    assert small.height * small.width <= 128 * 128


@pytest.mark.parametrize(
    ("steps", "sigmas", "note"),
    [
        (1, [1.0], None),
        (4, [1.0, 0.75, 0.5, 0.25], None),
        (2, [1.0, 0.75, 0.5, 0.25], None),
        (3, [1.0, 0.667, 0.333], None),
        (
            3,
            [1.0, 0.75, 0.5, 0.25],
            "the adapter was trained at sigma 1, 0.75, 0.5, 0.25, but 3 steps also visit 0.667, 0.333; 1 or 2 or 4 steps would "
            "not",
        ),
        (2, [0.9], "the adapter was trained at sigma 0.9, but 2 steps also visit 1, 0.5"),
        (7, None, None),
    ],
)
def test_steps_that_visit_untrained_sigmas_are_named(steps, sigmas, note):
    metadata = BRIDGE | ({} if sigmas is None else {"sigmas": json.dumps(sigmas)})
    plan = make_plan(request(adapters=ADAPTER, steps=steps), metadata)
    assert plan.notes == ((note,) if note else ())


def test_flow_matching_has_no_such_notes():
    assert make_plan(request(steps=3), {}).notes == ()
