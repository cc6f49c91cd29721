"""The lines of docs/editing.md that edit from Python, as they stand there."""

import re

import numpy as np
import pytest
from PIL import Image

import eval as package
from data_prep.model.geometry import Geometry
from data_prep.rows.images import open_image
from eval.bases.auto import open_editor
from eval.request.knobs import AdapterUse
from eval.request.placement import make_placement
from eval.request.request import EditRequest
from tests.adapters import write_adapter
from tests.commands import ROOT
from tests.pictures import save

SMALL = Geometry(max_pixels=64 * 64, vision_pixels=56 * 56)


def test_the_documented_lines_edit(tiny_model_dir, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models/tiny").symlink_to(tiny_model_dir)
    write_adapter(tmp_path / "runs/mine", tiny_model_dir, "lbm", SMALL, bridge_noise=0.0)
    save(tmp_path / "photo.png", 3, (64, 64))
    monkeypatch.chdir(tmp_path)
    section = (ROOT / "docs/editing.md").read_text(encoding="utf-8").partition("## From Python")[2]
    code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    assert len([line for line in code.splitlines() if line]) <= 5
    exec(compile(code, "editing.md", "exec"), {})
    request = EditRequest(
        "Remove the sticker.", [open_image("photo.png")], adapters=[AdapterUse(tmp_path / "runs/mine")], seed=7
    )
    (expected,) = open_editor(str(tiny_model_dir), make_placement()).edit(request)
    assert np.array_equal(np.array(Image.open("result.png")), np.array(expected.image))


def test_another_name_is_none_of_the_package():
    with pytest.raises(AttributeError, match="module 'eval' has no attribute 'nothing'"):
        _ = package.nothing
