"""Votes of blind comparisons: kept line by line, counted by hand."""

import json
import threading
from dataclasses import replace

import pytest

from eval.page.tabs.compare_tab import standings_html
from eval.page.tabs.votes import Contestant, Standing, Vote, append_vote, read_votes, standings

LBM, FLOW = Contestant("lbm/step-000400", "a1"), Contestant("flow/step-000400", "b2")
BASE = Contestant("Base model, no adapter")


def vote(a: Contestant, b: Contestant, choice, number: int = 0) -> Vote:
    return Vote("2026-01-01T00:00:00+00:00", a, b, choice, "Sharpen “it”\n编辑", number, "s", ("x", "y"), "anna")


@pytest.mark.parametrize(
    ("wins", "losses", "low", "high"),
    [
        # (p + z²/2n ± z·sqrt(p(1−p)/n + z²/4n²)) / (1 + z²/n) with z = 1.959964, by hand
        (8, 2, 0.490162, 0.943318),
        (5, 5, 0.236593, 0.763407),
        (5, 0, 0.565518, 1.0),
        (0, 5, 0.0, 0.434482),
        (60, 40, 0.502003, 0.690599),
    ],
)
def test_the_interval_is_wilsons(wins, losses, low, high):
    table = Standing(LBM, FLOW, wins, losses, ties=7)  # ties move nothing
    assert table.win_rate == wins / (wins + losses)
    assert table.interval == pytest.approx((low, high), abs=2e-6)


def test_without_a_decided_vote_there_is_no_rate():
    table = Standing(LBM, FLOW, 0, 0, ties=3)
    assert (table.win_rate, table.interval) == (None, None)
    assert "–" in standings_html([table])


def test_votes_are_counted_by_pair_whichever_side_was_which():
    votes = [vote(LBM, FLOW, "A"), vote(FLOW, LBM, "B"), vote(FLOW, LBM, "A"), vote(LBM, FLOW, "tie")]
    votes += [vote(BASE, LBM, "A")]
    assert standings(votes) == [Standing(LBM, FLOW, 2, 1, 1), Standing(BASE, LBM, 1, 0, 0)]


def test_another_training_of_one_name_is_another_contestant():
    again = Contestant(LBM.name, "c3")
    (table,) = standings([vote(LBM, again, "B")])
    assert (table.first, table.wins) == (again, 1)
    assert "c3</small>" in standings_html([table])  # told apart


@pytest.mark.parametrize("change", [{"model": "f2"}, {"base": "sdxl"}, {"steps": 8}, {"sampler": "cfg_scale=1"}])
def test_what_decides_the_picture_is_a_contestant_of_its_own(tmp_path, change):
    """Two models of one output folder, say; and votes of before it was kept are still read."""
    base = Contestant("Base model, no adapter", "", 1.0, "qwen-image-edit", "a1", 4, "cfg_scale=4")
    for number, each in enumerate((base, replace(base, **change), BASE)):
        append_vote(tmp_path / "votes.jsonl", vote(each, LBM, "A", number))
    old = json.loads((tmp_path / "votes.jsonl").read_text().splitlines()[-1])
    for side in ("a", "b"):
        old[side] = {name: old[side][name] for name in ("name", "digest", "weight")}
    with (tmp_path / "votes.jsonl").open("a") as file:
        file.write(json.dumps(old) + "\n")
    tables = standings(read_votes(tmp_path / "votes.jsonl"))
    assert [(table.first, table.wins) for table in tables] == [(BASE, 2), (base, 1), (replace(base, **change), 1)]
    if "sampler" not in change:
        first, second = (standings_html([table]) for table in tables[1:])
        assert first != second


def test_votes_survive_and_a_half_written_line_spoils_only_itself(tmp_path, caplog):
    path = tmp_path / "page" / "votes.jsonl"
    assert read_votes(path) == []
    append_vote(path, vote(LBM, FLOW, "A", 1))
    with path.open("a") as file:
        file.write('{"time": "2026-0')  # killed
    append_vote(path, vote(LBM, FLOW, "tie", 2))
    assert [each.seed for each in read_votes(path)] == [1, 2]
    assert read_votes(path)[0] == vote(LBM, FLOW, "A", 1)
    assert "line 2 is not a vote" in caplog.text
    with path.open("a") as file:
        file.write('{"choice": "C"}\n[]\n')
    assert len(read_votes(path)) == 2


def test_votes_at_one_moment_do_not_mix(tmp_path):
    path = tmp_path / "votes.jsonl"
    threads = [
        threading.Thread(target=lambda n=n: [append_vote(path, vote(LBM, FLOW, "A", n)) for _ in range(20)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = path.read_text().splitlines()
    assert len(lines) == 80
    assert sorted(json.loads(line)["seed"] for line in lines) == sorted(list(range(4)) * 20)


def test_names_are_escaped():
    html = standings_html([Standing(Contestant("<b>x"), FLOW, 3, 1, 0)])
    assert "&lt;b&gt;x" in html
    assert "75% <small>(30% – 95%)</small>" in html  # Wilson of 3 in 4: 0.3006 to 0.9544
