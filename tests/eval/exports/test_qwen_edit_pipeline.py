"""The pipeline for diffusers: its pictures are ours, of 8-bit levels at most one apart, in float32 on the tiny model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import ExifTags, Image
from safetensors.torch import load_file

from data_prep.model.directory import ModelDirectory
from data_prep.model.editions import FIRST, PLUS
from data_prep.model.encoders import edit_text
from data_prep.model.geometry import Geometry, Size
from data_prep.rows.images import open_image
from eval.exports.qwen_edit.pipeline import bucket, vision_size
from eval.qwen.editor import Editor
from eval.request.knobs import AdapterUse
from eval.request.placement import Placement
from eval.request.request import EditRequest
from losses.patches import patchify
from losses.randomness import PictureRandom
from tests.adapters import write_adapter
from tests.caching import write_image
from tests.commands import ROOT

FOLDER = ROOT / "eval/exports/qwen_edit"
SMALL = Geometry(max_pixels=96 * 64, vision_pixels=64 * 64)
PROMPT = "Remove the sticker."


def levels(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of two pictures, in 8-bit levels."""
    assert one.size == other.size
    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max())


def latents_of(image: Image.Image) -> tuple[int, int, int]:
    """Their shape: the image, and what it was continued by to multiples of 32."""
    return 16, *(-(-side // 32) * 4 for side in (image.height, image.width))


@pytest.fixture(scope="module")
def adapters(tiny_model_dir, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    sigmas = [1.0, 0.75, 0.5, 0.25]
    kinds = {"source": {"sub_prob": 0}, "both": {"sub_prob": 0.5}, "white": {"sub_prob": 1}}
    for name, loss in kinds.items():
        write_adapter(folder / name, tiny_model_dir, "lbm", SMALL, sigmas=sigmas, **loss)
    write_adapter(folder / "flow", tiny_model_dir, "flow", SMALL)
    return {name: folder / name for name in (*kinds, "flow")}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Image.Image]:
    folder = tmp_path_factory.mktemp("pictures")
    made = [write_image(folder / f"{number}.png", number, *size) for number, size in enumerate([(190, 121), (70, 90)])]
    return [open_image(folder / name) for name in made]


@pytest.fixture(scope="module")
def editor(tiny_model_dir) -> Editor:
    return Editor(ModelDirectory.resolve(tiny_model_dir), Placement(dtype=torch.float32))


@pytest.fixture(scope="module")
def fresh_pipeline(tiny_model_dir) -> Any:
    own = {"custom_pipeline": str(FOLDER), "trust_remote_code": True, "dtype": torch.float32}
    pipeline = DiffusionPipeline.from_pretrained(tiny_model_dir, **own)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline(fresh_pipeline) -> Any:
    yield fresh_pipeline
    fresh_pipeline.unload_lora_weights()


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize(("kind", "start"), [("source", None), ("white", None), ("both", "white")])
def test_a_bridge_is_ours(adapters, images, editor, pipeline, kind, start, steps):
    pipeline.load_lora_weights(adapters[kind])
    theirs = pipeline(images, PROMPT, num_inference_steps=steps, start=start).images[0]
    sampler = {"sampler": f"bridge-{start}"} if start else {}
    request = EditRequest(PROMPT, images, adapters=[AdapterUse(adapters[kind])], steps=steps, **sampler)
    assert levels(theirs, editor.edit(request)[0].image) <= 1


@pytest.mark.parametrize(("steps", "scale"), [(1, 4.0), (3, 4.0), (2, 1.0)])
def test_flow_with_and_without_guidance_is_ours(adapters, images, editor, pipeline, steps, scale):
    pipeline.load_lora_weights(str(adapters["flow"] / "adapter_model.safetensors"))
    request = EditRequest(
        PROMPT,
        images[:1],
        negative_prompt="blurred",
        adapters=[AdapterUse(adapters["flow"])],
        steps=steps,
        cfg_scale=scale,
        seed=5,
    )
    ours = editor.edit(request)[0].image
    noise = PictureRandom([5]).normal("noise", latents_of(ours))
    words = {"negative_prompt": "blurred", "true_cfg_scale": scale, "num_inference_steps": steps}
    theirs = pipeline(images[0], PROMPT, latents=patchify(noise), **words).images[0]
    assert levels(theirs, ours) <= 1


def test_the_source_has_the_grid_of_a_size_that_is_asked_for(adapters, tmp_path, editor, pipeline):
    """Where the aspects agree, and not where they do not."""
    pipeline.load_lora_weights(adapters["source"])
    image = open_image(tmp_path / write_image(tmp_path / "wide.png", 4, 192, 128))
    for size in (Size(128, 192), Size(96, 96)):
        theirs = pipeline(image, PROMPT, num_inference_steps=1, height=size.height, width=size.width).images[0]
        request = EditRequest(PROMPT, [image], adapters=[AdapterUse(adapters["source"])], steps=1, size=size)
        assert levels(theirs, editor.edit(request)[0].image) <= 1


def test_what_an_adapter_does_not_say_is_the_base_models(images, editor, pipeline):
    """One megapixel at most, and flow matching."""
    ours = editor.edit(EditRequest(PROMPT, images[:1], steps=2, cfg_scale=1.0, sizing="own"))[0].image
    noise = PictureRandom([0]).normal("noise", latents_of(ours))
    theirs = pipeline(images[0], PROMPT, true_cfg_scale=1, num_inference_steps=2, latents=patchify(noise)).images[0]
    assert levels(theirs, ours) <= 1


def test_noise_is_the_generators_alone(images, pipeline):
    def made(seed: int) -> Image.Image:
        generator = torch.Generator().manual_seed(seed)
        return pipeline(images[0], PROMPT, num_inference_steps=1, true_cfg_scale=1, generator=generator).images[0]

    assert levels(made(0), made(0)) == 0
    assert levels(made(0), made(1)) > 1


def test_the_first_edition_has_its_own_template_and_one_image(images, pipeline, monkeypatch):
    """As data_prep writes the instruction for either, which training sees."""
    seen = []
    processor = type(pipeline.processor)
    plain = processor.__call__

    def recorded(self, text, **inputs):
        seen.extend(text)
        return plain(self, text=text, **inputs)

    monkeypatch.setattr(processor, "__call__", recorded)
    for edition in (PLUS, FIRST):
        pipeline.header = {"base_pipeline": edition.pipeline}
        pipeline._get_qwen_prompt_embeds(PROMPT, images[:1])
        assert seen[-1] == edit_text(PROMPT, 1, edition)
    with pytest.raises(ValueError, match="the first Qwen-Image-Edit edits one image, got 2"):
        pipeline(images, PROMPT)


def test_adapters_are_loaded_as_diffusers_loads_them(adapters, pipeline):
    pipeline.load_lora_weights(adapters["source"].parent, subfolder="source")
    assert pipeline.header["objective"] == "lbm"
    assert len(pipeline.get_active_adapters()) == 1
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(load_file(adapters["source"] / "adapter_model.safetensors"))
    assert len(pipeline.get_active_adapters()) == 1
    assert pipeline.header == {}


def test_a_picture_is_turned_as_its_exif_says(adapters, images, pipeline):
    pipeline.load_lora_weights(adapters["source"])
    lying = images[0].copy()
    lying.getexif()[ExifTags.Base.Orientation] = 6
    upright = images[0].transpose(Image.Transpose.ROTATE_270)
    made = [pipeline(each, PROMPT, num_inference_steps=1).images[0] for each in (lying, upright)]
    assert levels(*made) == 0


def test_a_start_that_was_not_trained_is_refused(adapters, images, pipeline):
    pipeline.load_lora_weights(adapters["source"])
    with pytest.raises(ValueError, match="this bridge begins at source, not at 'white'"):
        pipeline(images, PROMPT, start="white")


def test_steps_that_were_not_trained_are_named(adapters, images, pipeline, monkeypatch):
    pipeline.load_lora_weights(adapters["source"])
    warned = []
    monkeypatch.setattr(type(pipeline)._bridge.__globals__["logger"], "warning", warned.append)
    pipeline(images, PROMPT, num_inference_steps=2)
    assert warned == []
    pipeline(images, PROMPT, num_inference_steps=3)
    assert warned == ["the adapter was trained at sigma [1.0, 0.75, 0.5, 0.25], and 3 steps visit others"]


def test_sizes_are_those_of_the_cache():
    """Of the one function that sizes images, whatever the aspect."""
    for height, width in [(64, 64), (1080, 1920), (4000, 30), (31, 31), (701, 1203), (33, 5000), (2048, 2047)]:
        for area in (4096, 96 * 64, 512 * 512, 1024 * 1024):
            geometry = Geometry(max_pixels=area, vision_pixels=area)
            target, vision = geometry.target_size(Size(height, width)), geometry.vision_size(Size(height, width))
            assert bucket(width, height, area) == (target.width, target.height)
            assert vision_size(width, height, area) == (vision.width, vision.height)


def test_it_imports_nothing_of_the_project():
    """For it is uploaded alone."""
    text = (FOLDER / "pipeline.py").read_text()
    assert not any(
        f"{word} {floor}" in text for floor in ("eval", "train", "data_prep", "losses") for word in ("from", "import")
    )
