"""The demo: its photographs are apart, and its table says what was measured."""

import json

import numpy as np
import pytest

from data_prep.errors import InputError
from scripts import photographs
from scripts.demo_table import SHOWN, harmonic_fill, table
from tests.commands import run_script


def shown_photographs(file):
    return {
        row["image"].removesuffix("_clean.png").removesuffix("_sepia.png").split("_", 2)[2]
        for row in json.loads(file.read_text())
    }


@pytest.mark.parametrize("selection", [True, False])
def test_no_photograph_is_on_both_sides(selection, tmp_path):
    run_script(
        *("scripts/make_demo_data.py", "--out", tmp_path, "--train", "14", "--validation", "2", "--size", "32"),
        *["--selection"] * selection,
    )
    held_out, chosen_on, known = (
        {path.stem for path in paths} for paths in (photographs.HELD_OUT, photographs.SELECTION, photographs.TRAIN)
    )
    assert chosen_on < known
    assert shown_photographs(tmp_path / "validation.json") == (chosen_on if selection else held_out)
    assert shown_photographs(tmp_path / "train.json") == (known - chosen_on if selection else known)


def test_a_harmonic_fill_restores_harmonic_functions():
    """Those of the five-point Laplacian: x^2 - y^2, x y and what is linear, up to rounding (values up to 2500, 1e-16 of them)."""
    y, x = np.mgrid[:40, :50].astype(float)
    whole = np.stack([x * x - y * y, x * y, 3 * x - 2 * y + 1], -1)
    hole = np.zeros((40, 50), dtype=bool)
    hole[10:25, 12:30] = hole[30:33, 5:9] = True
    hole[12:14, 14:20] = False  # an island
    filled = harmonic_fill(np.where(hole[..., None], -1, whole), hole)
    np.testing.assert_allclose(filled, whole, rtol=0, atol=1e-9)


def test_nothing_flows_over_the_border_of_the_picture():
    whole = np.mgrid[:12, :12][0][..., None].astype(float)  # changes along the left border, which the hole touches
    hole = np.zeros((12, 12), dtype=bool)
    hole[3:8, :4] = True
    filled = harmonic_fill(np.where(hole[..., None], 0, whole), hole)
    np.testing.assert_allclose(filled, whole, rtol=0, atol=1e-9)


def method(kind, adapter, steps, psnr):
    scores = {name: {"mean": psnr + n} for n, name in enumerate(("psnr", "psnr_edited", "psnr_background"))}
    return {"kind": kind, "adapter": adapter, "steps": steps, "seconds_per_edit": psnr / 1000, "scores": scores}


def test_the_table_has_both_seeds_and_every_line():
    edits = [
        method("edit", name + suffix, steps, base + steps / 10)
        for name, base in (("lbm", 26), ("flow", 24), ("base", 18))
        for suffix in ("", "-1")
        for steps in SHOWN[name]
        if name != "base" or not suffix
    ]
    edits[0]["scores"]["psnr"]["mean"] = 25.5
    source = method("source", None, None, 17)
    source["scores"]["psnr_background"]["mean"] = 100.0
    report = {"methods": [*edits, source]}
    lines = table(
        report,
        {"psnr": 30, "psnr_edited": 21, "psnr_background": 100},
        {"psnr": 28, "psnr_edited": 32, "psnr_background": 29},
    )
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2] == "| source unchanged | 17.00 | 18.00 | equal | – |"
    assert "| **LBM**, 1 step | 25.50 / 26.10 | 27.10 / 27.10 | 28.10 / 28.10 | 0.03 |" in lines
    assert "| base model without LoRA, 20 steps | 20.00 | 21.00 | 22.00 | 0.02 |" in lines
    assert (
        "| harmonic fill of the known mask, no model | – | 21.00 | equal | – |" in lines
    )  # the whole is of other rows
    with pytest.raises(InputError, match="no flow at 20 steps"):
        table(
            {
                "methods": [
                    each
                    for each in report["methods"]
                    if (each["adapter"], each["steps"]) not in (("flow", 20), ("flow-1", 20))
                ]
            },
            {},
            {},
        )
