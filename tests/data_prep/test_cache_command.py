"""`data_prep/run.py cache`: what a cache folder holds, and what goes."""

import json
import os
import re
import time
from pathlib import Path

import pytest

from data_prep.cache.index import CacheFolder
from data_prep.cache.shards import read_table, write_arrow
from data_prep.cache_command import command
from data_prep.errors import InputError
from tests.caching import CacheReader, cache_dataset, newest, write_dataset, write_rows


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def caches(tmp_path, tiny_model_dir):
    """Two datasets of three rows, two to a shard: the second row is in both."""
    rows, cache = write_rows(tmp_path, 4), tmp_path / "cache"
    options = {"model_dir": tiny_model_dir, "shard_size": 1}
    one = cache_dataset(write_dataset(tmp_path, rows[:2]), cache, name="one.json (train)", **options)
    two = cache_dataset(write_dataset(tmp_path, rows[1:3]), cache, name="two.json (train)", **options)
    return cache, one.dataset, two.dataset


def test_list_shows_datasets_and_prune_keeps_what_another_dataset_wants(caches, capsys):
    cache, one, two = caches
    command("list", cache)
    total, *lines = capsys.readouterr().out.splitlines()
    assert "2 datasets" in total
    assert total.endswith("and 0 B that none of them uses")
    assert re.fullmatch(rf"  {two} +2 rows +[\d.]+ KiB  last used [-\d]+ [\d:]+  two.json \(train\)", lines[0])
    assert lines[1].endswith("one.json (train)")

    before = files(cache)
    size = sum(path.stat().st_size for path in before)
    command("prune", cache, [one], dry_run=True)
    said = capsys.readouterr().out
    assert files(cache) == before
    command("prune", cache, [one])
    # its index, latents and text of its first row; white of that size is of the other dataset's too
    number = int(re.search(r"deleted 3 files of .* \((\d+) bytes\)", capsys.readouterr().out)[1])
    assert f"would delete 3 files of {number / 1024:.1f} KiB ({number} bytes)" in said
    digests = cache / "digests.arrow"
    assert size - sum(path.stat().st_size for path in files(cache)) == pytest.approx(number, abs=10 * 1024)
    assert before - files(cache) <= {*cache.glob("*/*"), digests} | before
    assert [record.id for record in CacheReader(cache)] == ["r1", "r2"]
    command("prune", cache)
    assert "deleted 0 files" in capsys.readouterr().out


def test_what_was_not_used_for_long_goes(caches):
    cache, one, _ = caches
    [old] = cache.glob(f"indexes/{one}-*.arrow")
    os.utime(old, (0, 0))
    command("prune", cache, older_than=30)
    assert [record.id for record in newest(cache)] == ["r1", "r2"]
    assert len(list(cache.glob("indexes/*"))) == 1


def test_what_is_being_read_stays_however_long_ago_it_was_opened(caches, monkeypatch):
    cache, one, _ = caches
    reader, now = CacheReader(cache, one), time.monotonic()
    [index] = cache.glob(f"indexes/{one}-*.arrow")
    os.utime(index, (0, 0))
    reader[0]
    assert index.stat().st_mtime == 0, "once an hour is enough"
    monkeypatch.setattr(time, "monotonic", lambda: now + 3700)
    reader[0]
    command("prune", cache, older_than=2)
    assert index.is_file()
    assert [record.id for record in reader] == ["r0", "r1"]


def test_an_unreadable_index_stops_nobody_and_goes(caches, capsys):
    cache, one, two = caches
    (cache / "indexes/aa-1.arrow").write_text("nonsense")
    (cache / "indexes/bb-1.arrow").write_text("")
    [path] = cache.glob(f"indexes/{two}-*.arrow")
    lines = read_table(path)
    header = json.loads((lines.schema.metadata or {})[b"header"])

    def write_schema(version: int) -> None:
        metadata = {"header": json.dumps(header | {"schema_version": version})}
        write_arrow(cache / f"indexes/{one}-0.arrow", [], lines.schema.with_metadata(metadata))

    write_schema(1)
    assert [record.id for record in CacheReader(cache, one)] == ["r0", "r1"]
    with pytest.raises(InputError, match=r"no index of this dataset .* but of one.json"):
        CacheReader(cache, "cc")
    with pytest.raises(InputError, match="is damaged"):
        CacheReader(cache, "aa")
    command("list", cache)
    said = capsys.readouterr().out
    assert all(f"  {name}  unreadable: damaged" in said for name in ("aa", "bb"))
    assert f"  {one}  unreadable: of an earlier version" in said
    assert f"  {two} " in said

    write_schema(99)
    with pytest.raises(
        InputError, match=f"{one}-0.arrow was written by a later version of this program: prune it with that version"
    ):
        command("prune", cache)
    write_schema(1)
    command("prune", cache)
    assert "deleted 3 files" in capsys.readouterr().out
    assert {path.stem.split("-")[0] for path in cache.glob("indexes/*")} == {one, two}


def test_nothing_goes_while_a_cache_is_being_built(caches):
    cache, *_ = caches
    marker = CacheFolder(cache).work / "job.building"
    marker.touch()
    with pytest.raises(InputError, match=r"is being built in .*job.building says, which changed 0 minutes ago: wait"):
        command("prune", cache)
    os.utime(marker, (0, 0))
    (cache / "work/ended.building").symlink_to("what was there when the folder was listed")
    (cache / "work/job").mkdir()
    (cache / "work/job/keys-0.json").write_text("[]")
    command("prune", cache, dry_run=True)
    assert marker.exists()
    command("prune", cache)
    assert not list(cache.glob("work/*"))


def test_caches_of_earlier_versions_go(caches, capsys):
    cache, *_ = caches
    (cache / "train/shards").mkdir(parents=True)
    for name in ("index.arrow", "shards/a.arrow"):
        (cache / "train" / name).write_bytes(b"12345")
    command("prune", cache)
    assert "deleted 2 files of 10 B" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prune", Path("nowhere")), "there is no folder nowhere: name the cache's with --dir"),
        (
            ("list", Path(), ["x"]),
            "--dataset, --older-than and --dry-run are options of `cache prune`, not of `cache list`",
        ),
        (("prune", Path(), ["x"]), "has no dataset x: `cache list` shows what it has"),
    ],
)
def test_wrong_wishes_are_one_sentence(arguments, message):
    with pytest.raises(InputError, match=message):
        command(*arguments)
