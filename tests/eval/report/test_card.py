"""Model cards and their upload, as far as it goes without a network."""

import json

import pytest
import torch
from huggingface_hub import ModelCard, constants
from safetensors.torch import save_file

from data_prep.errors import InputError
from data_prep.rows.images import file_digest
from eval.exports import PIPELINE
from eval.report.card import MARKER, CardRequest, check_card, write_card
from eval.report.publishing import check_push, push
from eval.report.summary import build_report
from eval.scores.recorder import Measured
from train.record.loggers import Picture


@pytest.fixture
def adapter(tmp_path):
    """A checkpoint folder with all that training leaves in one."""
    folder = tmp_path / "run" / "checkpoints" / "step-000002"
    folder.mkdir(parents=True)
    header = {"base_model": "Qwen/Qwen-Image-Edit-2511", "objective": "flow", "step": "2"}
    save_file({"diffusion_model.x.lora_A.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors", header)
    for name in ("adapter_config.json", "optimizer.safetensors", "training_lora.safetensors", "state.json"):
        (folder / name).write_text("{}")
    (folder / "config.yaml").write_text("run_dir: /secret/place\nadapter: {rank: 7}\ntrain: {num_steps: 2}\n")
    return folder


@pytest.fixture
def report():
    rows = {"r0": {"psnr": 20.0, "beauty": 1.0}, "r1": {"psnr": 22.0}}
    methods = [Measured("source", rows=rows, kind="source")]
    methods += [Measured("mine/steps_4", "mine", 4, "flow matching", 0.5, rows, baseline="source")]
    settings = {
        "dataset": "/data/pairs.json",
        "dataset_digest": "0123abcd",
        "split": "validation",
        "caution": None,
        "seed": 0,
        "device": "cpu",
        "dtype": "float32",
    }
    return build_report("t", methods, {"r0": "a", "r1": "b"}, {"fid": "no features"}, settings)


@pytest.fixture
def pictures(tmp_path):
    """Rows that an evaluation has written."""
    files = [tmp_path / f"row-{number}.jpg" for number in range(2)]
    for file in files:
        file.write_bytes(file.name.encode())
    return [Picture(files[0], "remove [the]\n| *sign*"), Picture(files[1], "make it red")]


def test_a_card_says_what_it_is_and_is_written_again(adapter, report, pictures):
    card = check_card(CardRequest(adapter, "mit", repository="me/my-lora"))
    path = write_card(card, report, pictures)
    read = ModelCard.load(path)
    assert read.data.base_model == "Qwen/Qwen-Image-Edit-2511"
    assert (read.data.license, read.data.library_name, read.data.model_name) == ("mit", "diffusers", "my-lora")
    assert {result.metric_value for result in read.data.eval_results} == {21.0}
    assert "21.00 (20.00 – 22.00)" in read.text
    assert 'load_lora_weights("me/my-lora"' in read.text
    assert "rank: 7" in read.text
    assert f"weights `{file_digest(adapter / 'adapter_model.safetensors')}`" in read.text
    assert "2 rows (split validation) of pairs.json (`0123abcd`)" in read.text
    assert "](samples/row-0.jpg)\n\nremove \\[the\\] \\| \\*sign\\*\n" in read.text
    assert "secret" not in read.text
    assert "Not measured: fid." in read.text
    again = check_card(CardRequest(adapter))  # the licence is that of the card
    assert again.license == "mit"
    (adapter / "samples" / "of-mine.jpg").write_bytes(b"")
    text = write_card(again, report, pictures[1:]).read_text()  # fewer, and none of the earlier ones is left
    assert (adapter / "samples" / "row-0.jpg").read_bytes() == b"row-1.jpg"
    own = ["adapter_model.safetensors", "adapter_config.json", "pipeline.py", "README.md"]
    assert card.files == [*own, "samples/row-0.jpg"]
    assert (adapter / "pipeline.py").read_bytes() == PIPELINE.read_bytes()
    assert "row-1.jpg" not in text
    assert (adapter / "samples" / "of-mine.jpg").exists()


def test_rows_that_are_not_held_out_are_no_evaluation(adapter, report, pictures):
    report["settings"]["caution"] = "2 of the 2 rows are training rows."
    read = ModelCard.load(
        write_card(check_card(CardRequest(adapter, "mit", repository="me/my-lora")), report, pictures)
    )
    assert read.data.eval_results is None
    assert "model-index" not in read.content
    assert "## Evaluation" not in read.text
    assert "## Figures, not an evaluation on held-out rows\n\n**2 of the 2 rows are training rows.**\n" in read.text
    assert "The first rows of the evaluation" not in read.text


def test_a_bridge_says_where_it_starts(adapter, report, tmp_path):
    header = {"base_model": str(tmp_path), "objective": "lbm"}
    save_file({"x": torch.zeros(1)}, adapter / "adapter_model.safetensors", header)
    text = write_card(check_card(CardRequest(adapter, "mit")), report, []).read_text()
    assert "**It starts at the source**" in text
    assert 'pipe.load_lora_weights("OWNER/NAME", weight_name="adapter_model.safetensors")' in text
    assert 'own = {"custom_pipeline": "OWNER/NAME", "trust_remote_code": True}' in text
    assert "FlowMatchEulerDiscreteScheduler(shift=1.0)" in text
    assert "loses M-RoPE" in text
    assert "base_model:" not in text  # a folder of this machine is none
    assert str(tmp_path) not in text


@pytest.mark.parametrize("objective", ["flow", "lbm"])
def test_of_the_first_edition_no_other_pipeline_is_told(adapter, report, objective):
    header = {"objective": objective, "base_pipeline": "QwenImageEditPipeline"}
    save_file({"x": torch.zeros(1)}, adapter / "adapter_model.safetensors", header)
    text = write_card(check_card(CardRequest(adapter, "mit")), report, []).read_text()
    assert "QwenImageEditPlusPipeline" not in text
    assert ("import QwenImageEditPipeline" in text) == (objective == "flow")


def test_the_snippet_for_a_bridge_has_the_adapters_largest_area(adapter, report):
    header = {"objective": "lbm", "geometry": json.dumps({"max_pixels": 9216})}
    save_file({"x": torch.zeros(1)}, adapter / "adapter_model.safetensors", header)
    assert "largest = 9216" in write_card(check_card(CardRequest(adapter, "mit")), report, []).read_text()


@pytest.mark.parametrize("objective", ["flow", "lbm"])
def test_a_lokr_adapter_says_who_loads_it(adapter, report, objective):
    header = {"objective": objective, "kind": "lokr"}
    save_file({"x": torch.zeros(1)}, adapter / "adapter_model.safetensors", header)
    read = ModelCard.load(write_card(check_card(CardRequest(adapter, "mit")), report, []))
    assert "A LoKr adapter for" in read.text
    assert "ComfyUI reads the file" in read.text
    assert "diffusers does not: its converter for Qwen-Image knows LoRA alone" in read.text
    assert "QwenImageEditPlusPipeline" not in read.text
    assert ("starts at the source's latents" in read.text) == (objective == "lbm")
    assert (read.data.library_name, read.data.tags[0]) == (None, "lokr")


def test_a_dora_says_how_diffusers_and_comfyui_read_it(adapter, report):
    tensors = {f"diffusion_model.x.lora_{kind}.weight": torch.zeros(1) for kind in ("A", "B", "magnitude_vector")}
    save_file(tensors, adapter / "adapter_model.safetensors", {"objective": "flow"})
    card = check_card(CardRequest(adapter, "mit"))
    text = write_card(card, report, []).read_text()
    assert "export.py convert adapter_model.safetensors --to diffusers" in text
    assert "load_lora_weights" not in text
    assert "pipeline.py" not in card.files


def test_somebody_elses_pipeline_is_left_alone(adapter):
    (adapter / "pipeline.py").write_text('"""Mine."""\n')
    with pytest.raises(InputError, match="and the pipeline for diffusers belongs there: move it away"):
        check_card(CardRequest(adapter, "mit"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, "add --license"),
        ({"license": "My Own!"}, "--license must be a licence"),
        ({"license": "mit", "base_model": "no id"}, "--base-model must look like OWNER/NAME"),
    ],
)
def test_what_a_card_needs(adapter, changed, message):
    with pytest.raises(InputError, match=message):
        check_card(CardRequest(adapter, **changed))


