"""Long jobs: the answers do not depend on the number of processes, and what is done is not done again."""

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.jobs.engines import local_engine
from data_prep.jobs.items import Done, Item, Result, run_items
from data_prep.rows.images import RejectedImage
from data_prep.rows.rows import RejectedRow
from data_prep.rows.tables import BadRow
from tests.children import PATIENCE, ROOT, started, wait_until


@dataclass(frozen=True)
class Shout:
    """Writes a file per item, notes down which it did, and refuses some."""

    folder: Path = field(repr=False)
    mark: str = "!"

    def __call__(self, item: Item) -> Result:
        with open(self.folder / "log", "a") as log:
            log.write(f"{item.id}\n")
        if item.values == "refuse":
            raise BadRow("refused")
        if item.values == "broken":
            raise RejectedImage(Path("a.png"), "broken")
        if item.values == "wait":
            (self.folder / "waiting").touch()
            time.sleep(120)
        if item.values == "die":
            os._exit(9)
        name = Path(f"{item.id}.txt")
        (self.folder / name).write_text(item.id + self.mark, encoding="utf-8")
        return Result({"text": item.id + self.mark}, (name,))


def items(count: int, special: dict[int, str] | None = None, files: Iterable[Path] = ()) -> list[Item]:
    names = list(files) or [()] * count
    return [
        Item(number, f"i{number}", (name,) if name else (), (special or {}).get(number))
        for number, name in zip(range(1, count + 1), names, strict=True)
    ]


def run(folder: Path, todo: Iterable[Item | RejectedRow], processes: int = 1, mark: str = "!") -> list:
    answers = run_items(todo, Shout(folder, mark), folder / ".parts", local_engine(processes), "shouting")
    return [(each.item.number, each.value["text"]) if isinstance(each, Done) else each for each in answers]


def log(folder: Path) -> list[str]:
    """What was done since the last call."""
    path = folder / "log"
    lines = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


@pytest.mark.parametrize("processes", [1, 3])
def test_answers_come_in_order_whatever_the_processes(processes, tmp_path):
    refused = RejectedRow(0, "before", "table.csv", "not an item")
    todo = [refused, *items(90, {3: "refuse", 50: "broken"})]
    answers = run(tmp_path, todo, processes)
    expected: list = [refused, *((number, f"i{number}!") for number in range(1, 91))]
    expected[3] = RejectedRow(3, "i3", "i3", "refused")
    expected[50] = RejectedRow(50, "i50", "a.png", "broken")
    assert answers == expected


def test_a_second_run_does_only_what_was_refused(tmp_path):
    first = run(tmp_path, items(90, {3: "refuse"}))
    assert len(log(tmp_path)) == 90
    assert run(tmp_path, items(90, {3: "refuse"})) == first
    assert log(tmp_path) == ["i3"]
    run(tmp_path, items(90))
    assert log(tmp_path) == ["i3"]
    run(tmp_path, items(90))
    assert log(tmp_path) == []


def test_one_more_item_changes_one_part(tmp_path):
    run(tmp_path, items(300))
    log(tmp_path)
    run(tmp_path, [Item(1, "new"), *items(300)])
    assert "new" in (done := log(tmp_path))
    assert len(done) <= 65


def test_a_changed_file_a_lost_result_or_another_option_is_done_again(tmp_path):
    source = tmp_path / "source"
    source.write_text("a")
    todo = items(1, files=[source])
    for change, repeated in (
        (lambda: None, True),
        (lambda: None, False),
        (lambda: source.write_text("changed"), True),
        (lambda: (tmp_path / "i1.txt").unlink(), True),
        (lambda: source.unlink(), True),
        (lambda: None, False),
    ):
        change()
        run(tmp_path, todo)
        assert bool(log(tmp_path)) is repeated
    assert run(tmp_path, todo, mark="?") == [(1, "i1?")]


def test_going_back_to_an_earlier_option_makes_its_results_again(tmp_path):
    for mark in "!?!":
        run(tmp_path, items(40), mark=mark)
        assert {path.read_text()[-1] for path in tmp_path.glob("*.txt")} == {mark}


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"garbage\n" + data]
)
def test_a_damaged_part_is_made_again(damage, tmp_path):
    expected = run(tmp_path, items(40))
    for part in (tmp_path / ".parts").iterdir():
        part.write_bytes(damage(part.read_bytes()))
    assert run(tmp_path, items(40)) == expected


WAITING = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from data_prep.jobs.engines import local_engine
from data_prep.jobs.items import run_items
from tests.data_prep.jobs.test_items import Shout, items
folder = Path(sys.argv[1])
for answer in run_items(items(5000, {{300: "wait"}}), Shout(folder), folder / ".parts", local_engine(2), "shouting"):
    pass
"""


@pytest.mark.slow
def test_workers_end_with_the_main_process(tmp_path):
    command = [sys.executable, "-c", WAITING.format(root=str(ROOT)), str(tmp_path)]
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as main:
        wait_until((tmp_path / "waiting").exists, main)
        main.kill()
        main.communicate(timeout=PATIENCE)  # returns when all that hold its pipes are gone


def test_a_worker_that_is_killed_ends_the_job_and_the_next_run_continues(tmp_path):
    with pytest.raises(RuntimeError, match="a worker process was killed"):
        run(tmp_path, items(200, {150: "die"}), processes=2)
    done = set(log(tmp_path))
    run(tmp_path, items(200))
    assert done
    assert len(log(tmp_path)) < 200


@given(
    ids=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="/\0\n\r"), min_size=1, max_size=8),
        unique=True,
        max_size=9,
    )
)
def test_any_text_survives(ids, tmp_path_factory):
    folder = tmp_path_factory.mktemp("items")
    todo = [Item(number, f"x{id}") for number, id in enumerate(ids, 1) if len(id.encode(errors="ignore")) < 60]
    for _ in range(2):  # made, and then read
        assert run(folder, todo) == [(item.number, item.id + "!") for item in todo]
