"""What `check` keeps of a row: under 200 bytes, and all that findings across rows need."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep.check.measures.column_store import CHUNK, Columns
from data_prep.check.overlaps import cross_findings
from data_prep.check.report.summary import lay_out
from data_prep.model.geometry import Geometry
from data_prep.rows.duplicates import HASH_BYTES
from data_prep.rows.rows import Row
from tests.commands import ROOT

GROWTH = """
import sys
from pathlib import Path
import numpy as np
from data_prep.check.findings import Limits
from data_prep.check.survey import Survey
from data_prep.rows.duplicates import HASH_BYTES
from data_prep.model.geometry import Geometry
from data_prep.jobs.items import Done, Item
from data_prep.rows.rows import Row

rng, folder = np.random.default_rng(0), Path(sys.argv[1])

def peak_after(number):
    survey, seen = Survey(folder, Limits(Geometry(1024 * 1024))), set()
    for index in range(1, number + 1):
        row = Row(index, f"row {index}", f"prompt {index}", folder, (folder,), split="train" if index % 50 else "validation")
        seen.add(hash(row.id))  # as reading keeps them
        hashes = [rng.bytes(HASH_BYTES).hex() for _ in range(2)]
        measured = {"sizes": [[512, 512]] * 2, "tokens": 9, "conversions": [], "alike": None, "turn": None}
        measured |= {"drift": [0.0] * 3, "mask": None, "hashes": hashes, "digest": rng.bytes(8).hex()}
        survey.add(row, Done(Item(index, row.id), measured))
    del seen
    survey.finish()
    survey.close()
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024

few = peak_after(30_000)
print((peak_after(90_000) - few) / 60_000)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_memory_grows_by_less_than_200_bytes_a_row(tmp_path):
    """With two pictures a row that are like no others, the worst case."""
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert 50 < float(done.stdout) < 200


def measured(hashes: list[bytes], digest: int = 0, **values) -> dict:
    """A measurement of two 64 x 64 pictures."""
    return {
        "sizes": [[64, 64], [64, 64]],
        "tokens": 4,
        "drift": None,
        "hashes": [value.hex() for value in hashes],
        "digest": f"{digest:016x}",
        **values,
    }


def test_columns_come_back_over_many_chunks(tmp_path):
    columns, rng = Columns(tmp_path), np.random.default_rng(0)
    number = 2 * CHUNK + 5
    values = [[rng.bytes(HASH_BYTES) for _ in range(2)] for _ in range(number)]
    for index in range(number):
        if index % 7 == 3:
            columns.add_unusable()
        else:
            row = Row(index + 1, f"{index}", "p", Path("a"), (Path("b"),), split=f"s{index % 3}")
            columns.add(row, measured(values[index], index, drift=[index, -index, 0.5] if index % 2 else None))
    usable = np.arange(number) % 7 != 3
    assert np.array_equal(columns["usable"], usable)
    assert np.array_equal(columns["digest"], np.where(usable, np.arange(number), 0))
    assert columns["hashes"][-1].tobytes() == b"".join(values[-1])
    assert np.array_equal(columns.in_split("s1"), usable & (np.arange(number) % 3 == 1))
    x = columns["drift"][:, 0]
    assert np.array_equal(np.isnan(x), usable & (np.arange(number) % 2 == 0))
    columns.close()


def test_of_two_rows_the_later_is_the_duplicate_and_the_trained_one_the_leak(tmp_path):
    """Numbers by hand. Prompts differ unless they are named."""
    rng = np.random.default_rng(1)
    a, b, c, d, e, f, g, h, i, j = (rng.bytes(HASH_BYTES) for _ in range(10))
    plain = bytes(HASH_BYTES)
    table = [  # split, source, target, prompt, digest, group
        ("train", a, b, "x", 1, ""),
        ("train", a, b, "x", 1, ""),  # 2: the same as 1
        ("validation", a, b, "x", 1, ""),  # 3: held out; 1 and 2 leak it
        ("train", c, d, "y", 2, ""),
        ("train", c, d, "y", 3, ""),  # 5: nearly the same as 4
        ("train", c, d, "z", 4, ""),  # another prompt for the same pictures
        ("train", c, e, "y", 5, ""),  # another edit of the same source
        ("train", f, g, "v", 6, "holiday"),  # 8: leaks the group of 9
        ("validation", h, i, "w", 7, "holiday"),
        ("train", plain, plain, "u", 8, ""),
        ("validation", plain, plain, "t", 9, ""),  # plain pictures show nothing
        ("train", i, j, "s", 10, ""),  # 12: its source is the target of 9
    ]
    columns = Columns(tmp_path)
    for number, (split, source, target, prompt, digest, group) in enumerate(table, 1):
        row = Row(number, str(number), prompt, Path("t"), (Path("s"),), split=split, group=group)
        columns.add(row, measured([source, target], digest))
    found = [(each.row, each.kind, each.other_row) for each in cross_findings(columns, frozenset())]
    assert sorted(found) == [
        (1, "leak", 3),
        (2, "duplicate", 1),
        (2, "leak", 3),
        (5, "near_duplicate", 4),
        (8, "leak", 9),
        (12, "leak", 9),
    ]
    assert {kind for _, kind, _ in found} - {"leak"} == {
        each.kind for each in cross_findings(columns, frozenset({"leak"}))
    }
    columns.close()


def test_a_layout_of_nothing_is_empty(tmp_path):
    columns = Columns(tmp_path)
    columns.add_unusable()
    layout = lay_out(columns, Geometry(64 * 64))
    assert (layout.rows, layout.buckets, layout.cache_bytes) == (0, (), 0)
    assert json.dumps(vars(layout.groups(4))) == '{"size": 4, "groups": 0, "empty_places": 0, "small_buckets": 0}'
    columns.close()
