"""The editions of Qwen-Image-Edit: their templates against diffusers', their caches apart, and other pipelines refused."""

import json

import pytest
import torch
from diffusers import QwenImageEditPipeline
from hydra import compose, initialize_config_dir
from transformers import Qwen2_5_VLForConditionalGeneration

from data_prep.errors import BadPrompt, InputError
from data_prep.model.directory import COMPONENTS, ModelDirectory
from data_prep.model.editions import FIRST, PLUS
from data_prep.model.encoders import edit_text, load_prompt_encoder
from eval.qwen.editor import Editor
from eval.request.knobs import AdapterUse
from eval.request.placement import Placement
from eval.request.request import EditRequest
from tests.caching import write_dataset, write_image
from tests.commands import ROOT, run_script
from tests.pictures import picture
from tests.tiny_editions import of_edition
from train.phases import ENCODERS
from train.record.lookup import find_adapter

TOLERANCE = 1e-4
"""Of float32 sums in another order, as in test_encoders.py."""


@torch.no_grad()
def test_the_first_editions_embedding_equals_diffusers(tiny_model_dir, tmp_path, monkeypatch):
    """Once its call is given the mm_token_type_ids that it drops."""
    model = ModelDirectory.resolve(of_edition(FIRST.pipeline, tiny_model_dir, tmp_path / "first"))
    encoder = load_prompt_encoder(model, dtype=torch.float32)
    pipeline = QwenImageEditPipeline.from_pretrained(model.path, dtype=torch.float32)
    forward = Qwen2_5_VLForConditionalGeneration.forward
    monkeypatch.setattr(
        Qwen2_5_VLForConditionalGeneration,
        "forward",
        lambda self, input_ids=None, **rest: forward(
            self, input_ids=input_ids, mm_token_type_ids=(input_ids == 151655).int(), **rest
        ),
    )
    image = picture(0, (160, 96))
    expected, _ = pipeline._get_qwen_prompt_embeds("Swap the cups.", image, "cpu", torch.float32)
    actual = encoder.encode("Swap the cups.", [image])
    assert actual.shape == expected[0].shape
    assert (actual - expected[0]).abs().max() < TOLERANCE
    later = load_prompt_encoder(ModelDirectory.resolve(tiny_model_dir), dtype=torch.float32)
    assert len(later.encode("Swap the cups.", [image])) > len(actual)  # "Picture 1: "
    with pytest.raises(BadPrompt, match="edits one image, got 2"):
        encoder.encode("Swap the cups.", [image, image])


def test_every_published_model_has_a_configuration():
    """The first edition's sets the area that its text encoder was shown, whichever experiment it stands behind."""
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        for name, path, pixels in (
            ("qwen_image_edit", "Qwen/Qwen-Image-Edit", FIRST.vision_pixels),
            ("qwen_image_edit_2509", "Qwen/Qwen-Image-Edit-2509", PLUS.vision_pixels),
            ("firered_image_edit_1_0", "FireRedTeam/FireRed-Image-Edit-1.0", PLUS.vision_pixels),
            ("firered_image_edit_1_1", "FireRedTeam/FireRed-Image-Edit-1.1", PLUS.vision_pixels),
        ):
            config = compose("config", ["+exp=sft_2509", f"model={name}", "data.dataset=x.json"])
            assert (config.model.path, config.data.vision_pixels) == (path, pixels)
            assert config.data.caption_dropout == 0.1


def test_the_templates_differ_in_the_number_alone():
    assert "Picture" not in edit_text("Go.", 1, FIRST)
    assert edit_text("Go.", 1, PLUS).replace("Picture 1: ", "") == edit_text("Go.", 1, FIRST)


def test_the_first_edition_has_a_fingerprint_of_its_own_and_the_others_the_one_they_had(tiny_model_dir, tmp_path):
    """The text encoder's files are the same. A directory without an index says what fingerprints were made of before."""
    first, plus = (
        ModelDirectory.resolve(of_edition(each.pipeline, tiny_model_dir, tmp_path / each.pipeline))
        for each in (FIRST, PLUS)
    )
    bare = of_edition(PLUS.pipeline, tiny_model_dir, tmp_path / "bare")
    (bare / "model_index.json").unlink()
    before = ModelDirectory.resolve(bare)
    assert before.edition is plus.edition is PLUS
    assert first.edition is FIRST
    for parts in (ENCODERS, COMPONENTS):
        assert plus.fingerprint(*parts) == before.fingerprint(*parts) != first.fingerprint(*parts)
    for parts in (("transformer",), ("vae",)):
        assert plus.fingerprint(*parts) == before.fingerprint(*parts) == first.fingerprint(*parts)


@pytest.mark.parametrize("pipeline", ["QwenImagePipeline", "QwenImageLayeredPipeline", None])
def test_another_pipeline_is_refused_by_name(tiny_model_dir, tmp_path, pipeline):
    folder = of_edition(PLUS.pipeline, tiny_model_dir, tmp_path / "other")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    with pytest.raises(
        InputError, match=f"other is a {pipeline}, which cannot be used here; those that can are QwenIm"
    ):
        ModelDirectory.resolve(folder)


def test_the_first_edition_is_cached_trained_and_edited_with(tiny_model_dir, tmp_path):
    """By the commands: two images are refused with their row, and the cache is not the later editions'."""
    model = of_edition(FIRST.pipeline, tiny_model_dir, tmp_path / "first")
    rows = [
        {"prompt": "a", "image": write_image(tmp_path / "t.png", 0), "edit_image": write_image(tmp_path / "s.png", 1)}
    ]
    rows.append(rows[0] | {"prompt": "b", "edit_image": ["s.png", "t.png"]})
    keys = [f"data.dataset={write_dataset(tmp_path, rows)}", f"cache.dir={tmp_path}/cache", f"run_dir={tmp_path}/run"]
    keys += ["train.num_steps=1", "data.on_error=skip", "adapter.rank=2", "data.max_pixels=4096", "train.compile=off"]
    run_script(
        "train/run.py", "+exp=tiny_sft", *keys, f"model.path={model}", "data.vision_pixels=3136", "validate=none"
    )
    rejected = (tmp_path / "run/rejected.jsonl").read_text()
    assert "the first Qwen-Image-Edit (QwenImageEditPipeline) edits one image, got 2" in rejected
    other = [*keys[:2], f"run_dir={tmp_path}/other", f"model.path={tiny_model_dir}", "data.vision_pixels=3136"]
    done = run_script("train/run.py", "+exp=tiny_sft", *other, "phases=[train]", "validate=none", check=False)
    assert done.returncode == 2
    assert "model" in done.stderr.splitlines()[-1]
    editor = Editor(ModelDirectory.resolve(model), Placement(dtype=torch.float32))
    adapter = (AdapterUse(find_adapter(str(tmp_path / "run"))),)
    (result,) = editor.edit(EditRequest("a", [picture(0, (64, 64))], adapters=adapter, steps=1))
    assert result.settings["geometry"]["vision_pixels"] == 3136
