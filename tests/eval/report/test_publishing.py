"""What is uploaded comes back: to this project by the repository's name, and to diffusers with the pipeline beside it."""

from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import ImageChops

from data_prep.model.directory import ModelDirectory
from data_prep.model.geometry import Geometry
from data_prep.rows.images import open_image
from eval.exports.inspection import inspect_adapter
from eval.qwen.editor import Editor
from eval.report.card import CardRequest, check_card, write_card
from eval.report.publishing import check_push, push
from eval.report.summary import build_report
from eval.request.knobs import AdapterUse
from eval.request.placement import Placement
from eval.request.request import EditRequest
from eval.scores.recorder import Measured
from tests.adapters import write_adapter
from tests.caching import write_image
from tests.eval.exports.test_qwen_edit_pipeline import levels
from tests.hub_server import hub
from train.record.lookup import find_adapter

SMALL = Geometry(max_pixels=64 * 64, vision_pixels=56 * 56)
SETTINGS = {"dataset": "pairs.json", "dataset_digest": "0", "split": "validation", "caution": None}


def test_what_is_pushed_comes_back(tiny_model_dir, tmp_path, monkeypatch):
    adapter = write_adapter(tmp_path / "mine", tiny_model_dir, "lbm", SMALL)
    (adapter / "optimizer.safetensors").write_bytes(b"of the training")
    card = check_card(CardRequest(adapter, "mit", repository="me/mine"))
    rows = {"r0": {"psnr": 20.0}, "r1": {"psnr": 22.0}}
    measured = [Measured("source", rows=rows, kind="source")]
    measured += [Measured("mine/steps_4", "mine", 4, "bridge", 0.5, rows, baseline="source")]
    settings = SETTINGS | {"seed": 0, "device": "cpu", "dtype": "float32"}
    write_card(card, build_report("t", measured, {"r0": "a", "r1": "b"}, {}, settings), [])
    image = open_image(tmp_path / write_image(tmp_path / "photo.png", 3, 64, 64))
    editor = Editor(ModelDirectory.resolve(tiny_model_dir), Placement(dtype=torch.float32))

    def edited(use: AdapterUse):
        return editor.edit(EditRequest("x", [image], adapters=[use], steps=2))[0].image

    monkeypatch.chdir(tmp_path)
    with hub(monkeypatch, tmp_path / "hub") as repositories:
        check_push("me/mine")
        push(card.folder, card.files, "me/mine", private=True)
        own = {"adapter_model.safetensors", "adapter_config.json", "pipeline.py", "README.md"}
        assert repositories["me/mine"].keys() == own
        found = find_adapter("me/mine")
        assert tmp_path / "hub" in found.parents
        assert (
            ImageChops.difference(edited(AdapterUse.parse("me/mine:1.0")), edited(AdapterUse(adapter))).getbbox()
            is None
        )
        assert inspect_adapter(found).header["objective"] == "lbm"
        given: dict[str, Any] = {"custom_pipeline": "me/mine", "trust_remote_code": True, "dtype": torch.float32}
        pipe: Any = DiffusionPipeline.from_pretrained(tiny_model_dir, **given)
        pipe.load_lora_weights("me/mine", weight_name="adapter_model.safetensors")
        assert levels(pipe(image, "x", num_inference_steps=2).images[0], edited(AdapterUse(adapter))) <= 1
