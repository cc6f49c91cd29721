"""The list of planted faults fits the code that it changes."""

from collections import Counter

import pytest

from scripts.bench.mutants import FAULTS
from tests.commands import ROOT


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.file}: {fault.old}")
def test_what_is_changed_stands_once_and_what_must_catch_it_is_there(fault):
    text = (ROOT / fault.file).read_text(encoding="utf-8")
    assert text.count(fault.old) == 1
    compile(text.replace(fault.old, fault.new), fault.file, "exec")
    assert (ROOT / "tests" / fault.tests).is_file()


def test_no_fault_is_listed_twice():
    assert max(Counter((fault.file, fault.old, fault.new) for fault in FAULTS).values()) == 1
