"""Which image files a folder holds, however it is nested or linked."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from data_prep.errors import InputError
from data_prep.rows.images import image_suffixes


def list_images(folder: Path) -> list[Path]:
    """The image files below a folder, by their names' endings, sorted by path. Links are followed, loops once.

    Hidden files and folders are left out.

    Raises:
        InputError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    suffixes = image_suffixes()
    found = sorted(path for path in walk_files(folder) if path.suffix.lower() in suffixes)
    if not found:
        raise InputError(f"there is no image file in {folder}")
    return found


def unique_names(paths: list[Path], folder: Path) -> list[str]:
    """A name for each file, fit for files of its own: its path below `folder` without the ending, `/` as `__`.

    Where several files would have one name, or names that differ in capitals alone, a piece of the path's hash follows.
    """
    inner = [str(path.relative_to(folder)) for path in paths]
    stems = [os.path.splitext(name)[0].replace(os.sep, "__") for name in inner]
    counts = Counter(map(str.casefold, stems))
    return [
        stem
        if counts[stem.casefold()] == 1
        else f"{stem}-{hashlib.blake2b(os.fsencode(name), digest_size=5).hexdigest()}"
        for stem, name in zip(stems, inner, strict=True)
    ]


def walk_files(folder: Path) -> Iterator[Path]:
    """All files below a folder but hidden ones. Links are followed, loops once; the order is the file system's.

    Raises:
        InputError: a folder that cannot be read: its files would be missing without a word.
    """
    seen: set[tuple[int, int]] = set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=_unreadable):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(root) / name for name in files if not name.startswith("."))


def _unreadable(error: OSError) -> None:
    raise InputError(f"the folder {error.filename} cannot be read: {error.strerror}") from error
