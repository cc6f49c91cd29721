"""Folders of sources, targets, masks, ground truths and captions beside each other: which files in them belong together."""

import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.builders.pairs.captions import ENDINGS
from data_prep.errors import InputError
from data_prep.jobs.items import Item
from data_prep.rows.folders import walk_files
from data_prep.rows.images import RejectedImage, image_suffixes
from data_prep.rows.rows import MAX_SOURCES, RejectedRow

NAMES = {
    "source": ("source", "before", "input", "original"),
    "target": ("target", "after", "output", "edited", "result"),
    "mask": ("mask", "back_mask"),
    "ref_gt": ("ref_gt", "ground_truth"),
    "caption": ("caption", "prompt"),
}
"""What a folder of each kind may be called, the first that there is, with an s too, in letters of any size; sources may be
numbered: `before_2`."""
LAYOUT = (
    "it must hold folders of sources (source, before, input or original; several: source_1, source_2 …) and of targets "
    "(target, after, output, edited or result), and may hold mask, ref_gt and caption; --source and --target name others"
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
    """The stems of all targets and sources, sorted."""

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
                yield f"{files.path}: left out {files.others.total()} file(s) without the file ending of an image ({kinds})"
        for files in filter(None, (self.mask, self.ref_gt)):
            if missing := self.target.pictures.keys() - files.pictures.keys():
                yield f"{files.path}: nothing for {len(missing)} of {len(self.target.pictures)} targets, e.g. {min(missing)}"
            yield from _orphans(files, files.pictures, self.target)
        for files in self.captions:
            yield from _orphans(files, files.captions, self.target)


def find_pairs(folder: Path, sources: Sequence[str] = (), target: str | None = None) -> PairFolders:
    """Lists the files.

    Args:
        folder: an absolute path.
        sources, target: names of folders in it, in place of the usual ones.

    Raises:
        InputError: it is not such a folder, or a part of it is empty or matches nothing.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    for name in (*sources, *filter(None, [target])):
        if not (folder / name).is_dir():
            raise InputError(f"there is no folder {name} in {folder}")
    of_sources = [folder / name for name in sources] or _called(folder, "source")
    of_targets = [folder / target] if target else _called(folder, "target")
    if not of_sources or not of_targets:
        raise InputError(f"there are no pairs in {folder}: {LAYOUT}")
    if len(of_targets) > 1:
        raise InputError(
            f"several folders of {folder} may hold the targets ({_names(of_targets)}): choose with --target"
        )
    if len(of_sources) > MAX_SOURCES:
        raise InputError(
            f"{folder} has {len(of_sources)} folders of sources ({_names(of_sources)}), the model takes at most "
            f"{MAX_SOURCES}: choose with --source"
        )
    targets, *found = [_list(path) for path in (*of_targets, *of_sources)]
    for files in [targets, *found]:
        if not files.pictures:
            raise InputError(f"there is no image file in {files.path}")
    mask, ref_gt = (_list_optional(_only(folder, kind), targets) for kind in ("mask", "ref_gt"))
    of_captions = _only(folder, "caption")
    captions = [_list(of_captions)] if of_captions else [targets, *found]
    stems = sorted(set(targets.pictures).union(*(files.pictures for files in found)))
    return PairFolders(targets, found, mask, ref_gt, captions, stems)


def _called(folder: Path, kind: str) -> list[Path]:
    """The folders in it that have the first of the kind's names that any has; what `source` begins counts, as `source_left`."""
    for name in NAMES[kind]:
        plain = re.compile(rf"{name}s?" + (r"[_ -]?\d*" if kind == "source" else ""), re.IGNORECASE)
        found = sorted(
            path
            for path in folder.iterdir()
            if path.is_dir() and (plain.fullmatch(path.name) or (name == "source" and path.name.startswith(name)))
        )
        if found:
            return found
    return []


def _only(folder: Path, kind: str) -> Path | None:
    """The one folder that is called so, or None.

    Raises:
        InputError: there are several.
    """
    found = _called(folder, kind)
    if len(found) > 1:
        raise InputError(f"{folder} has several folders for {kind} ({_names(found)}): rename all but one")
    return found[0] if found else None


def _names(folders: list[Path]) -> str:
    return ", ".join(path.name for path in folders)


def pair_items(pairs: PairFolders) -> Iterator[Item | RejectedRow]:
    """An item for each stem; its values are the paths `target`, `sources`, `mask`, `ref_gt` and `caption`, or None."""
    for number, stem in enumerate(pairs.stems, start=1):
        try:
            yield _item(pairs, number, stem)
        except RejectedImage as error:
            yield RejectedRow(number, stem, str(error.path), error.reason)


def _list_optional(folder: Path | None, target: Files) -> Files | None:
    if folder is None:
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
        yield f"{files.path}: left out {len(orphans)} file(s) that belong to no target, such as {example}"
