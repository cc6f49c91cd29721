"""The editor, and the command that edits one image."""

import json

import pytest
import torch
from PIL import Image, ImageChops

from data_prep.errors import InputError
from data_prep.geometry import Geometry, Size
from data_prep.images import open_image
from data_prep.model_dir import ModelDirectory
from data_prep.records import CacheReader
from eval.editor import Editor, EditRequest
from eval.metadata import DEFAULT_GEOMETRY, choose_sampler, trained_geometry
from eval.samplers import BridgeSampler, FlowSampler
from tests.adapters import write_adapter
from tests.caching import GEOMETRY, cache_dataset, write_dataset, write_image, write_rows
from tests.commands import run_script

SMALL = Geometry(max_pixels=64 * 64, vision_pixels=56 * 56)


@pytest.fixture(scope="module")
def bridge(tmp_path_factory, tiny_model_dir):
    return write_adapter(tmp_path_factory.mktemp("bridge"), tiny_model_dir, "lbm", SMALL, bridge_noise=0.005)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("picture")
    return folder / write_image(folder / "photo.png", 3, 160, 100)


@pytest.fixture(scope="module")
def editor(tiny_model_dir, bridge):
    return Editor(ModelDirectory.resolve(tiny_model_dir), bridge, dtype=torch.float32)


@pytest.fixture(scope="module")
def flow_editor(tiny_model_dir):
    return Editor(ModelDirectory.resolve(tiny_model_dir), dtype=torch.float32, geometry=SMALL)


def settings_of(path) -> dict:
    with Image.open(path) as image:
        return json.loads(image.text["qwen-image-edit"])


def test_the_command_writes_a_png_that_says_how_to_make_it_again(tiny_model_dir, bridge, picture, tmp_path):
    arguments = ["eval/edit.py", "--model", tiny_model_dir, "--adapter", bridge, "--image", picture]
    arguments += ["--prompt", "déjà vu, 编辑", "--steps", "2", "--seed", "1"]
    done = run_script(*arguments, "--out", tmp_path / "result.png")
    assert f"{tmp_path}/result.png: 64x32, 2 steps, seed 1, " in done.stdout
    settings = settings_of(tmp_path / "result.png")
    assert settings["notice"] == "edited by a generative model"
    assert (settings["prompt"], settings["seed"], settings["steps"]) == ("déjà vu, 编辑", 1, 2)
    assert settings["sampler"]["name"] == "BridgeSampler"
    assert settings["sampler"]["bridge_noise"] == 0.005
    assert settings["geometry"] == {"max_pixels": 64 * 64, "vision_pixels": 56 * 56, "reference_pixels": None}
    assert [image["name"] for image in settings["images"]] == ["photo.png"]
    assert settings["model_fingerprint"]
    assert settings["adapter_digest"]
    run_script(*arguments, "--out", tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "result.png").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--image", "missing.png"], "missing.png: no such file"),
        (["--adapter", "runs/none"], "no adapter at runs/none: give a checkpoint folder"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(tiny_model_dir, picture, tmp_path, changes, message):
    base = ["--model", tiny_model_dir, "--image", picture, "--prompt", "x", "--out", tmp_path / "result.png"]
    done = run_script("eval/edit.py", *base, *changes, check=False)
    assert done.returncode == 2
    assert f"error: {message}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"images": []}, "1 to 3 images, got 0"),
        ({"images": [Image.new("RGB", (8, 8))] * 4}, "1 to 3 images, got 4"),
        ({"steps": 0}, "steps must be positive, got 0"),
        ({"cfg_scale": 0.5}, "cfg_scale must be at least 1"),
        ({"size": Size(0, 32)}, "size must be in multiples of 32, got 32x0"),
    ],
)
def test_wrong_requests_are_refused(request_, message):
    with pytest.raises(InputError, match=message):
        EditRequest(**({"prompt": "x", "images": [Image.new("RGB", (64, 64))]} | request_))


