"""Where base models and adapters are found, and what is said when they are not."""

import os
from pathlib import Path

import pytest

from data_prep.errors import InputError
from eval.request.knobs import AdapterUse
from eval.request.lookup import find_model
from train.model.adapter_files import WEIGHTS_FILE
from train.record.lookup import find_adapter, found_adapters


def write_run(folder: Path, *steps: int, latest: int | None = None, age: int = 0) -> None:
    for step in steps:
        file = folder / "checkpoints" / f"step-{step:06d}" / WEIGHTS_FILE
        file.parent.mkdir(parents=True)
        file.write_bytes(b"")
        os.utime(file, (1_000_000 + step - age, 1_000_000 + step - age))
    (folder / "checkpoints" / "latest").write_text(f"step-{latest or steps[-1]:06d}\n")


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("CHECKPOINT_DIR", str(tmp_path / "runs"))
    write_run(tmp_path / "runs/mine", 100, 200)
    write_run(tmp_path / "runs/demo/lbm", 50, 300, latest=50, age=1000)
    (tmp_path / "runs/demo/lbm/cache/deep").mkdir(parents=True)
    return tmp_path / "runs"


def test_a_run_means_its_latest_checkpoint(runs):
    newest = runs / "mine/checkpoints/step-000200"
    for text in ("mine", "mine/checkpoints", str(runs / "mine"), "mine/checkpoints/step-000200", "mine/step-000200"):
        assert find_adapter(text) == newest
    assert find_adapter("demo/lbm").name == "step-000050"  # as the file says, not the highest number
    file = newest / WEIGHTS_FILE
    assert find_adapter(str(file)) == file
    assert AdapterUse.parse("mine:0.5") == AdapterUse(newest, 0.5)
    assert AdapterUse.parse("mine") == AdapterUse(newest, 1.0)
    for text, weight in {"1e-1": 0.1, "-2.": -2.0, ".5E0": 0.5, "+1": 1.0}.items():
        assert AdapterUse.parse(f"mine:{text}") == AdapterUse(newest, weight)
    with pytest.raises(InputError, match="no adapter at mine:nan"):
        AdapterUse.parse("mine:nan")


def test_a_path_comes_before_the_folder_of_runs(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "mine", 7)
    assert find_adapter("mine").resolve() == tmp_path / "mine/checkpoints/step-000007"
    monkeypatch.delenv("CHECKPOINT_DIR")
    assert find_adapter("demo/lbm").resolve() == runs / "demo/lbm/checkpoints/step-000050"


def test_found_adapters_are_newest_first(runs):
    found = found_adapters()
    assert [each.name for each in found] == [
        "mine/step-000200",
        "mine/step-000100",
        "demo/lbm/step-000300",
        "demo/lbm/step-000050",
    ]
    assert all(find_adapter(each.name) == each.path for each in found)
    assert found_adapters(runs / "none") == []


def test_what_is_not_found_is_said_with_where_and_what_is_near(runs):
    with pytest.raises(InputError, match=rf"no adapter at mime or {runs}/mime; did you mean mine") as error:
        find_adapter("mime")
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"holds no adapter_model.safetensors and no checkpoints"):
        find_adapter(str(runs / "demo"))
    (runs / "mine/checkpoints/latest").write_text("step-000999\n")
    with pytest.raises(InputError, match="names step-000999, which has no"):
        find_adapter("mine")


def test_a_model_is_a_folder_then_below_model_dir_then_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.delenv("MODEL_DIR", raising=False)
    with pytest.raises(InputError, match=r"no model at tiny: .* \(\$MODEL_DIR, a folder for models, is not set\)"):
        find_model("tiny")
    (tmp_path / "models/tiny").mkdir(parents=True)
    (tmp_path / "models/Qwen/Qwen-Image-Edit-2511").mkdir(parents=True)
    monkeypatch.setenv("MODEL_DIR", str(tmp_path / "models"))
    assert find_model("tiny") == str(tmp_path / "models/tiny")
    assert find_model(str(tmp_path / "models")) == str(tmp_path / "models")
    assert find_model("Qwen/Qwen-Image-Edit-2511") == str(tmp_path / "models/Qwen/Qwen-Image-Edit-2511")
    assert find_model("Qwen/Qwen-Image-Edit-2509") == "Qwen/Qwen-Image-Edit-2509"
    with pytest.raises(InputError, match=rf"did you mean tiny\?.*looked at tinny or {tmp_path}/models/tinny"):
        find_model("tinny")


def test_an_adapter_of_the_hub_is_downloaded(tmp_path, monkeypatch):
    """The file of a usual name, or the only one; several of other names are told apart by whoever asked."""
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr("train.record.lookup.fetch", lambda *what: asked.append(what) or tmp_path / "hub")
    (tmp_path / "hub").mkdir()
    for name in ("extra_modules.safetensors", "b.safetensors", "a.safetensors", "pytorch_lora_weights.safetensors"):
        (tmp_path / "hub" / name).write_bytes(b"")
        if name.startswith("extra"):  # it is no adapter
            continue
        if name == "a.safetensors":
            with pytest.raises(InputError, match=r"2 safetensors files \(a.safetensors, b.safetensors\): download one"):
                find_adapter("someone/lora")
        else:
            assert find_adapter("someone/lora") == tmp_path / "hub" / name
    assert asked[0] == ("someone/lora", ["*.safetensors", "adapter_config.json"])


def test_a_name_that_neither_is_here_nor_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError, match=r"no adapter at demo/lbn or runs/demo/lbn; and no folder demo/lbn, and downloading"
    ):
        find_adapter("demo/lbn")
