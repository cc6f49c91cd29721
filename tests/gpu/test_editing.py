"""Every mode, placement and weight format, a table and the page's handler, on each device against the CPU's pictures."""

import csv
import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
import torch
import typer
from PIL import Image

from data_prep.model.directory import ModelDirectory
from data_prep.model.geometry import Geometry, Size
from data_prep.rows.images import open_image
from eval.edit import edit
from eval.page.studio import Studio
from eval.page.tabs.edit_tab import connect_edit
from eval.page.tabs.form import AS_SOURCE
from eval.page.tabs.knob_fields import AUTOMATIC
from eval.qwen.editor import Editor
from eval.request.knobs import MODES, AdapterUse, Control, Focus
from eval.request.placement import Placement
from eval.request.request import EditRequest
from scripts.bench.memory import write_gguf
from tests.adapters import write_adapter
from tests.caching import write_image
from tests.gpu.tier import CPU, on_devices
from tests.tiny_depth import write_depth
from tests.train.model.test_adapter import fresh, trained
from train.model import execution
from train.model.denoiser import load_denoiser

pytestmark = [  # as of test_training.py
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore::Warning:torch._inductor"),
]

SMALL = Geometry(max_pixels=64 * 64, vision_pixels=56 * 56)
LEVELS = 2
"""Of 255, where everything is float32: sums in another order tip an 8-bit pixel to its neighbour, and so do two of them."""
BF16 = 38.0
"""dB between pictures that are computed in bfloat16 and in float32, at the least. Measured on the CPU: 41 to 49."""
ROUNDED = {"int8": 46.0, "fp8": 36.0, "nf4": 25.0, "gguf": 44.0}
"""dB between pictures of rounded and of full weights, at the least. Measured on the CPU: 52, 40, 28 and 49. Three dB are a
factor of 1.4 in the error."""
ROUNDED_IN_BF16 = {"int8": 35.0, "fp8": 32.0, "nf4": 25.0, "gguf": 36.0}
"""The same, computed in bfloat16: 38, 36, 28 and 40. A GPU that multiplies int8 and fp8 rounds activations as it does weights."""
LOW = "eval/qwen/weights/test_low_memory.py::"
EDITOR = "eval/qwen/test_editor.py::"
COMPILED = "eval/qwen/weights/test_compiled.py::test_compiled_blocks_with_adapters"


@dataclass(frozen=True)
class Workshop:
    """What edits are made with."""

    model: ModelDirectory
    bridge: Path
    flow: Path
    dora: Path
    gguf: Path
    depth: str
    photo: Path

    @property
    def source(self) -> Image.Image:
        """A picture of 64 x 96 pixels."""
        return open_image(self.photo)

    @functools.cache  # noqa: B019 (one workshop a session)
    def editor(self, placement: Placement) -> Editor:
        """Loads when it first edits."""
        return Editor(self.model, placement, SMALL, self.depth)

    def placed(self, device: torch.device, options: dict[str, Any]) -> Placement:
        """In float32 unless the options say otherwise; a GGUF file where they name that format."""
        options = {"dtype": torch.float32} | options
        if options.get("weights") == "gguf":
            options = options | {"weights": "full", "gguf": self.gguf}
        return Placement(device, **options)

    def edits(self, placement: Placement) -> list[Image.Image]:
        """A bridge, the base model, a flow adapter at half its weight, and the bridge again: adapters go on and off."""
        made: list[dict[str, Any]] = [{"adapters": (AdapterUse(self.bridge),)}, {}]
        made += [{"adapters": (AdapterUse(self.flow, 0.5),)}, made[0]]
        editor = self.editor(placement)
        return [editor.edit(EditRequest("make it blue", [self.source], steps=2, **values))[0].image for values in made]


@pytest.fixture(scope="module")
def workshop(tiny_model_dir, tmp_path_factory) -> Workshop:
    folder = tmp_path_factory.mktemp("workshop")
    model = ModelDirectory.resolve(tiny_model_dir)
    trained(fresh(tiny_model_dir), dora=True).export(folder / "dora", {"objective": "flow"})
    write_gguf(load_denoiser(model, dtype=torch.float32).dit.state_dict(), folder / "tiny.gguf")
    return Workshop(
        model,
        write_adapter(folder / "runs/bridge/checkpoints/step-000002", tiny_model_dir, "lbm", SMALL, bridge_noise=0.005),
        write_adapter(folder / "runs/flow/checkpoints/step-000002", tiny_model_dir, "flow", SMALL),
        folder / "dora",
        folder / "tiny.gguf",
        str(write_depth(folder)),
        folder / write_image(folder / "photo.png", 3, 96, 64),
    )


