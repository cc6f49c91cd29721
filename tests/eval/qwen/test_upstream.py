"""Editing like the originals: sizes and whole pictures against diffusers' pipelines on the tiny model."""

import math

import numpy as np
import pytest
import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as first
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration

from data_prep.errors import InputError
from data_prep.model.directory import ModelDirectory
from data_prep.model.geometry import Geometry, Size, UpstreamGeometry, to_pixels
from eval.qwen.editor import Editor
from eval.request.knobs import AdapterUse, Control, Focus
from eval.request.metadata import DEFAULT_GEOMETRY
from eval.request.placement import Placement
from eval.request.request import EditRequest
from eval.request.sizes import SizeLimits
from losses.randomness import PictureRandom
from tests.adapters import write_adapter
from tests.pictures import picture
from tests.tiny_editions import of_edition

AREA, VISION = 96 * 96, 84 * 84
FLOAT = Placement(dtype=torch.float32)


@given(height=st.integers(16, 6000), width=st.integers(16, 6000))
def test_sizes_are_upstreams(height, width):
    theirs = plus.calculate_dimensions(1024 * 1024, width / height)
    size = Size(height, width)
    if min(theirs) > 0:  # beyond 1:4000 theirs has no pixel
        assert (*UpstreamGeometry().target_size(size)[::-1],) == theirs
        assert (*UpstreamGeometry().reference_size(size)[::-1],) == theirs
    if min(seen := plus.calculate_dimensions(384 * 384, width / height)) > 0:
        assert (*UpstreamGeometry().vision_size(size)[::-1],) == seen


