"""diffusers' own pipeline: pictures are ours where its three differences are taken away, and the printed snippets run.

In float32 on the tiny model. What differs is left: rounding to 8 bits, at most one level.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import QwenImageEditPlusPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock
from jinja2 import Environment, FileSystemLoader
from PIL import ExifTags, Image
from transformers import Qwen2_5_VLForConditionalGeneration

from data_prep.model.directory import ModelDirectory
from data_prep.model.geometry import Geometry
from data_prep.rows.images import open_image
from eval.exports import PIPELINE
from eval.qwen.editor import Editor
from eval.request.knobs import AdapterUse
from eval.request.placement import Placement
from eval.request.request import EditRequest
from losses.patches import patchify
from losses.randomness import PictureRandom
from tests.adapters import write_adapter
from tests.caching import write_image
from tests.commands import ROOT
from tests.eval.exports.test_qwen_edit_pipeline import levels

SIDE = 96
SIZES = Geometry(max_pixels=SIDE * SIDE, vision_pixels=128 * 128)
PROMPT = "Remove the sticker."
PLACES = {"base_model": "Qwen/Qwen-Image-Edit-2511", "repository": "OWNER/NAME", "weights": "adapter_model.safetensors"}
PLACES |= {"max_pixels": "1024 * 1024"}


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Image.Image:
    folder = tmp_path_factory.mktemp("picture")
    return open_image(folder / write_image(folder / "photo.png", 3, SIDE, SIDE))


@pytest.fixture(scope="module")
def editor(tiny_model_dir) -> Editor:
    return Editor(ModelDirectory.resolve(tiny_model_dir), Placement(dtype=torch.float32), SIZES)


@pytest.fixture(scope="module")
def pipeline(tiny_model_dir):
    made = QwenImageEditPlusPipeline.from_pretrained(tiny_model_dir, dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def same_sizes(monkeypatch):
    """References as large as ours, at which one megapixel is not needed."""
    monkeypatch.setattr(stock, "VAE_IMAGE_SIZE", SIZES.max_pixels)
    monkeypatch.setattr(stock, "CONDITION_IMAGE_SIZE", SIZES.vision_pixels)


@pytest.fixture
def same_sight(monkeypatch):
    """M-RoPE, and our filter for what the text encoder sees."""
    plain = Qwen2_5_VLForConditionalGeneration.forward

    def forward(self, input_ids=None, **inputs):
        return plain(self, input_ids=input_ids, **{"mm_token_type_ids": (input_ids == 151655).int()} | inputs)

    def resize(_, image, height, width, resize_mode="default"):
        return image.resize((width, height), Image.Resampling.BICUBIC)

    monkeypatch.setattr(Qwen2_5_VLForConditionalGeneration, "forward", forward)
    monkeypatch.setattr(VaeImageProcessor, "resize", resize)


def psnr(one: Image.Image, other: Image.Image) -> float:
    error = np.square(np.asarray(one, dtype=float) - np.asarray(other, dtype=float)).mean()
    return 10 * np.log10(255**2 / error) if error else np.inf


def edited(editor: Editor, pipeline, image: Image.Image, scale: float) -> tuple[Image.Image, Image.Image]:
    """Ours and theirs, of the same noise."""
    request = EditRequest(PROMPT, [image], negative_prompt="blurred", steps=4, cfg_scale=scale, seed=1)
    noise = patchify(PictureRandom([1]).normal("noise", (16, SIDE // 8, SIDE // 8)))
    words = {"num_inference_steps": 4, "true_cfg_scale": scale, "height": SIDE, "width": SIDE}
    negative = "blurred" if scale > 1 else None
    theirs = pipeline([image], PROMPT, latents=noise, negative_prompt=negative, **words).images[0]
    return editor.edit(request)[0].image, theirs


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.usefixtures("same_sizes", "same_sight")
def test_a_whole_picture_is_diffusers(editor, pipeline, image, scale):
    """Sigmas, guidance with its rescaling, references and the VAE: everything that an edit is made of."""
    assert levels(*edited(editor, pipeline, image, scale)) <= 1


@pytest.mark.usefixtures("same_sizes")
def test_without_them_it_is_another_picture(editor, pipeline, image):
    """What the card says that diffusers does differently; once this fails, it can say less."""
    far = [psnr(*edited(editor, pipeline, image, scale)) for scale in (1.0, 4.0)]
    assert far == pytest.approx([48.3, 41.6], abs=1)


def snippet(name: str, **changed: str) -> str:
    """As the card prints it."""
    templates = Environment(loader=FileSystemLoader(ROOT / "eval/report/templates"))
    return templates.get_template(f"{name}.py.j2").render(PLACES | changed).strip()


def printed(page: str) -> list[str]:
    return [each.strip() for each in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)]


def test_readme_card_and_page_print_the_same():
    assert snippet("bridge") in printed("README.md")
    assert snippet("bridge") in printed("docs/use_elsewhere.md")
    assert snippet("pipeline", pipeline="eval/exports/qwen_edit") in printed("docs/use_elsewhere.md")
    assert snippet("pipeline", pipeline="OWNER/NAME") in printed("docs/guide.md")


@pytest.fixture(scope="module")
def bridge(tiny_model_dir, tmp_path_factory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("bridge"), tiny_model_dir, "lbm", SIZES)


def on_the_tiny_model(code: str, tiny_model_dir: Path, bridge: Path) -> str:
    """With the names of this machine in the place of the printed ones, on a CPU in float32."""
    names = {PLACES["base_model"]: str(tiny_model_dir), PLACES["repository"]: str(bridge), '"cuda"': '"cpu"'}
    for name, own in (names | {"bfloat16": "float32", "eval/exports/qwen_edit": str(PIPELINE.parent)}).items():
        code = code.replace(name, own)
    return code


@pytest.mark.parametrize(("name", "steps"), [("bridge", 1), ("bridge", 2), ("bridge", 4), ("pipeline", 4)])
@pytest.mark.usefixtures("same_sizes", "same_sight")
def test_the_printed_snippets_give_our_pictures(
    editor, image, bridge, tiny_model_dir, tmp_path, monkeypatch, name, steps
):
    monkeypatch.chdir(tmp_path)
    image.save("photograph.png")
    code = on_the_tiny_model(snippet(name, pipeline="eval/exports/qwen_edit"), tiny_model_dir, bridge)
    exec(compile(code.replace('("RGB"), 4\n', f'("RGB"), {steps}\n'), name, "exec"), {})
    ours = editor.edit(EditRequest(PROMPT, [image], adapters=[AdapterUse(bridge)], steps=steps))[0].image
    with Image.open("result.png") as result:
        assert levels(result, ours) <= 1


@pytest.mark.usefixtures("same_sizes")
def test_the_printed_snippet_runs_as_it_is(image, bridge, tiny_model_dir, tmp_path, monkeypatch):
    """Nothing of diffusers patched but the megapixel that the tiny model has no need of. The photograph is large and lies."""
    monkeypatch.chdir(tmp_path)
    lying = Image.Exif()
    lying[ExifTags.Base.Orientation] = 6
    image.resize((2 * SIDE, SIDE)).save("photograph.png", exif=lying)
    code = on_the_tiny_model(snippet("bridge", max_pixels=str(SIZES.max_pixels)), tiny_model_dir, bridge)
    exec(compile(code, "bridge", "exec"), {})
    with Image.open("result.png") as result:
        assert result.size == (64, 128)  # upright, and within the adapter's largest area