def test_a_bridge_refuses_guidance_before_anything_is_loaded(tiny_model_dir, bridge, picture):
    editor = Editor(ModelDirectory.resolve(tiny_model_dir), bridge)
    with pytest.raises(InputError, match=r"sampled without guidance: leave out cfg_scale=3\.0"):
        editor.edit(EditRequest("x", [open_image(picture)], cfg_scale=3.0))
    assert not {"denoiser", "vae", "prompt_encoder"} & vars(editor).keys()


def test_the_editor_encodes_as_the_cache_does(tiny_model_dir, tmp_path):
    cache_dataset(write_dataset(tmp_path, write_rows(tmp_path, 3)), tmp_path / "cache", tiny_model_dir, negative=True)
    editor = Editor(ModelDirectory.resolve(tiny_model_dir), dtype=torch.float32, geometry=GEOMETRY)
    for record in CacheReader(tmp_path / "cache"):
        images = [open_image(path) for path in record.row["edit_image"]]
        request = EditRequest(record.row["prompt"], images, negative_prompt=record.row["negative_prompt"])
        edit = editor.encode(request, guided=True)
        assert torch.allclose(edit.source_latents[0], record.source_latents, atol=1e-5)
        assert torch.allclose(edit.sub_noise[0], record.sub_noise, atol=1e-5)
        assert torch.allclose(edit.condition.prompt_emb[0], record.prompt_emb, atol=1e-5)
        assert edit.negative is not None
        assert record.negative_prompt_emb is not None
        assert torch.allclose(edit.negative.prompt_emb[0], record.negative_prompt_emb, atol=1e-5)
        for latents, cached in zip(edit.condition.edit_latents, record.edit_latents, strict=True):
            assert torch.allclose(latents[0], cached, atol=1e-5)


def test_seed_prompt_and_adapter_decide_the_picture(flow_editor, editor, picture):
    source = open_image(picture)

    def edited(by: Editor, prompt: str = "x", seed: int = 0) -> Image.Image:
        return by.edit(EditRequest(prompt, [source], steps=2, seed=seed)).image

    def same(a: Image.Image, b: Image.Image) -> bool:
        return ImageChops.difference(a, b).getbbox() is None

    assert same(edited(flow_editor), edited(flow_editor))
    assert not same(edited(flow_editor), edited(flow_editor, seed=1))
    assert same(edited(editor), edited(editor, seed=1))  # a deterministic bridge draws nothing
    assert not same(edited(editor), edited(editor, prompt="something else"))
    assert not same(edited(editor), edited(flow_editor))


def test_size_steps_and_references(flow_editor, picture):
    source, steps = open_image(picture), []
    request = EditRequest("x", [source, source.rotate(90)], steps=3, cfg_scale=1.0, size=Size(64, 96))
    result = flow_editor.edit(request, lambda step, _: steps.append(step))
    assert result.image.size == (96, 64)
    assert steps == [1, 2, 3]
    assert "negative_prompt" not in result.settings
    assert json.loads(json.dumps(result.settings)) == result.settings


def test_metadata_decides_the_sampler():
    assert choose_sampler({}).sampler == FlowSampler(cfg_scale=4.0)
    assert choose_sampler({}, cfg_scale=1.0).guided is False
    drift = {"objective": "lbm", "loss": json.dumps({"prediction": "drift", "bridge_noise": 0.2, "sub_prob": 1})}
    assert choose_sampler(drift).sampler == BridgeSampler("white", bridge_noise=0.2, prediction="drift")
    assert choose_sampler({"objective": "lbm"}).steps == 4
    with pytest.raises(InputError, match="objective is 'gan'"):
        choose_sampler({"objective": "gan"})


def test_metadata_decides_the_sizes():
    assert trained_geometry({}) == DEFAULT_GEOMETRY
    text = json.dumps({"max_pixels": 4096, "vision_pixels": 3136, "reference_pixels": None})
    assert trained_geometry({"geometry": text}) == SMALL
