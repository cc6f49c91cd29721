"""`scripts/bench/zero.py` on two ranks: what it counts is what the plan says."""

import json

import pytest

from tests.commands import launch

BENCH = "scripts/bench/zero.py"


@pytest.mark.distributed
def test_the_plan_knows_what_two_ranks_send(tmp_path):
    """To the byte but for DeepSpeed's own: paddings of ZeRO-2, and the last block, which ZeRO-3 need not gather twice."""
    file, layers, accumulated = tmp_path / "zero.json", 3, 2
    launch(2, BENCH, "--tiny", "--layers", str(layers), "--accumulate", str(accumulated), "--json", file)
    rows = json.loads(file.read_text())["rows"]
    assert list(rows) == ["ddp", "zero2", "zero3"]
    assert [row["loss"] for row in rows.values()] == pytest.approx([rows["ddp"]["loss"]] * 3, rel=1e-5)
    assert rows["ddp"]["collectives"] == 1
    assert rows["zero3"]["collectives"] <= 4 * layers * accumulated + 10
    assert rows["ddp"]["MB"] == pytest.approx(rows["ddp"]["planned MB"], rel=1e-9)
    assert rows["zero2"]["MB"] == pytest.approx(rows["zero2"]["planned MB"], rel=1e-3)
    last = 1 / (2 * layers)
    assert (1 - last) * rows["zero3"]["planned MB"] <= rows["zero3"]["MB"] <= 1.01 * rows["zero3"]["planned MB"]


@pytest.mark.slow
def test_one_process_has_nothing_to_send(tmp_path):
    file = tmp_path / "zero.json"
    launch(1, BENCH, "--tiny", "--layers", "2", "--json", file)
    rows = json.loads(file.read_text())["rows"]
    assert [row["collectives"] for row in rows.values()] == [0, 0]
    assert rows["single"]["loss"] == rows["zero3"]["loss"]
