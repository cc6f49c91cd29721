"""`split`: whole groups of content, as many rows as asked, equal shares, rows as they were, and what is refused."""

import csv
import json
import random
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from data_prep.builders.split.command import parse_validation
from data_prep.builders.split.stratification import choose_validation
from data_prep.errors import InputError
from data_prep.rows.rows import read_rows
from scripts.photographs import HELD_OUT, TRAIN, load, random_crop
from tests.commands import run_script

pytestmark = pytest.mark.slow

SIDE = 96


def split(dataset, out, *options, check=True, processes=1):
    """Runs the command. Returns what it printed, and the new rows by their ids."""
    arguments = ["--dataset", dataset, "--out", out, "--processes", str(processes), *options]
    done = run_script("data_prep/run.py", "split", *arguments, check=check)
    lines = out.read_text().splitlines() if out.exists() else []
    return done, {row["id"]: row for row in map(json.loads, lines)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """48 rows: each photograph mirrored; the same from other files; the same photograph as another row's target; one group
    by name; two tags. A logo and a white page are in many rows and tie nothing."""
    folder, rng = tmp_path_factory.mktemp("split"), random.Random(0)
    Image.effect_noise((64, 64), 60).save(folder / "logo.png")
    Image.new("RGB", (SIDE, SIDE), "white").save(folder / "white.png")
    rows = []

    def row(kind, name, source, target, sources=None, **more):
        source.save(folder / f"{name}-source.png")
        target.save(folder / f"{name}-target.jpg", quality=90)
        sources = sources or [f"{name}-source.png"]
        rows.append(
            {"id": name, "prompt": f"mirror {kind}", "image": f"{name}-target.jpg", "edit_image": sources, **more}
        )

    for number, path in enumerate(TRAIN + HELD_OUT):
        image = random_crop(load(path), SIDE, rng, smallest=0.8)
        mirrored, tag = ImageOps.mirror(image), "half" if number % 2 else "whole"
        row("a", f"a{number}", image, mirrored, tag=tag)
        again = ImageEnhance.Brightness(image.resize((200, 200))).enhance(1.04)
        row("b", f"b{number}", again, ImageOps.flip(image), tag=tag)
        image_of_target = mirrored.resize((70, 70), Image.Resampling.LANCZOS)
        row("c", f"c{number}", image_of_target, ImageOps.invert(image), ["logo.png", f"c{number}-source.png"], tag=tag)
        rows[-1]["bridge_image"] = 1
    for number in range(2):
        rows[3 * number]["group"] = "together"
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_same_photograph_is_never_in_both(folder):
    done, rows = split(folder / "rows.jsonl", folder / "split.jsonl", "--validation", "0.25", "--stratify", "none")
    parts = defaultdict(set)
    for id, row in rows.items():
        parts["1" if id[1:] == "0" else id[1:]].add(row["split"])
    assert all(len(found) == 1 for found in parts.values())
    assert Counter(row["split"] for row in rows.values()) == {"train": 36, "validation": 12}
    old = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert list(rows) == [row["id"] for row in old]
    assert [{**row, "split": rows[row["id"]]["split"]} for row in old] == list(rows.values())
    assert "48 rows in" in done.stdout


def test_strata_have_their_shares_and_processes_and_seeds_do_what_they_should(folder):
    options = "--validation", "12", "--stratify", "tag"
    done, rows = split(folder / "rows.jsonl", folder / "tags.jsonl", *options)
    split(folder / "rows.jsonl", folder / "tags-2.jsonl", *options, processes=2)
    split(folder / "rows.jsonl", folder / "tags-3.jsonl", *options, "--seed", "1")
    counts = Counter((row["tag"], row["split"]) for row in rows.values())
    assert counts["half", "validation"] == counts["whole", "validation"] == 6
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["half", "18", "6", "25.0%"] in lines
    assert ["all", "36", "12", "25.0%"] in lines
    assert (folder / "tags.jsonl").read_bytes() == (folder / "tags-2.jsonl").read_bytes()
    assert (folder / "tags.jsonl").read_bytes() != (folder / "tags-3.jsonl").read_bytes()


def test_csv_bad_rows_and_another_folder(folder, tmp_path):
    """The paths mean the same, seen from the new file; ids by number stay; what is unusable is told, the rest survives."""
    (folder / "broken.png").write_bytes((folder / "a0-source.png").read_bytes()[:300])
    with open(folder / "rows.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["prompt", "image", "edit_image", "split", "bridge_image"])
        table.writerow(["one", "a4-target.jpg", "a4-source.png", "", ""])
        table.writerow(["two", "broken.png", "a5-source.png", "", ""])
        table.writerow(["three", "c6-target.jpg", '["logo.png", "c6-source.png"]', "train", "1"])
        table.writerow(["", "a7-target.jpg", "a7-source.png", "", ""])
        table.writerow(["five", "a8-target.jpg", str(folder / "a8-source.png"), "", ""])
    out = tmp_path / "new" / "split.jsonl"
    done, rows = split(folder / "rows.csv", out, "--validation", "1", check=False)
    assert done.returncode == 2
    assert "error: row 2" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(rows) == ["row-000001", "row-000003", "row-000005"]
    assert sorted(row["split"] for row in rows.values()) == ["train", "train", "validation"]
    rejected = [json.loads(line) for line in out.with_suffix(".rejected.jsonl").read_text().splitlines()]
    assert [line["row"] for line in rejected] == [2, 4]
    assert rejected[0]["path"] == str(folder / "broken.png")

    before = {row.id: row for row in read_rows(folder / "rows.csv") if row.id in rows}
    for row in read_rows(out):
        old = before[row.id]
        assert (row.prompt, row.image, row.edit_image) == (old.prompt, old.image, old.edit_image)
        assert row.bridge_image == old.bridge_image
    out.unlink()
    done, _ = split(folder / "rows.csv", out, "--validation", "1", "--on-error", "skip")
    assert "2 could not be used and are listed in" in done.stdout


def test_a_root_is_no_longer_needed(folder, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes((folder / "rows.jsonl").read_bytes())
    split(tmp_path / "rows.jsonl", tmp_path / "new.jsonl", "--root", str(folder), "--validation", "5")
    old, new = read_rows(folder / "rows.jsonl"), read_rows(tmp_path / "new.jsonl")
    assert [(row.id, row.image, row.edit_image) for row in old] == [(row.id, row.image, row.edit_image) for row in new]


def test_plain_pages_tie_nothing_and_a_large_group_is_told(folder, tmp_path):
    rows = [
        {"id": str(number), "prompt": "draw", "image": f"a{number}-target.jpg", "edit_image": "white.png"}
        for number in range(6)
    ]
    rows += [{**rows[number], "id": f"t{number}", "group": "large"} for number in range(5)]
    (folder / "white.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done, new = split(folder / "white.jsonl", folder / "white-split.jsonl", "--validation", "5")
    assert [id for id, row in new.items() if row["split"] == "validation"] == ["5"]
    assert "validation has 1 rows, not 5" in done.stdout
    assert "the largest group has 10" in done.stdout
    assert "(no tag)" in done.stdout


def test_what_cannot_be_is_refused_and_nothing_is_overwritten(folder, tmp_path):
    dataset = tmp_path / "rows.jsonl"
    row = {"prompt": "x", "image": str(folder / "a2-target.jpg"), "edit_image": str(folder / "a2-source.png")}
    dataset.write_text((json.dumps(row) + "\n") * 3)
    before = dataset.read_bytes()
    for out, options, words in [
        (dataset, ["--validation", "1"], "is the dataset itself"),
        (tmp_path / "new.csv", ["--validation", "1"], "--out must be a .jsonl file"),
        (tmp_path / "new.jsonl", ["--validation", "3"], "would leave no row for training"),
        (tmp_path / "new.jsonl", ["--validation", "0.5"], "all 3 rows show the same content"),
    ]:
        done = run_script("data_prep/run.py", "split", "--dataset", dataset, "--out", out, *options, check=False)
        assert done.returncode == 2
        assert words in done.stderr
        assert "Traceback" not in done.stderr
    assert dataset.read_bytes() == before
    assert not (tmp_path / "new.jsonl").exists()


def test_rows_of_another_split_are_refused_before_any_work(tmp_path):
    """Even where a picture could not be read: none was."""
    dataset, out = tmp_path / "rows.jsonl", tmp_path / "new.jsonl"
    row = {"prompt": "x", "image": "missing.png", "edit_image": "missing.png"}
    parts = [{}, {"split": "train"}, {"split": "validation"}, {"split": "test"}]
    dataset.write_text("".join(json.dumps(row | part) + "\n" for part in parts))
    done, _ = split(dataset, out, "--validation", "1", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: row 4 has the split 'test', but this command assigns every row")
    assert list(tmp_path.iterdir()) == [dataset]


@pytest.mark.parametrize("text", ["0", "1.0", "-3", "1.5", "many", "nan", "inf", ""])
def test_a_share_or_a_number(text):
    assert parse_validation("0.1") == 0.1
    assert parse_validation("200") == 200
    with pytest.raises(InputError, match="a share between 0 and 1 or a whole number"):
        parse_validation(text)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=60),
    strata=st.integers(1, 8),
    share=st.floats(0.01, 0.9),
    seed=st.integers(0, 2**16),
)
def test_whole_groups_as_many_as_fit(sizes, strata, share, seed):
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    number = min(max(1, round(share * len(groups))), len(groups) - 1)
    stratum = rng.integers(0, strata, len(groups))
    chosen = choose_validation(groups, stratum, number, np.random.default_rng(seed))
    assert all(len(set(chosen[groups == group])) == 1 for group in range(len(sizes)))
    if chosen.sum() > number:
        assert chosen.sum() == min(sizes) > number
    else:
        left_over = [size for group, size in enumerate(sizes) if not chosen[groups == group].any()]
        assert min(left_over) > number - chosen.sum()  # no other group would fit


@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.integers(1, 80), min_size=1, max_size=10), share=st.floats(0.1, 0.5), seed=st.integers(0, 99))
def test_single_rows_have_exact_shares(counts, share, seed):
    strata = np.repeat(np.arange(len(counts)), counts)
    number = max(1, round(share * len(strata)))
    if number == len(strata):
        return
    chosen = choose_validation(np.arange(len(strata)), strata, number, np.random.default_rng(seed))
    assert chosen.sum() == number
    for stratum, count in enumerate(counts):
        exact = count * number / len(strata)
        if exact >= 1:
            assert abs(chosen[strata == stratum].sum() - exact) < 1


def test_prompts_that_occur_once_and_groups_of_three():
    groups, strata = np.arange(3000) // 3, np.arange(3000)
    chosen = choose_validation(groups, strata, 300, np.random.default_rng(0))
    assert chosen.sum() == 300
