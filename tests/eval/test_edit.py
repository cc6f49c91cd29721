"""The command that edits one image, and the PNG that says how it was made."""

import re
import shlex
import shutil
import signal
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import typer
from PIL import ExifTags, Image, ImageOps

from data_prep.builders.overlay.style import PARSERS as STYLE
from data_prep.cli import run_command
from data_prep.errors import InputError
from data_prep.model.directory import ModelDirectory
from data_prep.model.geometry import Geometry
from data_prep.rows.images import file_digest, open_image
from eval.edit import edit
from eval.qwen.editor import Editor
from eval.request.knobs import AdapterUse, Control
from eval.request.provenance import read_png, write_png
from eval.request.repeat import read_repeat
from eval.request.request import EditRequest, EditResult
from eval.tables.job_files import JobFiles
from eval.tables.table import COLUMNS, Job
from tests.adapters import write_adapter
from tests.caching import write_image, write_mask
from tests.commands import ROOT, run_script
from tests.tiny_depth import write_depth
from train.record.lookup import find_adapter

SMALL = Geometry(max_pixels=64 * 64, vision_pixels=56 * 56)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model_dir):
    """A photograph, a mask, and the run of a bridge."""
    folder = tmp_path_factory.mktemp("edit")
    write_image(folder / "photo.png", 3, 160, 100)
    write_image(folder / "other.png", 4)
    write_mask(folder / "mask.png", 160, 100)
    checkpoints = folder / "runs/mine/checkpoints"
    write_adapter(checkpoints / "step-000002", tiny_model_dir, "lbm", SMALL, bridge_noise=0.005)
    (checkpoints / "latest").write_text("step-000002\n")
    return folder


@pytest.fixture(autouse=True)
def places(folder, tiny_model_dir, monkeypatch):
    monkeypatch.setenv("MODEL_DIR", str(tiny_model_dir.parent))
    monkeypatch.setenv("CHECKPOINT_DIR", str(folder / "runs"))
    monkeypatch.chdir(folder)


