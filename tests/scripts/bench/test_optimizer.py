"""`scripts/bench/optimizer.py` measures each optimizer on tensors of the adapter's shapes."""

import json

import pytest

from scripts.bench.optimizer import KINDS, shapes
from tests.commands import run_script

pytestmark = pytest.mark.slow


def test_every_optimizer_at_the_tiny_size(tmp_path):
    file = tmp_path / "found.json"
    done = run_script("scripts/bench/optimizer.py", "--tiny", "--tensors", "48", "--json", file)
    found = json.loads(file.read_text())
    assert found["numbers"] == sum(a * b for a, b in shapes(48, 48))
    for kind in KINDS:
        assert found[kind]["ms"] > 0
        assert kind in done.stdout
    assert found["prodigy"]["operations"] < found["prodigy, library"]["operations"]


def test_shapes_are_those_of_the_real_adapter():
    sizes = shapes(1440, 1)
    assert len(sizes) == 1440
    assert round(sum(a * b for a, b in sizes) / 1e6) == 472