@pytest.fixture(autouse=True)
def stands_for_a_gpu(request, monkeypatch):
    """The CPU streams blocks to itself, which `Placement` refuses to do for a user, and runs what it has traced as it is: the
    compiler would take a minute."""
    if request.node.callspec.params["device"] == CPU:
        monkeypatch.setattr(Placement, "_check_offload", lambda self: None)
        monkeypatch.setattr(execution, "Compiled", functools.partial(execution.Compiled, backend="aot_eager"))


def levels(mine: Image.Image, theirs: Image.Image) -> int:
    """The largest difference of two pixels."""
    assert mine.size == theirs.size
    return int(np.abs(np.asarray(mine, dtype=int) - np.asarray(theirs, dtype=int)).max())


def decibels(mine: Image.Image, theirs: Image.Image) -> float:
    """PSNR; infinite if they are the same."""
    error = np.mean((np.asarray(mine, dtype=float) - np.asarray(theirs, dtype=float)) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def mask() -> Image.Image:
    """The right half may be edited."""
    mask = Image.new("L", (96, 64), 0)
    mask.paste(255, (48, 0, 96, 64))
    return mask


@dataclass(frozen=True)
class Mode:
    """Fields of a request."""

    twin: str
    values: dict[str, Any] = field(default_factory=dict)
    adapter: str | None = None


MAPS = (Control("canny"), Control("depth", 0.5))
WAYS = {
    "edit": Mode(EDITOR + "test_a_seed_gives_the_same_picture_for_any_count_and_order", {"count": 2, "cfg_scale": 3.0}),
    "img2img": Mode(EDITOR + "test_img2img_stays_nearer_with_less_strength"),
    "variation": Mode(EDITOR + "test_variation_takes_no_instruction", {"prompt": ""}),
    "inpaint": Mode(EDITOR + "test_inpaint_keeps_every_pixel_that_the_mask_keeps", {"mask": mask()}),
    "focus": Mode(EDITOR + "test_focus_changes_a_disc", {"focus": Focus(0.25, 0.5, 0.3)}),
    "control": Mode("", {"controls": MAPS}),
    "control-inpaint": Mode(EDITOR + "test_control_inpaint_has_both", {"controls": MAPS, "mask": mask()}),
    "invert": Mode(EDITOR + "test_invert_edits_more_with_more_strength_and_draws_nothing", {"steps": 4}),
    "turbo": Mode(EDITOR + "test_turbo_is_four_steps_without_guidance", {}, "flow"),
    "bridge": Mode(EDITOR + "test_prompt_adapters_and_weights_decide_the_picture", {}, "bridge"),
    **{
        name: Mode(
            EDITOR + "test_prompt_adapters_and_weights_decide_the_picture", {"mode": "edit", "sampler": name}, "bridge"
        )
        for name in ("bridge-white", "bridge-stochastic")
    },
}


@on_devices({name: way.twin for name, way in WAYS.items()})
def test_modes(workshop, device, name):
    assert set(MODES) <= WAYS.keys()
    way = WAYS[name]
    adapters = (AdapterUse(getattr(workshop, way.adapter)),) if way.adapter else ()
    values = {"prompt": "make it blue", "steps": 2, "mode": name if name in MODES else "edit", **way.values}
    request = EditRequest(images=[workshop.source], adapters=adapters, **values)
    # one that has edited otherwise, and one that has not
    found, expected = (
        editor.edit(request)
        for editor in (
            workshop.editor(workshop.placed(device, {})),
            Editor(workshop.model, workshop.placed(CPU, {}), SMALL, workshop.depth),
        )
    )
    for mine, theirs in zip(found, expected, strict=True):
        assert levels(mine.image, theirs.image) <= LEVELS
        assert (
            levels(mine.image, workshop.source.resize(mine.image.size)) > 10 * LEVELS
        )  # there is something to get wrong
        assert [levels(a, b) <= LEVELS for a, b in zip(mine.maps, theirs.maps, strict=True)] == [True] * len(mine.maps)


@dataclass(frozen=True)
class Place:
    """Options of a placement. On the CPU its pictures are as near to those of full float32 as `rounding` says, in dB; on a GPU
    within LEVELS of its own on the CPU, or as near as `bound` says."""

    options: dict[str, Any]
    twin: str
    rounding: float | None = None
    bound: float | None = None


IN_BF16 = {"dtype": torch.bfloat16}
PLACES = {
    "none": Place({}, LOW + "test_only_what_is_used_is_loaded"),
    "model": Place({"offload": "model"}, LOW + "test_model_offload_has_one_part_at_a_time"),
    "layer": Place({"offload": "layer"}, LOW + "test_streamed_layers"),
    "encoders": Place({"encoder_device": CPU}, LOW + "test_encoders_on_another_device"),
    "compiled": Place({"compile": True}, COMPILED),
    "compiled-layer": Place({"compile": True, "offload": "layer"}, COMPILED),
    "bf16": Place(IN_BF16, "", BF16, BF16),
    **{
        f"{weights}{'-' * bool(offload)}{offload}": Place(
            {"weights": weights, "offload": offload or "none"}, LOW + "test_streamed_layers", bound
        )
        for weights, bound in ROUNDED.items()
        for offload in ("", "model", "layer")
    },
    # int8 and fp8 are multiplied as they are there, and round activations too
    **{
        f"{weights}-bf16": Place(IN_BF16 | {"weights": weights}, LOW + "test_quantised_weights", bound, bound)
        for weights, bound in ROUNDED_IN_BF16.items()
    },
}


@on_devices({name: place.twin for name, place in PLACES.items()})
def test_placements(workshop, device, name, capsys):
    place = PLACES[name]
    found = workshop.edits(workshop.placed(device, place.options))
    if "compile" in place.options:
        torch._dynamo.reset()
        said = capsys.readouterr().err
        assert "compiled a block in" in said
        assert "without torch.compile" not in said
    if device == CPU:
        expected, bound = workshop.edits(workshop.placed(CPU, {})), place.rounding
    else:
        still = {key: value for key, value in place.options.items() if key not in ("offload", "compile")}
        expected, bound = workshop.edits(workshop.placed(CPU, still)), place.bound
    assert levels(found[0], found[3]) == 0  # the same adapter again is the same picture
    assert levels(found[0], found[1]) > LEVELS
    for mine, theirs in zip(found, expected, strict=True):
        if bound is None:
            assert levels(mine, theirs) <= LEVELS
        else:
            assert decibels(mine, theirs) > bound


@on_devices({"": LOW + "test_streamed_layers"})
def test_dora_in_layers_that_come(workshop, device, name):
    """Whose lengths are taken of the whole weight, when it has come."""
    request = EditRequest("make it blue", [workshop.source], adapters=(AdapterUse(workshop.dora),), steps=2)
    found, expected, plain = (
        workshop.editor(workshop.placed(where, options)).edit(each)[0].image
        for where, options, each in (
            (device, {"offload": "layer"}, request),
            (CPU, {}, request),
            (CPU, {}, replace(request, adapters=())),
        )
    )
    assert levels(found, expected) <= LEVELS
    assert levels(plain, expected) > 2 * LEVELS


@on_devices(dict.fromkeys(("none", "model", "layer"), EDITOR + "test_preload_loads_what_the_first_edit_needs"))
def test_preload(workshop, device, name):
    """The first edit reads nothing more."""
    if (device, name) == (CPU, "model"):
        pytest.skip("on a CPU parts are freed and not moved, so this is refused")
    adapters = (AdapterUse(workshop.bridge),)
    editor = Editor(workshop.model, workshop.placed(device, {"offload": name}), SMALL)
    editor.preload(adapters)
    assert editor.components.loaded == {"vae", "prompt_encoder", "denoiser"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelDirectory, "tensors", None)
        patch.setattr("eval.qwen.weights.components.read_file", None)
        request = EditRequest("make it blue", [workshop.source], adapters=adapters, steps=2)
        found = editor.edit(request)[0].image
    assert levels(found, workshop.editor(workshop.placed(CPU, {})).edit(request)[0].image) <= LEVELS


@on_devices({"": LOW + "test_tiles_have_no_seams"})
def test_tiles(workshop, device, name):
    """Two of 512 pixels."""
    request = EditRequest("x", [workshop.source], adapters=(AdapterUse(workshop.bridge),), steps=1, size=Size(32, 544))
    whole, *tiled = (
        workshop.editor(workshop.placed(where, {"vae_tiling": tiling})).edit(request)[0].image
        for where, tiling in ((CPU, False), (CPU, True), (device, True))
    )
    assert levels(*tiled) <= LEVELS
    assert levels(whole, tiled[0]) > 0


TABLES = {
    "": "test_good_rows_are_done_and_bad_ones_listed",
    "windows": "test_an_offloaded_model_is_moved_once_a_window",
}


@on_devices({name: f"eval/tables/test_tables.py::{twin}" for name, twin in TABLES.items()})
def test_a_table(workshop, device, name, tmp_path):
    """By the command: two rows in one batch, and one by itself in another mode; with parts that move, in two windows."""
    moved = ["--offload", "model", "--window", 2] if name else []
    found, expected = (
        read_table(run_table(workshop, each, tmp_path / folder, more))
        for each, folder, more in ((device, "mine", moved), (CPU, "theirs", []))
    )
    assert found.keys() == expected.keys()
    assert len(found) == 3
    for key, picture in found.items():
        assert levels(picture, expected[key]) <= LEVELS


def run_table(workshop: Workshop, device: torch.device, out: Path, more: list[Any]) -> Path:
    """Edits the rows; returns the folder."""
    out.mkdir()
    table = out / "jobs.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "image", "prompt", "mode", "seed"])
        writer.writeheader()
        for key, prompt, mode in (
            ("a", "brighten", "edit"),
            ("b", "make it a little darker", "edit"),
            ("c", "blue", "focus"),
        ):
            writer.writerow({"id": key, "image": workshop.photo.name, "prompt": prompt, "mode": mode, "seed": 7})
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(edit)
    words = ["--csv", table, "--root", workshop.photo.parent, "--model", workshop.model.path, "--out", out / "results"]
    words += ["--device", device, "--dtype", "float32", "--steps", 2, "--cfg-scale", 1, "--batch-size", 2]
    words += ["--max-pixels", SMALL.max_pixels, "--vision-pixels", SMALL.vision_pixels, *more]
    app([str(word) for word in words], standalone_mode=False)
    return out / "results"


def read_table(folder: Path) -> dict[str, Image.Image]:
    """The picture of each row."""
    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    column = next(
        name for name in rows[0] if all(row[name].endswith(".png") and (folder / row[name]).exists() for row in rows)
    )
    return {row["id"]: open_image(folder / row[column]) for row in rows}


@on_devices({"": "eval/test_app.py::test_ctrl_enter_edits_with_the_adapter_and_the_download_says_how"})
def test_the_pages_handler(workshop, device, name, tmp_path):
    """What the button calls, with the form as it opens, a source, an instruction and an adapter."""
    found, expected = (
        press(workshop, workshop.editor(workshop.placed(each, {})), tmp_path / folder)
        for each, folder in ((device, "mine"), (CPU, "theirs"))
    )
    assert levels(found, expected) <= LEVELS


def press(workshop: Workshop, editor: Editor, out: Path) -> Image.Image:
    """The picture that it shows. The form's fields stand for themselves, and nothing is served."""
    studio = Studio(editor, "a test", out, workshop.photo.parent / "runs")
    adapter = next(each.name for each in studio.adapters() if each.path.is_relative_to(workshop.bridge))
    values = {
        "mode": "edit",
        "source": str(workshop.photo),
        "reference_1": None,
        "reference_2": None,
        "seed": 0,
        "count": 1,
    }
    values |= {
        "prompt": "make it blue",
        "negative_prompt": "",
        "adapter": adapter,
        "weight": 1,
        "steps": 2,
        "cfg_scale": 0,
    }
    values |= {"sampler": AUTOMATIC, "sizing": AUTOMATIC, "shape": AS_SOURCE, "strength": 0.6}
    run, select = Recorder(), Recorder()
    outcome = SimpleNamespace(
        parts=[], status=None, slider=None, download=None, settings=None, details=None, pictures=None, source=None
    )
    outcome.gallery = SimpleNamespace(select=select)
    buttons = SimpleNamespace(run=SimpleNamespace(click=run), cancel=SimpleNamespace(click=Recorder()))
    connect_edit(studio, {name: name for name in values}, outcome, buttons)
    *_, shown = run.handler(values, gr.Request(session_hash="someone"))  # after the progress
    (picture,) = shown[-3]
    return open_image(picture.path)


class Recorder:
    """Keeps the handler that it is given."""

    def __call__(self, handler: Callable[..., Any], *_: Any, **__: Any) -> None:
        self.handler = handler
