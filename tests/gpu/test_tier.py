"""The tier is whole: whatever runs on a GPU alone is named with a test that takes its branches on the CPU."""

import re

from tests.children import ROOT
from tests.gpu.test_editing import PLACES, WAYS
from tests.gpu.test_training import VARIANTS


def test_every_twin_is_a_test():
    sources = {path: path.read_text() for path in (ROOT / "tests/gpu").glob("test_*.py")}
    named = {twin for table in (WAYS, PLACES, VARIANTS) for each in table.values() if (twin := each.twin)}
    named |= {
        f"{path}::{test}" for source in sources.values() for path, test in re.findall(r'"([\w/]+\.py)::(\w+)"', source)
    }
    assert len(named) > 20
    for twin in named:
        path, _, test = twin.partition("::")
        assert f"def {test}(" in (ROOT / "tests" / path).read_text(), twin