def test_somebody_elses_readme_is_left_alone(adapter):
    (adapter / "README.md").write_text("# Mine\n")
    with pytest.raises(InputError, match="not written by this command"):
        check_card(CardRequest(adapter, "mit"))
    (adapter / "README.md").write_text(f"# Mine\n{MARKER}\n")
    assert check_card(CardRequest(adapter, "mit")).license == "mit"


def test_an_upload_that_would_fail_is_refused_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for wrong in ("me/my lora", "a/b/c", "alone", "me/-x"):
        with pytest.raises(InputError, match="--push"):
            check_push(wrong)
    with pytest.raises(InputError, match="needs a token"):
        check_push("me/my-lora")
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    check_push("me/my-lora")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        check_push("me/my-lora")


@pytest.mark.parametrize("offline", [True, False])
def test_a_hub_that_cannot_be_reached_is_one_sentence_and_exit_code_1(adapter, monkeypatch, offline):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(SystemExit, match=r"error: me/my-lora was not uploaded \(.*everything is in") as ended:
        push(adapter, ["adapter_model.safetensors"], "me/my-lora", private=True)
    assert "\n" not in str(ended.value)


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_a_card_says_what_is_missed_without_the_second_file(adapter, report, pictures, kind):
    """And the file is uploaded with the adapter."""
    nodes = {"ste": {"_target_": "train.model.extra.SpatialTemporalEncoder"}}
    extra = json.dumps({"file": "extra_modules.safetensors", "in_full": ["norm_out"], "added": nodes})
    header = {"objective": "flow", "extra_modules": extra, **({"kind": kind} if kind == "lokr" else {})}
    save_file({"x": torch.zeros(1)}, adapter / "adapter_model.safetensors", header)
    (adapter / "extra_modules.safetensors").write_bytes(b"")
    card = check_card(CardRequest(adapter, "mit"))
    text = write_card(card, report, pictures).read_text()
    assert "Beside `adapter_model.safetensors` stands `extra_modules.safetensors`" in text
    assert "`norm_out`, trained in full; the module `ste` (`train.model.extra.SpatialTemporalEncoder`)" in text
    assert ("load the LoRA and miss the rest" in text) == ("**It is more than LoRA.**" in text) == (kind == "lora")
    assert (
        ("ComfyUI loads the LoKr and misses the rest" in text) == ("It is more than LoKr" in text) == (kind == "lokr")
    )
    assert card.files[:2] == ["adapter_model.safetensors", "extra_modules.safetensors"]
