"""The command export.py: what docs/use_elsewhere.md prints runs as it stands there, on the tiny model; and its mistakes."""

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import QwenImageEditPlusPipeline, QwenImageTransformer2DModel
from huggingface_hub import constants

from data_prep.errors import InputError
from data_prep.model.geometry import Geometry
from eval import export
from eval.request.knobs import AdapterUse
from tests.adapters import write_adapter
from tests.commands import ROOT, run_script
from train.model.adapter_files import read_header

PAGE = (ROOT / "docs/use_elsewhere.md").read_text(encoding="utf-8")
SMALL = Geometry(max_pixels=64 * 64, vision_pixels=56 * 56)


def section(name: str) -> str:
    return re.split(r"\n## ", PAGE.split(f"\n## {name}\n")[1])[0]


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", section(name), re.DOTALL)


@pytest.fixture(scope="module")
def workspace(tiny_model_dir, tmp_path_factory) -> Path:
    """`models/tiny`, and two runs."""
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "models").mkdir()
    (folder / "models" / "tiny").symlink_to(tiny_model_dir)
    for name in ("tiny", "other"):
        checkpoints = folder / "runs" / name / "checkpoints"
        write_adapter(checkpoints / "step-000001", tiny_model_dir, "lbm", SMALL, sigmas=[1.0, 0.5])
        (checkpoints / "latest").write_text("step-000001\n")
    return folder


@pytest.fixture(scope="module")
def done(workspace) -> dict[str, str]:
    """What each command of the section "Files" printed, in order."""
    printed = {}
    for line in "".join(blocks("Files", "bash")).splitlines():
        python, *words = shlex.split(line)
        assert python == "python"
        printed[line] = run_script(ROOT / words[0], *words[1:], cwd=workspace).stdout
    return printed


def test_every_command_of_the_page(done, workspace):
    assert len(done) == 6
    assert "objective" in (inspected := next(iter(done.values())))
    assert re.search(r"^steps +1 or 2$", inspected, re.MULTILINE)
    assert {"merged", "merged.gguf", "kohya.safetensors", "common.safetensors"} <= {p.name for p in workspace.iterdir()}
    assert read_header(workspace / "common.safetensors")["sigmas"] == "[1.0, 0.5]"
    assert [name for name in workspace.iterdir() if name.name.startswith(".")] == []


@pytest.mark.parametrize("number", [0, 1, 2])
def test_every_snippet_of_the_page(done, workspace, tiny_model_dir, monkeypatch, number):
    """Those of the section "diffusers" are run by `exports/test_stock_diffusers.py`."""
    monkeypatch.chdir(workspace)
    code = blocks("Files", "python")
    assert len(code) == 3
    names: dict[str, Any] = {"pipe": SimpleNamespace()} if number == 2 else {}
    own = code[number].replace("Qwen/Qwen-Image-Edit-2511", str(tiny_model_dir)).replace("bfloat16", "float32")
    exec(compile(own, "page", "exec"), names)
    if number == 2:
        told = read_header(workspace / "runs/tiny/checkpoints/step-000001/adapter_model.safetensors")
        kept = ("objective", "loss", "sigmas", "geometry")
        assert {key: names["pipe"].header[key] for key in kept} == {key: told[key] for key in kept}
        return
    assert isinstance(names["transformer"], QwenImageTransformer2DModel)
    if number == 0:
        assert isinstance(names["pipe"], QwenImageEditPlusPipeline)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("merge --model models/tiny --adapter runs/nope --out x", "no adapter at runs/nope"),
        ("merge --model models/tiny --adapter runs/tiny --out models", "--out models is there already"),
        ("merge --model models/tiny --adapter runs/tiny --out x --gguf Q8_0", "--out must end in .gguf, got x"),
        (
            "merge --model models/tiny --adapter runs/tiny --out x.gguf --gguf Q8_0 --whole",
            "leave out --dtype and --whole",
        ),
        (
            "merge --model models/none --adapter runs/tiny --out x",
            "no folder models/none, and downloading it from",
        ),
        ("merge --model models/tiny --out x", "Missing option '--adapter'"),
        ("convert runs/tiny --to comfy --out x.safetensors", "'comfy' is not one of 'kohya', 'diffusers', 'common'"),
        ("convert runs/tiny --to kohya --out x", "--out must end in .safetensors, got x"),
        ("inspect models/tiny/model_index.json", "is not a readable safetensors file"),
        ("inspct x", "No such command 'inspct'"),
    ],
)
def test_mistakes(workspace, monkeypatch, capsys, words, message):
    """One sentence and code 2."""
    monkeypatch.chdir(workspace)
    monkeypatch.setattr("sys.argv", ["export.py", *words.split()])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as ended:
        export.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert not (workspace / "x").exists()


def test_help_and_mistakes_come_without_torch(workspace):
    code = "import sys; sys.argv = ['eval/export.py', *sys.argv[1:]]; sys.path[0] = ''; import eval.export as e\n"
    code += "try: e.main()\nexcept SystemExit as ended: print(ended.code, 'torch' in sys.modules)"
    words = ["merge", "--model", "x", "--adapter", "nope", "--out", "y"]
    for given, ended in ((words, "2 False"), (["convert", "--help"], "0 False")):
        assert run_script("-c", code, *given, fresh=True, cwd=ROOT).stdout.splitlines()[-1] == ended


def test_json_is_for_programs(workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    export.inspect("runs/tiny", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["method"], found["steps"], found["header"]["objective"]) == ("LoRA", [1, 2], "lbm")


def test_a_merged_bridge_is_announced(workspace, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    export.merge(model="models/tiny", adapter=[AdapterUse.parse("runs/tiny")], out=tmp_path / "merged", dtype="fp32")
    assert "this is a bridge, whose sampler starts at the source" in capsys.readouterr().err
    made = QwenImageTransformer2DModel.from_pretrained(tmp_path / "merged")
    assert made.dtype == torch.float32
    with pytest.raises(InputError, match="is there already"):
        export.merge(model="models/tiny", adapter=[], out=tmp_path / "merged")
