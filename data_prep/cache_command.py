"""`data_prep/run.py cache`: what a cache folder holds, and making room in it."""

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from data_prep.cache.digests import keep_digests, stamp
from data_prep.cache.index import CacheFolder, Index, read_indexes
from data_prep.cache.reader import file_size, target_size
from data_prep.cache.writer import BUILDING
from data_prep.errors import InputError
from data_prep.files import remove_leftovers

SECONDS_OF_A_SHARD = 3600
"""A build that has written nothing for so long is not running any more."""
SECONDS_A_DAY = 24 * 3600


def command(
    action: Annotated[
        Literal["list", "prune"], typer.Argument(help="List the cached datasets, or delete what is no longer needed.")
    ],
    folder: Annotated[Path, typer.Option("--dir", help="Cache folder, the same as cache.dir in training.")] = Path(
        "cache"
    ),
    dataset: Annotated[
        list[str] | None, typer.Option(help="Delete the dataset with this digest, as `list` shows it. Repeatable.")
    ] = None,
    older_than: Annotated[
        float | None, typer.Option(help="Delete datasets that have not been used for this many days.", min=0)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be deleted, and delete nothing.")] = False,
) -> None:
    """Lists the datasets in a cache folder, or deletes datasets and the records that no dataset uses any more.

    Each file holds several records and is deleted when none of them is in use. Nothing is deleted while a cache is being
    built in the folder. Trainings that read a dataset that is kept are not disturbed.

    Example: python data_prep/run.py cache prune --older-than 30 --dry-run
    """
    store = CacheFolder(folder)
    if not store.path.is_dir():
        raise InputError(f"there is no folder {folder}: name the cache's with --dir")
    if action == "list":
        if dataset or older_than is not None or dry_run:
            raise InputError("--dataset, --older-than and --dry-run are options of `cache prune`, not of `cache list`")
        print("\n".join(listing(store)))
        return
    print("\n".join(prune(store, set(dataset or ()), older_than, dry_run)))


def listing(store: CacheFolder) -> Iterator[str]:
    """A line for each dataset, the one that was used last first, and a line about the rest."""
    indexes, unreadable = read_indexes(_index_paths(store))
    rest = _total(unwanted(store, indexes))
    files = {name: size for index in indexes for name, size in index.sizes.items()}
    yield f"{store.path}: {len(indexes)} datasets of {_bytes(sum(files.values()))}, and {_bytes(rest)} that none of them uses"
    for index in sorted(indexes, key=lambda index: -index.path.stat().st_mtime):
        used = datetime.fromtimestamp(index.path.stat().st_mtime).isoformat(" ", "minutes")
        size = _bytes(sum(index.sizes.values()))
        yield f"  {index.dataset}  {len(index.lines):>9} rows  {size:>11}  last used {used}  {index.name}"
    for path, error in unreadable.items():
        what = "damaged" if error.schema is None else f"of {'a later' if error.is_newer else 'an earlier'} version"
        yield f"  {_dataset(path)}  unreadable: {what}"


def prune(store: CacheFolder, names: set[str], older_than: float | None, dry_run: bool) -> Iterator[str]:
    """Deletes datasets, and then what no dataset wants. Yields what it does.

    Damaged indexes and those of earlier versions go too.

    Raises:
        InputError: a cache is being built in the folder, a dataset is not there, or an index is of a later version.
    """
    left = _left_by_builds(store)
    paths = _index_paths(store)
    if missing := sorted(names - {_dataset(path) for path in paths}):
        raise InputError(f"{store.path} has no dataset {missing[0]}: `cache list` shows what it has")
    oldest = time.time() - SECONDS_A_DAY * older_than if older_than is not None else 0.0
    doomed = [path for path in paths if _dataset(path) in names or path.stat().st_mtime < oldest]
    kept, unreadable = read_indexes(path for path in paths if path not in doomed)
    for path, error in unreadable.items():
        if error.is_newer:  # what it names cannot be known, and would go
            raise InputError(f"{path} was written by a later version of this program: prune it with that version")
    doomed += unreadable
    files = {**unwanted(store, kept), **{path: file_size(path) or 0 for path in doomed}}
    for path in doomed:
        yield f"{'would forget' if dry_run else 'forgot'} the dataset {_dataset(path)}"
    if not dry_run:
        for path in files:
            path.unlink(missing_ok=True)
        for folder in (store.path, store.latents, store.texts, store.white, store.indexes):
            remove_leftovers(folder)
        for path in left:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        keep_digests(store.digests, set(_stamps(kept)))
    yield f"{'would delete' if dry_run else 'deleted'} {len(files)} files of {_bytes(_total(files))} ({_total(files)} bytes)"


def _left_by_builds(store: CacheFolder) -> list[Path]:
    """Markers and messages of builds that were killed.

    Raises:
        InputError: a build is running.
    """
    left = list(store.work.glob("*"))  # the marker of a build that starts later is not among them, nor are its messages
    for marker in (path for path in left if path.suffix == BUILDING):
        try:
            minutes = (time.time() - marker.stat().st_mtime) / 60
        except FileNotFoundError:  # it has just ended
            continue
        if minutes * 60 < SECONDS_OF_A_SHARD:
            raise InputError(
                f"a cache is being built in {store.path}, as {marker} says, which changed {minutes:.0f} minutes ago: wait "
                "until it is done, or delete that file if the build was killed"
            )
    return left


def unwanted(store: CacheFolder, kept: Iterable[Index]) -> dict[Path, int]:
    """Files of records that none of some indexes names, and what earlier versions wrote, with their bytes."""
    wanted: set[Path] = set()
    for index in kept:
        wanted |= {store.path / name for name in index.sizes}
        sizes = map(target_size, index.lines.column("bucket").unique().to_pylist())
        wanted |= {store.sub_noise(index.header, *size) for size in sizes}
    found = {path for folder in (store.latents, store.texts, store.white) for path in folder.glob("*.arrow")}
    for earlier in store.earlier:
        found |= {earlier / "index.arrow", *earlier.glob("shards/*.arrow"), *earlier.glob("sub_noise/*.arrow")}
    return {path: path.stat().st_size for path in sorted(found - wanted)}


def _stamps(indexes: Iterable[Index]) -> Iterator[str]:
    """Of the files that rows name, as they are now."""
    for index in indexes:
        for chunk in index.lines.column("row").chunks:
            for path in {path for row in chunk.to_pylist() for path in _files(json.loads(row))}:
                try:
                    yield stamp(path, os.stat(path))
                except OSError:
                    continue


def _files(row: dict[str, Any]) -> Iterator[str]:
    yield from filter(None, (row["image"], *row["edit_image"], row["back_mask"], row["ref_gt"]))


def _index_paths(store: CacheFolder) -> list[Path]:
    return sorted(store.indexes.glob("*-*.arrow"))


def _dataset(path: Path) -> str:
    return path.stem.split("-")[0]


def _total(files: dict[Path, int]) -> int:
    return sum(files.values())


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"
