"""The folders source*/ target/ mask/ ref_gt/ caption/ beside each other: which files in them belong together."""

import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.builders.pairs.captions import ENDINGS
from data_prep.errors import InputError
from data_prep.jobs.items import Item
from data_prep.rows.folders import walk_files
from data_prep.rows.images import RejectedImage, image_suffixes
from data_prep.rows.rows import MAX_SOURCES, RejectedRow

LAYOUT = (
    "it must hold the folders source/ (or source_1/, source_2/ …) and target/, and may hold mask/, ref_gt/ and caption/"
)


@dataclass(frozen=True)
class Files:
    """The files of one folder: their stem, which is the path below it without the ending -> their endings (one, unless
    names clash), or their paths below it where these are not the stem and an ending. It takes few bytes a file."""

    path: Path
    pictures: dict[str, tuple[str, ...]] = field(default_factory=dict)
    captions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)
    """Ending -> how many files are neither."""

    def find(self, stem: str) -> list[str]:
        """The pictures of this stem."""
        return [str(self.path / _path(stem, file)) for file in sorted(self.pictures.get(stem, ()))]

    def find_caption(self, stem: str) -> str | None:
        """The caption file of this stem, if there is one."""
        found = [_path(stem, file) for file in self.captions.get(stem, ())]
        found.sort(key=lambda file: ENDINGS.index(Path(file).suffix.lower()))
        return str(self.path / found[0]) if found else None


@dataclass(frozen=True)
class PairFolders:
    """What was found in a folder of pairs."""

    target: Files
    sources: list[Files]
    mask: Files | None
    ref_gt: Files | None
    captions: list[Files]
    """Where captions may be: the caption folder alone, if there is one, else the targets' and the sources' folders."""
    stems: list[str]
    """Of all targets and sources, sorted."""

    def have_captions(self) -> bool:
        """Whether any target has a caption file."""
        return any(files.captions.keys() & self.target.pictures.keys() for files in self.captions)

    def remarks(self) -> Iterator[str]:
        """What the user may not expect, a line each."""
        for files in filter(None, (self.target, *self.sources, self.mask, self.ref_gt)):
            if files.others:
                kinds = ", ".join(
                    f"{count} {ending or 'without ending'}" for ending, count in sorted(files.others.items())
                )
                yield f"{files.path}: {files.others.total()} left out that are not pictures by name ({kinds})"
        for files in filter(None, (self.mask, self.ref_gt)):
            if missing := self.target.pictures.keys() - files.pictures.keys():
                yield f"{files.path}: nothing for {len(missing)} of {len(self.target.pictures)} targets, e.g. {min(missing)}"
            yield from _orphans(files, files.pictures, self.target)
        for files in self.captions:
            yield from _orphans(files, files.captions, self.target)


def find_pairs(folder: Path) -> PairFolders:
    """Lists the files.

    Args:
        folder: an absolute path.

    Raises:
        InputError: it is not such a folder, or a part of it is empty or matches nothing.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    sources = sorted(path for path in folder.iterdir() if path.name.startswith("source") and path.is_dir())
    if not sources or not (folder / "target").is_dir():
        raise InputError(f"there are no pairs in {folder}: {LAYOUT}")
    if len(sources) > MAX_SOURCES:
        raise InputError(f"{folder} has {len(sources)} folders source*, the model takes at most {MAX_SOURCES} sources")
    target, *found = [_list(path) for path in (folder / "target", *sources)]
    for files in [target, *found]:
        if not files.pictures:
            raise InputError(f"there is no image file in {files.path}")
    mask, ref_gt = (_list_optional(folder / name, target) for name in ("mask", "ref_gt"))
    captions = [_list(folder / "caption")] if (folder / "caption").is_dir() else [target, *found]
    stems = sorted(set(target.pictures).union(*(files.pictures for files in found)))
    return PairFolders(target, found, mask, ref_gt, captions, stems)


def pair_items(pairs: PairFolders) -> Iterator[Item | RejectedRow]:
    """An item for each stem; its values are the paths `target`, `sources`, `mask`, `ref_gt` and `caption`, or None."""
    for number, stem in enumerate(pairs.stems, start=1):
        try:
            yield _item(pairs, number, stem)
        except RejectedImage as error:
            yield RejectedRow(number, stem, str(error.path), error.reason)


def _list_optional(folder: Path, target: Files) -> Files | None:
    if not folder.is_dir():
        return None
    files = _list(folder)
    if files.pictures.keys().isdisjoint(target.pictures):
        raise InputError(f"no picture in {folder} has the name of a target: rename the files, or remove the folder")
    return files


def _list(folder: Path) -> Files:
    suffixes = image_suffixes()
    known, endings = suffixes.union(ENDINGS), {}
    files = Files(folder)
    for path in walk_files(folder):
        real, suffix = path.relative_to(folder).with_suffix("").as_posix(), path.suffix
        # letters with accents can be written in two ways, and macOS writes another one than Linux and Windows
        stem = sys.intern(unicodedata.normalize("NFC", real))
        if suffix.lower() not in known:
            files.others[suffix.lower()] += 1
            continue
        kind = files.pictures if suffix.lower() in suffixes else files.captions
        entry = (*kind.get(stem, ()), suffix if stem == real else real + suffix)
        kind[stem] = endings.setdefault(entry, entry) if entry == (suffix,) else entry
    return files


def _path(stem: str, file: str) -> str:
    """What `file` stands for: an ending, or a path, which never begins with a dot, as hidden files are left out."""
    return stem + file if file.startswith(".") else file


def _item(pairs: PairFolders, number: int, stem: str) -> Item:
    parts = [pairs.target, *pairs.sources, *filter(None, (pairs.mask, pairs.ref_gt))]
    found = {files.path: files.find(stem) for files in parts}
    first = next(Path(paths[0]) for paths in found.values() if paths)
    try:
        stem.encode()
    except UnicodeEncodeError:
        raise RejectedImage(first, "the file's name is not UTF-8 text: rename it") from None
    for paths in found.values():
        if len(paths) > 1:
            raise RejectedImage(Path(paths[1]), f"has the same name as {Path(paths[0]).name}: remove one of them")
    for files in (pairs.target, *pairs.sources):
        if not found[files.path]:
            raise RejectedImage(first, f"there is no file of this name in {files.path}")
    caption = next(filter(None, (files.find_caption(stem) for files in pairs.captions)), None)
    one = {path: paths[0] for path, paths in found.items() if paths}
    values = {
        "target": one[pairs.target.path],
        "sources": [one[files.path] for files in pairs.sources],
        "mask": one.get(pairs.mask.path) if pairs.mask else None,
        "ref_gt": one.get(pairs.ref_gt.path) if pairs.ref_gt else None,
        "caption": caption,
    }
    return Item(number, stem, tuple(map(Path, [*one.values(), *([caption] if caption else [])])), values)


def _orphans(files: Files, stems: dict[str, tuple[str, ...]], target: Files) -> Iterator[str]:
    if orphans := stems.keys() - target.pictures.keys():
        example = _path(stem := min(orphans), stems[stem][0])
        yield f"{files.path}: {len(orphans)} left out that belong to no target, e.g. {example}"
