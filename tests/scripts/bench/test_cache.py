"""`scripts/bench/cache.py` writes and reads by turns with DiffSynth and torch."""

import json

import pytest

from tests.commands import run_script


@pytest.mark.slow
def test_every_part(tiny_model_dir, tmp_path):
    file = tmp_path / "found.json"
    run_script("scripts/bench/cache.py", "--tiny", "--model", tiny_model_dir, "--json", file)
    rows = json.loads(file.read_text())["rows"]
    assert [name for name in rows if "ours" in name] == ["write 64x64, ours", "read 64x64, ours"]
    assert all(rows[name]["records/s"] > 0 for name in ("DiffSynth's data-process task", "torch.load"))
    assert rows["read 64x64, ours"]["MB a record"] <= rows["torch.load"]["MB a record"]
    assert rows["a reader of 1000 rows"]["bytes a row"] >= 0