def blurred(seed: int, size: tuple[int, int]) -> Image.Image:
    return picture(seed, (size[0] // 8, size[1] // 8)).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def true_positions(monkeypatch):
    """diffusers drops `mm_token_type_ids`, and image tokens lose their two-dimensional positions: they are given back."""
    forward = Qwen2_5_VLForConditionalGeneration.forward
    monkeypatch.setattr(
        Qwen2_5_VLForConditionalGeneration,
        "forward",
        lambda self, input_ids=None, **rest: forward(
            self, input_ids=input_ids, mm_token_type_ids=(input_ids == 151655).int(), **rest
        ),
    )


@pytest.mark.parametrize("shapes", [[(150, 100)], [(61, 93), (128, 64)]])
@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
def test_a_picture_is_the_one_of_diffusers(tiny_model_dir, monkeypatch, true_positions, shapes, cfg_scale):
    """From the same noise, in float32: within a grey level of 255. Only their areas are smaller, so that it is quick."""
    monkeypatch.setattr(plus, "VAE_IMAGE_SIZE", AREA)
    monkeypatch.setattr(plus, "CONDITION_IMAGE_SIZE", VISION)
    images = [blurred(seed, size) for seed, size in enumerate(shapes)]
    geometry = UpstreamGeometry(max_pixels=AREA, vision_pixels=VISION)
    editor = Editor(ModelDirectory.resolve(tiny_model_dir), FLOAT, geometry)
    (ours,) = editor.edit(EditRequest("Make it blue.", images, steps=3, cfg_scale=cfg_scale, seed=5))

    pipeline = QwenImageEditPlusPipeline.from_pretrained(tiny_model_dir, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    size = geometry.target_size(Size.of(images[0]))
    noise = PictureRandom([5]).normal("noise", (16, *size.latent))
    packed = pipeline._pack_latents(noise, 1, 16, *size.latent)
    theirs = pipeline(
        image=images,
        prompt="Make it blue.",
        negative_prompt=" " if cfg_scale > 1 else None,
        true_cfg_scale=cfg_scale,
        num_inference_steps=3,
        latents=packed,
        height=size.height,
        width=size.width,
    ).images[0]
    assert ours.image.size == theirs.size
    assert np.abs(np.asarray(ours.image).astype(int) - np.asarray(theirs)).max() <= 1
    assert ours.settings["geometry"]["kind"] == "upstream"


@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
def test_a_picture_of_the_first_qwen_image_edit_is_the_one_of_diffusers(
    tiny_model_dir, tmp_path, monkeypatch, true_positions, cfg_scale
):
    """Another template, and the text encoder sees what the VAE sees."""
    whole = first.calculate_dimensions
    monkeypatch.setattr(first, "calculate_dimensions", lambda _, ratio: whole(AREA, ratio))
    model, image = of_edition("QwenImageEditPipeline", tiny_model_dir, tmp_path / "first"), blurred(3, (150, 100))
    geometry = UpstreamGeometry(max_pixels=AREA, vision_pixels=AREA)
    (ours,) = Editor(ModelDirectory.resolve(model), FLOAT, geometry).edit(
        EditRequest("Make it blue.", [image], steps=3, cfg_scale=cfg_scale, seed=5)
    )
    pipeline = QwenImageEditPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    size = geometry.target_size(Size.of(image))
    noise = PictureRandom([5]).normal("noise", (16, *size.latent))
    theirs = pipeline(
        image=image,
        prompt="Make it blue.",
        negative_prompt=" " if cfg_scale > 1 else None,
        true_cfg_scale=cfg_scale,
        num_inference_steps=3,
        latents=pipeline._pack_latents(noise, 1, 16, *size.latent),
    ).images[0]
    assert ours.image.size == theirs.size
    assert np.abs(np.asarray(ours.image).astype(int) - np.asarray(theirs)).max() <= 1


def test_the_first_qwen_image_edit_takes_one_image_and_shows_it_large(tiny_model_dir, tmp_path):
    editor = Editor(
        ModelDirectory.resolve(of_edition("QwenImageEditPipeline", tiny_model_dir, tmp_path / "first")), FLOAT
    )
    image = picture(0, (160, 100))
    assert editor.prepare(EditRequest("x", [image])).geometry == UpstreamGeometry(vision_pixels=1024 * 1024)
    assert editor.prepare(EditRequest("x", [image], sizing="own")).geometry == Geometry(1024 * 1024, 1024 * 1024)
    with pytest.raises(InputError, match=r"at most 1 image\(s\), got 2"):
        editor.prepare(EditRequest("x", [image, image]))
    with pytest.raises(InputError, match="a map of it is another: leave out control"):
        editor.prepare(EditRequest("x", [image], mode="control", controls=(Control("canny"),)))
    assert Editor(ModelDirectory.resolve(tiny_model_dir), FLOAT).abilities.max_images == 3


def test_sizes_are_upstreams_where_no_adapter_of_ours_says_and_as_asked(tiny_model_dir, tmp_path):
    own = Geometry(max_pixels=64 * 64, vision_pixels=56 * 56)
    adapter = (AdapterUse(write_adapter(tmp_path, tiny_model_dir, "flow", own)),)
    editor = Editor(ModelDirectory.resolve(tiny_model_dir), FLOAT)
    image = picture(0, (160, 100))

    def prepared(**values):
        job = editor.prepare(EditRequest("x", [image], **values))
        return job.geometry, job.size

    assert prepared() == (UpstreamGeometry(), Size(800, 1280))
    assert prepared(aspect="16:9") == (UpstreamGeometry(), Size(768, 1376))
    assert prepared(sizing="own")[0] == DEFAULT_GEOMETRY
    assert prepared(adapters=adapter)[0] == own
    assert prepared(adapters=adapter, sizing="own")[0] == own
    assert prepared(adapters=adapter, sizing="upstream")[0] == UpstreamGeometry()
    assert prepared(sizing="upstream", size=Size(48, 80))[1] == Size(48, 80)
    with pytest.raises(InputError, match="multiples of 32, got 80x48"):
        prepared(size=Size(48, 80))
    with pytest.raises(InputError, match="multiples of 16, got 72x48"):
        prepared(sizing="upstream", size=Size(48, 72))
    small = Editor(ModelDirectory.resolve(tiny_model_dir), FLOAT, limits=SizeLimits(max_pixels=4096))
    geometry = small.prepare(EditRequest("x", [image])).geometry
    assert geometry == UpstreamGeometry(max_pixels=4096)
    assert geometry.reference_size(Size(3000, 2000)) == Size(64, 64)
    assert math.prod(geometry.reference_size(Size(10, 10))) == 4096  # up as well as down


@pytest.mark.parametrize("mode", ["img2img", "inpaint", "focus"])
def test_an_edit_starts_at_what_its_reference_shows_and_goes_back_to_the_border(tiny_model_dir, monkeypatch, mode):
    """150 x 100 is computed at 128 x 64: the upper and lower eighths of the file, which a crop to that shape would lose."""
    rows, columns = np.linspace(0, 255, 100)[:, None], np.linspace(0, 255, 150)[None]
    image = Image.fromarray(np.stack([rows + 0 * columns, columns + 0 * rows, 0 * rows * columns], -1).astype(np.uint8))
    rim = np.zeros((100, 150), dtype=np.uint8)
    rim[:8] = 255
    geometry = UpstreamGeometry(max_pixels=AREA, vision_pixels=VISION)
    assert geometry.target_size(Size(100, 150)) == Size(64, 128)
    seen, shown = [], geometry.reference_picture(image, Size(64, 128))
    monkeypatch.setattr("eval.qwen.encoding.to_pixels", lambda each: seen.append(each) or to_pixels(each))
    monkeypatch.setattr("eval.qwen.editor._decode", lambda *_: [shown])  # an edit that changes nothing
    masked = {"mask": Image.fromarray(rim)} if mode == "inpaint" else {}
    place = {"focus": Focus(0.5, 0.0, 0.3)} if mode == "focus" else {}
    asked = EditRequest("x", [image], mode=mode, steps=2, cfg_scale=1.0, **masked, **place)
    (result,) = Editor(ModelDirectory.resolve(tiny_model_dir), FLOAT, geometry).edit(asked)
    assert [np.array_equal(np.asarray(each), np.asarray(shown)) for each in seen] == [True]  # source and reference
    if mode != "img2img":
        difference = np.abs(np.asarray(result.image).astype(int) - np.asarray(image))
        assert difference.max() <= 3  # of 255, by two resizings of ramps; the nearest pixel would be 30 away
