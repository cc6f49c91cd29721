"""`scripts/bench/data_prep.py` runs, and its verdict is that of its numbers."""

import re

import pytest

from tests.commands import run_script

pytestmark = pytest.mark.slow

BENCH = "scripts/bench/data_prep.py"


def test_speed_of_both_commands():
    done = run_script(BENCH, "--only", "speed", "--pairs", "20", "--size", "64", "--processes", "1,2")
    rates = re.findall(r"^(\w+) +(\d) +([\d.]+)$", done.stdout, re.MULTILINE)
    assert [(name, count) for name, count, _ in rates] == [
        ("pairs", "1"),
        ("check", "1"),
        ("pairs", "2"),
        ("check", "2"),
    ]
    assert all(float(rate) > 0 for *_, rate in rates)


def test_memory_of_each_format_and_the_verdict():
    """A few thousand rows say little about bytes a row: buffers that are there once are counted as if they grew."""
    done = run_script(BENCH, "--only", "memory", "--rows", "1000,20000", "--limit=-1e9", check=False)
    assert done.returncode == 1
    kinds = ["read .jsonl", "read .csv", "read .parquet", "read .json", "check, index and duplicates"]
    lines = done.stdout.splitlines()[1:]
    assert [line[: len(kind)] for line, kind in zip(lines, kinds, strict=True)] == kinds
    assert [line.endswith("TOO MUCH") for line in lines] == [True, True, True, False, True]
    for line in lines:
        few, many, growth = map(float, re.search(r"(\d+) MB +(\d+) MB +(-?\d+)", line).groups())
        assert abs(growth - (many - few) * 2**20 / 19_000) < 2**20 / 19_000 + 1


def test_numbers_of_rows_in_the_wrong_order():
    done = run_script(BENCH, "--rows", "20,10", check=False)
    assert done.returncode == 2
    assert "the smaller one first" in done.stderr