def command(*arguments: object) -> None:
    """The command, in this process."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(edit)
    app([str(argument) for argument in arguments], standalone_mode=False)


def test_the_command_writes_pngs_that_say_how_to_make_them_again(folder, tmp_path):
    arguments = ["eval/edit.py", "--model", "tiny", "--adapter", "mine:0.5", "--image", folder / "photo.png"]
    arguments += [
        "--prompt",
        "déjà vu, 编辑",
        "--steps",
        "2",
        "--seed",
        "1",
        "--count",
        "2",
        "--sampler",
        "bridge-stochastic",
    ]
    done = run_script(*arguments, "--out", tmp_path / "result.png")
    assert f"{tmp_path}/result-1.png: 51x32, 2 steps, seed 1, " in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result-1.png", "result-2.png"]
    settings = read_png(tmp_path / "result-2.png")
    assert settings["notice"] == "edited by a generative model"
    assert (settings["prompt"], settings["seed"], settings["steps"]) == ("déjà vu, 编辑", 2, 2)
    assert settings["sampler"]["bridge_noise"] == 0.005
    assert settings["geometry"] == {"max_pixels": 64 * 64, "vision_pixels": 56 * 56, "reference_pixels": None}
    assert settings["images"] == [{"name": "photo.png", "digest": file_digest(folder / "photo.png")}]
    weights = folder / "runs/mine/checkpoints/step-000002/adapter_model.safetensors"
    assert settings["adapters"] == [{"path": str(weights), "digest": file_digest(weights), "weight": 0.5}]
    assert settings["model_fingerprint"]

    command("--repeat", tmp_path / "result-2.png", "--image", "photo.png", "--out", tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "result-2.png").read_bytes()


def test_steps_that_were_not_trained_are_named_once(folder, tiny_model_dir, tmp_path, capsys):
    """For one edit, and for a table of two rows."""
    adapter = write_adapter(tmp_path / "adapter", tiny_model_dir, "lbm", SMALL, sigmas=[1.0, 0.5])
    note = (
        "note: the adapter was trained at sigma 1, 0.5, but 3 steps also visit 0.667, 0.333; 1 or 2 steps would not\n"
    )
    (tmp_path / "jobs.csv").write_text("image,prompt\nphoto.png,a\nother.png,b\n")
    common = ("--model", "tiny", "--adapter", adapter, "--device", "cpu")
    one, table = ("--image", "photo.png", "--prompt", "x"), ("--csv", tmp_path / "jobs.csv", "--root", folder)
    for what, out in ((one, "result.png"), (table, "results")):
        for steps in (2, 3):
            command(*common, *what, "--steps", steps, "--out", tmp_path / f"{steps}-{out}")
            assert capsys.readouterr().err.count(note) == (steps == 3)


def test_other_tools_can_tell_that_a_model_made_it(folder, tmp_path):
    command(*plain(tmp_path / "result.png"))
    with Image.open(tmp_path / "result.png") as image:
        text = dict(image.text)
    assert text["Software"] == "qwen-image-edit-lora"
    assert text["Comment"] == "edited by a generative model"
    xmp = ElementTree.fromstring(text["XML:com.adobe.xmp"].strip().lstrip("\ufeff"))
    description = next(xmp.iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description"))
    source_type = description.attrib["{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"]
    assert source_type == "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
    assert set(text) == {"Software", "Comment", "XML:com.adobe.xmp", "qwen-image-edit"}


def test_the_result_has_the_shape_of_the_first_image_and_nothing_is_cropped(folder, tmp_path):
    """420 x 280 within 128 x 128 pixels: 160 x 96 is computed, and the picture is its middle."""
    wide = Image.fromarray(np.add.outer(np.arange(280), np.arange(420)).astype(np.uint8)).convert("RGB")
    wide.save(tmp_path / "wide.png")
    base = ["--model", "tiny", "--image", tmp_path / "wide.png", "--prompt", "x", "--steps", 2, "--max-pixels", 128**2]
    base += ["--geometry", "own"]
    command(*base, "--out", tmp_path / "a.png")
    a = read_png(tmp_path / "a.png")
    assert (a["width"], a["height"], a["computed_size"]) == (144, 96, [160, 96])
    command("--repeat", tmp_path / "a.png", "--image", tmp_path / "wide.png", "--out", tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a.png").read_bytes()
    Image.new("L", (420, 280), 0).save(tmp_path / "kept.png")
    with Image.open(tmp_path / "kept.png") as mask:
        mask.paste(255, (0, 0, 4, 4))
        mask.save(tmp_path / "kept.png")
    inpaint = ["--mode", "inpaint", "--mask", tmp_path / "kept.png", "--feather", 0]
    command(*base, *inpaint, "--out", tmp_path / "c.png")
    with Image.open(tmp_path / "c.png") as c:
        kept = np.asarray(c)[4:]
    assert np.array_equal(kept, np.asarray(wide)[4:])  # at its own size
    command(*base, "--size", "160x96", "--out", tmp_path / "d.png")
    d = read_png(tmp_path / "d.png")
    assert (d["width"], d["height"], "computed_size" in d) == (160, 96, False)


def test_a_terminal_sees_the_steps_and_the_time_left(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes any stream for a terminal
    command(*plain(tmp_path / "result.png"), "--count", 3)
    shown = capsys.readouterr().err
    assert "3/3" in shown
    assert "left" in shown


@pytest.mark.parametrize(
    ("what", "answer"),
    [
        (["--image", "photo.png", "--prompt", "x"], "the edit is not kept, and the same command begins it again"),
        (["--csv", "jobs.csv"], "the same command continues where it was"),
    ],
)
def test_ctrl_c_says_whether_the_command_continues(what, answer, folder, tmp_path, monkeypatch, capsys):
    (folder / "jobs.csv").write_text("image,prompt\nphoto.png,x\n")
    monkeypatch.setattr(Editor, "_sample", lambda *_: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr("sys.argv", ["edit.py", "--model", "tiny", *what, "--out", str(tmp_path / "result.png")])
    with pytest.raises(SystemExit) as ended:
        run_command(edit)
    assert ended.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == f"interrupted: {answer}"
    assert not [path for path in tmp_path.glob("**/*.png") if path.is_file()]


def plain(out) -> list[object]:
    return [
        "--model",
        "tiny",
        "--image",
        "photo.png",
        "--prompt",
        "x",
        "--steps",
        1,
        "--max-pixels",
        4096,
        "--out",
        out,
    ]


def test_settings_of_every_mode_reach_the_editor_and_come_back(folder, tmp_path):
    base = ["--model", "tiny", "--image", "photo.png", "--max-pixels", 4096, "--vision-pixels", 3136, "--steps", 2]
    inpaint = [
        "--mode",
        "inpaint",
        "--mask",
        "mask.png",
        "--feather",
        2,
        "--prompt",
        "x",
        "--strength",
        0.5,
        "--vae-tiling",
    ]
    command(*base, *inpaint, "--seed", 5, "--cfg-scale", 2, "--negative-prompt", "dull", "--out", tmp_path / "a.png")
    a = read_png(tmp_path / "a.png")
    assert (a["mode"], a["feather"], a["negative_prompt"], a["seed"]) == ("inpaint", 2.0, "dull", 5)
    assert (a["sampler"]["cfg_scale"], a["sampler"]["strength"]) == (2.0, 0.5)
    assert [each["name"] for each in a["images"]] == ["photo.png", "mask.png"]
    again = ["--image", "photo.png", "--mask", "mask.png"]
    command("--repeat", tmp_path / "a.png", *again, "--out", tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "a.png").read_bytes()
    command("--repeat", tmp_path / "a.png", *again, "--seed", 6, "--out", tmp_path / "other.png")
    assert read_png(tmp_path / "other.png") == a | {"seed": 6}

    focus = ["--mode", "focus", "--focus", "0.25,0.5,0.2", "--prompt", "x", "--cfg-scale", 1]
    command(*base, *focus, "--size", "64x32", "--out", tmp_path / "b.png")
    assert read_png(tmp_path / "b.png")["focus"] == {"x": 0.25, "y": 0.5, "radius": 0.2}
    controls = ["--mode", "control", "--control", "canny:0.5", "--control", "lines", "--prompt", "x", "--cfg-scale", 1]
    command(*base, *controls, "--aspect", "1:1", "--out", tmp_path / "c.png")
    c = read_png(tmp_path / "c.png")
    assert c["controls"] == [{"kind": "canny", "strength": 0.5}, {"kind": "lines", "strength": 1.0}]
    assert c["width"] == c["height"]
    for name in ("b", "c"):
        command("--repeat", tmp_path / f"{name}.png", "--image", "photo.png", "--out", tmp_path / "again.png")
        assert (tmp_path / "again.png").read_bytes() == (tmp_path / f"{name}.png").read_bytes()


def write_odd(path) -> None:
    """A photograph of 161 x 99 as the ending of its name says: turned by EXIF, transparent, or with 16 bits of grey."""
    values = np.random.default_rng(7).integers(0, 256, (99, 161, 4), dtype=np.uint8)
    image = Image.fromarray(values)
    if path.stem == "turned":
        turned = Image.Exif()
        turned[ExifTags.Base.Orientation] = 6
        image.convert("RGB").save(path, exif=turned, quality=95)
    elif path.stem == "grey16":
        Image.fromarray(values[..., 0].astype(np.uint16) * 257 + 3).save(path)
    else:
        (image if path.stem == "clear" else image.convert("RGB")).save(path)


@pytest.mark.parametrize("name", ["odd.png", "turned.jpg", "clear.png", "grey16.png"])
def test_every_pixel_outside_a_mask_is_the_files_own(tmp_path, name):
    """At the file's own size: upright, with its transparency; of 16 bits the 8 that everything here is read with."""
    file, out = tmp_path / name, tmp_path / "out.png"
    write_odd(file)
    own = ImageOps.exif_transpose(Image.open(file)) if name != "grey16.png" else open_image(file)
    mask = np.zeros((own.height, own.width), dtype=np.uint8)
    mask[20 : own.height // 2, 30:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    base = ["--image", file, "--mask", tmp_path / "mask.png"]
    knobs = ["--mode", "inpaint", "--prompt", "x", "--steps", 2, "--max-pixels", 4096, "--vision-pixels", 3136]
    command("--model", "tiny", *base, *knobs, "--feather", 2, "--out", out)
    with Image.open(out) as made:
        assert (made.size, made.mode) == (own.size, own.mode)
        before, after = np.asarray(own).astype(int), np.asarray(made).astype(int)
    assert (before == after)[mask == 0].all()
    assert np.abs(before - after)[25 : own.height // 2 - 5, 35:].mean() > 5
    if name == "clear.png":
        command("--repeat", out, *base, "--out", tmp_path / "again.png")
        assert (tmp_path / "again.png").read_bytes() == out.read_bytes()


def test_every_solver_is_a_sampler_of_the_command(folder, tmp_path):
    """Heun by the option, the others by a cell of the table that the command edits: none gives Euler's picture."""
    solvers = {"flow": "euler", "heun": "heun", "dpmpp-2m": "dpmpp-2m", "unipc": "unipc"}
    cells = "".join(f"{name},{'' if name == 'heun' else name},photo.png\n" for name in solvers)
    (tmp_path / "jobs.csv").write_text(f"id,sampler,image\n{cells}")
    table = ["--csv", tmp_path / "jobs.csv", "--root", folder, "--sampler", "heun", "--out", tmp_path / "out"]
    command("--model", "tiny", *table, "--prompt", "x", "--size", "64x64", "--steps", 5, "--cfg-scale", 8)
    pixels = {}
    for name, solver in solvers.items():
        (path,) = (tmp_path / "out").glob(f"{name}-*.png")
        sampler = read_png(path)["sampler"]
        assert (sampler["kind"], sampler["solver"]) == (name, solver)
        with Image.open(path) as image:
            pixels[name] = image.tobytes()
    assert [name for name, each in pixels.items() if each == pixels["flow"]] == ["flow"]


@pytest.mark.parametrize("scale", [0.5, 2])
def test_a_mask_of_another_size_is_brought_to_the_images(folder, tmp_path, monkeypatch, scale):
    """By one image and by a table. One white pixel of it is a white part of the image, at its rim too."""
    values = np.zeros((int(100 * scale), int(160 * scale)), dtype=np.uint8)
    values[0, -1] = 255
    Image.fromarray(values).save(tmp_path / "mask.png")
    asked = []
    monkeypatch.setattr(Editor, "edit", lambda _, request, *__: asked.append(request) or [])
    common = ["--model", "tiny", "--mode", "inpaint", "--prompt", "x", "--out"]
    with pytest.raises(ValueError, match="zip"):  # there is no picture to write
        command(*common, tmp_path / "out.png", "--image", "photo.png", "--mask", tmp_path / "mask.png")
    expected = np.zeros((100, 160), dtype=np.uint8)
    expected[: max(1, int(1 / scale)), -max(1, int(1 / scale)) :] = 255
    row = Job(1, "x", (folder / "photo.png",), "x", {"prompt": "x", "mode": "inpaint"}, tmp_path / "mask.png")
    for request in (*asked, JobFiles(lambda _: {}).load(row)):
        assert np.array_equal(np.asarray(request.mask), expected)


def test_the_sizes_that_a_picture_was_made_at_are_repeated(folder, tmp_path):
    base = ["--image", "photo.png", "--prompt", "x", "--steps", 1, "--cfg-scale", 1]
    limits = ["--model", "tiny", "--max-pixels", 4096, "--vision-pixels", 3136]
    shapes = {}
    for name, more in (
        ("none", ()),
        ("own", ("--geometry", "own")),
        ("size", ("--geometry", "upstream", "--size", "80x48")),
    ):
        out = tmp_path / f"{name}.png"
        command(*limits, *base, *more, "--out", out)
        settings = read_png(out)
        shapes[name] = settings["width"], settings["height"], settings["geometry"].get("kind")
        command("--repeat", out, "--image", "photo.png", "--out", tmp_path / "again.png")
        assert (tmp_path / "again.png").read_bytes() == out.read_bytes()
    assert shapes["none"] == (96, 64, "upstream")  # of about 4096 pixels: 80.95 x 50.6
    assert shapes["own"] == (51, 32, None)  # all of 160 x 100 within 64 x 32
    assert shapes["size"] == (80, 48, "upstream")
    assert read_repeat(tmp_path / "own.png", {"sizing": "upstream"}).knobs.get("geometry") is None


def test_a_picture_is_repeated_with_its_own_images_alone(folder, tmp_path):
    command(*plain(tmp_path / "result.png"))
    before = (tmp_path / "result.png").read_bytes()
    repeat = ["--repeat", tmp_path / "result.png", "--out", tmp_path / "again.png"]
    with pytest.raises(InputError, match=r"made from 1 image\(s\), which --image does not match"):
        command(*repeat, "--image", "other.png")
    with pytest.raises(InputError, match="another --mask, or with none"):
        command(*repeat, "--image", "photo.png", "--mask", "mask.png")
    with pytest.raises(InputError, match=r"photo.png does not say how it was made"):
        command("--repeat", "photo.png", "--image", "photo.png", "--out", tmp_path / "again.png")
    image = np.array(Image.open("photo.png"))
    Image.fromarray(image).save(tmp_path / "copy.webp", lossless=True)  # the same pixels under another name
    command(*repeat, "--image", tmp_path / "copy.webp")
    with Image.open(tmp_path / "again.png") as again, Image.open(tmp_path / "result.png") as first:
        assert np.array_equal(np.array(again), np.array(first))
    assert (tmp_path / "result.png").read_bytes() == before


def test_what_the_edit_is_made_of_is_never_overwritten(folder, tmp_path):
    for name in ("photo.png", "mask.png"):
        shutil.copy(folder / name, tmp_path / name)
    shutil.copy(folder / "photo.png", tmp_path / "photo-2.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "photo.png")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    base = ["--model", "none", "--prompt", "x", "--mask", tmp_path / "mask.png", "--image"]
    for name, image, *more in (
        ("photo.png", "photo.png"),
        ("link.png", "photo.png"),
        ("mask.png", "photo.png"),
        ("photo.png", "photo-2.png", "--count", 2),
    ):
        with pytest.raises(InputError, match=r"--out .* would overwrite .*, which the edit is made of"):
            command(*base, tmp_path / image, *more, "--out", tmp_path / name)
    command(*plain(tmp_path / "result.png"))
    with pytest.raises(InputError, match=r"would overwrite .*result.png"):
        command("--repeat", tmp_path / "result.png", "--image", "photo.png", "--out", tmp_path / "result.png")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "result.png"} == before


def test_a_depth_model_is_part_of_what_a_picture_says(folder, tmp_path, monkeypatch):
    """Else a table would take pictures of another depth model for done, and --repeat would make another picture."""
    first, second = (write_depth(tmp_path / f"depth{seed}", seed=seed) for seed in range(2))
    shown = ["--mode", "control", "--control", "depth", "--cfg-scale", 1]
    monkeypatch.setenv("DEPTH_MODEL", str(first))
    command(*plain(tmp_path / "a.png"), *shown)
    assert read_png(tmp_path / "a.png")["depth_model"]["path"] == str(first)
    monkeypatch.delenv("DEPTH_MODEL")
    again = ["--repeat", tmp_path / "a.png", "--image", "photo.png", "--out", tmp_path / "again.png"]
    command(*again)
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "a.png").read_bytes()
    with pytest.raises(InputError, match="made with another depth model"):
        command(*again, "--depth-model", second)
    command(*again, "--depth-model", second, "--mode", "edit")
    assert "depth_model" not in read_png(tmp_path / "again.png")

    (tmp_path / "jobs.csv").write_text("id,image,mode,control\ndepth,photo.png,control,depth\nno,photo.png,edit,\n")
    found = []
    for model in (first, second):
        monkeypatch.setenv("DEPTH_MODEL", str(model))
        table = ["--csv", tmp_path / "jobs.csv", "--root", folder, "--model", "tiny", "--prompt", "x", "--steps", 1]
        command(*table, "--max-pixels", 4096, "--cfg-scale", 1, "--out", tmp_path / "out")
        found.append(sorted(path.name for path in (tmp_path / "out").glob("*.png")))
    assert [len(names) for names in found] == [2, 3]
    write_depth(first, seed=2)
    with pytest.raises(InputError, match="made with another depth model"):
        command(*again)


def test_a_repeat_with_another_mode_or_adapter_keeps_what_that_takes(folder, tiny_model_dir, tmp_path):
    base = ["--image", "photo.png", "--prompt", "x", "--steps", 6, "--max-pixels", 4096, "--model", "tiny"]
    command(*base, "--mode", "img2img", "--strength", 0.5, "--cfg-scale", 2, "--out", tmp_path / "img2img.png")
    command(*base, "--mode", "inpaint", "--mask", "mask.png", "--cfg-scale", 1, "--out", tmp_path / "inpaint.png")
    command(*base, "--adapter", "mine", "--out", tmp_path / "bridge.png")
    editor = Editor(ModelDirectory(tiny_model_dir))
    image, mask = Image.open("photo.png").convert("RGB"), Image.open("mask.png").convert("L")
    bridge = (AdapterUse(find_adapter("mine")),)
    flow = (AdapterUse(write_adapter(tmp_path / "flow", tiny_model_dir, "flow", SMALL)),)

    def repeated(name: str, mask: Image.Image | None = None, **changes: Any) -> EditRequest:
        made = read_repeat(tmp_path / f"{name}.png", changes)
        made.check_images([image], mask)
        request = EditRequest(images=[image], mask=mask, **made.knobs)
        editor.check(request)
        return request

    def numbers(request: EditRequest) -> tuple[Any, ...]:
        return request.strength, request.steps, request.cfg_scale, request.sampler

    assert numbers(repeated("img2img")) == (0.5, 6, 2.0, "flow")
    assert numbers(repeated("img2img", mode="edit")) == (None, 6, 2.0, "flow")
    assert numbers(repeated("img2img", mode="variation", prompt="")) == (0.5, 6, 2.0, "flow")
    assert numbers(repeated("img2img", mode="variation")) == (0.5, 6, 2.0, "flow")
    assert numbers(repeated("img2img", mode="invert")) == (None, None, None, None)
    assert numbers(repeated("img2img", mask, mode="inpaint")) == (None, 6, 2.0, "flow")
    assert numbers(repeated("img2img", mode="turbo", adapters=bridge)) == (None, None, None, None)
    assert numbers(repeated("inpaint", mode="focus")) == (1.0, 6, 1.0, "flow")
    assert numbers(repeated("inpaint", mask, adapters=bridge)) == (None, None, None, None)
    assert numbers(repeated("inpaint", mask, adapters=flow)) == (1.0, 6, 1.0, "flow")
    assert numbers(repeated("bridge", adapters=flow)) == (None, None, None, None)
    weaker = (AdapterUse(bridge[0].path, 0.5),)
    assert numbers(repeated("bridge", adapters=weaker)) == (None, 6, None, "bridge")
    with pytest.raises(InputError, match="another --mask, or with none"):
        repeated("inpaint", mode="control-inpaint", controls=(Control("canny"),))
    with pytest.raises(InputError, match="needs a mask"):
        repeated("img2img", mode="inpaint")


def test_a_strength_that_counted_steps_is_not_taken_for_a_share_of_noise(tiny_model_dir, tmp_path):
    """Of a picture that was written before solvers had names."""
    sampler = {"name": "FlowSampler", "kind": "flow", "cfg_scale": 4.0, "strength": 0.6}
    settings = {"mode": "img2img", "prompt": "x", "seed": 0, "steps": 4, "width": 64, "height": 32, "sampler": sampler}
    settings |= {"geometry": {"max_pixels": 4096}, "adapters": [], "model": "tiny", "dtype": "float32"}
    settings |= {"image_digests": [], "model_fingerprint": ""}
    write_png(EditResult(Image.new("RGB", (64, 32)), 0, 1.0, settings), [], tmp_path / "old.png")
    with pytest.raises(InputError, match=r"strength of .*old\.png, 0\.6, counted steps.* give --strength"):
        read_repeat(tmp_path / "old.png", {})
    bridge = (AdapterUse(write_adapter(tmp_path / "bridge", tiny_model_dir, "lbm", SMALL)),)
    for left in ({"mode": "edit"}, {"mode": "edit", "adapters": bridge}):  # neither takes a strength
        assert read_repeat(tmp_path / "old.png", left).knobs.get("strength") is None
    assert "strength" not in read_repeat(tmp_path / "old.png", {"adapters": bridge}).knobs
    assert read_repeat(tmp_path / "old.png", {"strength": 0.75}).knobs["strength"] == 0.75
    sampler["strength"] = 1.0
    write_png(EditResult(Image.new("RGB", (64, 32)), 0, 1.0, settings), [], tmp_path / "whole.png")
    assert read_repeat(tmp_path / "whole.png", {}).knobs["strength"] == 1.0


def test_another_model_is_found_before_its_weights_are_read(folder, tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    arguments = plain(tmp_path / "result.png")
    command(*arguments[:1], tmp_path / "model", *arguments[2:])
    settings = read_png(tmp_path / "result.png")
    assert settings["model_fingerprint"] == Editor(ModelDirectory(tiny_model_dir)).fingerprint
    with open(tmp_path / "model/tokenizer/tokenizer_config.json", "a") as file:
        file.write(" ")
    for weights in (tmp_path / "model/text_encoder").glob("*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match=f"made with a different model from the one in {tmp_path}/model now"):
        command("--repeat", tmp_path / "result.png", "--image", "photo.png", "--out", tmp_path / "again.png")


def test_settings_that_json_cannot_hold_are_not_written(tmp_path):
    result = EditResult(Image.new("RGB", (8, 8)), 0, 1.0, {"strength": float("nan")})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_png(result, [], tmp_path / "result.png")
    assert not (tmp_path / "result.png").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--image", "missing.png"], "missing.png: no such file"),
        (["--image", "mask.png", "--image", "mask.png", "--image", "mask.png"], "1 to 3 images, got 4"),
        (["--adapter", "runs/none"], "no adapter at runs/none or"),
        (["--model", "none"], "no model at none"),
        (["--mask", "mask.png"], "mask is given, but mode=edit takes none"),
        (["--mode", "inpaint"], "mode=inpaint needs a mask"),
        (["--mode", "inpaint", "--mask", "other.png"], "other.png: the mask and its image have different shapes"),
        (["--mode", "focus", "--focus", "2,0,0.1"], r"focus x must be in \[0, 1\], got 2.0"),
        (["--mode", "control", "--control", "cany"], "a control is one of canny, lines, depth, got 'cany'"),
        (["--adapter", "mine", "--cfg-scale", "3"], r"without guidance: leave out cfg_scale=3\.0"),
        (["--size", "64x65"], "multiples of 32, got 64x65"),
        (["--steps", "1000000000"], r"steps must be in \[1, 1000\], got 1000000000"),
        (["--prompt", "x" * 10_001], "prompt has 10,001 characters, at most 10,000 are taken"),
        (["--max-pixels", "99999999"], "max_pixels must be at most 16,777,216, got 99,999,999"),
        (["--steps", "0"], r"steps must be in \[1, 1000\], got 0"),
        (["--prompt", " "], "mode=edit needs an instruction"),
        (["--device", "gpu"], "there is no device 'gpu'"),
        (["--out", "result.jpg"], "--out must end in .png"),
        (["--out", "photo.png/result.png"], "photo.png is not a folder that you may write to"),
        (["--batch-size", "2", "--on-error", "skip"], "--batch-size, --on-error is only for tables: add --csv"),
        (["--csv", "jobs.csv"], "leave out --image"),
    ],
)
def test_wrong_input_is_a_sentence_and_leaves_nothing(folder, changes, message):
    before = sorted(folder.rglob("*"))
    with pytest.raises((InputError, typer.BadParameter), match=message) as error:
        command("--model", "tiny", "--image", "photo.png", "--prompt", "x", "--out", "new/result.png", *changes)
    assert "\n" not in str(error.value)
    assert sorted(folder.rglob("*")) == before


def test_wrong_input_is_exit_code_2(folder):
    done = run_script("eval/edit.py", "--model", "tiny", "--prompt", "x", "--size", "2", "--out", "r.png", check=False)
    assert done.returncode == 2
    assert "--size" in done.stderr
    assert "must look like 768x512, got '2'" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_no_picture_of_ours_is_said(tmp_path):
    (tmp_path / "text.png").write_text("x")
    with pytest.raises(InputError, match=r"text.png is not a readable PNG"):
        read_png(tmp_path / "text.png")
    with pytest.raises(InputError, match=r"gone.png: no such file"):
        read_png(tmp_path / "gone.png")


def test_every_command_of_the_docs_runs(folder, tiny_model_dir, tmp_path, monkeypatch):
    text = (ROOT / "docs/editing.md").read_text(encoding="utf-8")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CHECKPOINT_DIR")
    (tmp_path / "note.txt").write_text("a note")
    (tmp_path / "jobs.csv").write_text(re.findall(r"```csv\n(.*?)```", text, re.DOTALL)[0])
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    for line in lines:
        words = shlex.split(line.replace("models/tiny", str(tiny_model_dir)).partition("eval/edit.py ")[2])
        quick = [] if "--repeat" in words else ["--max-pixels", "4096", "--vision-pixels", "3136", "--steps", "2"]
        command(*words, *quick)
    made = ["again.png", "another.png", "result.png", "variation-1.png", "variation-2.png", "variation-3.png"]
    assert all((tmp_path / name).is_file() for name in made)
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "result.png").read_bytes()
    assert (tmp_path / "results/results.csv").read_text().count("\n") == 3
    documented = {
        name for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    assert set(COLUMNS) - {"image_2", "image_3", *STYLE} <= documented
