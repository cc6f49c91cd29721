"""Files of the Hugging Face hub: what an id looks like, and the one way to have what it stands for."""

import re
from collections.abc import Sequence
from pathlib import Path

from data_prep.errors import InputError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class NotCached(InputError):
    """The files are not on this machine, and were not to be downloaded."""


def fetch(name: str, patterns: Sequence[str], download: bool = True, needed: Sequence[str] = ()) -> Path:
    """A folder as it is, else the folder of a hub id's files, from the hub's cache or downloaded with progress.

    Args:
        name: folder or hub id.
        patterns: patterns of the files.
        download: whether the hub may be asked.
        needed: patterns of which the cache has a file each if it has all: the hub is not asked then.

    Raises:
        NotCached: it is not here, and may not be downloaded.
        InputError: the hub does not have it or cannot be reached.
    """
    if (path := Path(name).expanduser()).is_dir():
        return path
    from huggingface_hub import snapshot_download  # a fifth of a second, and a folder does without
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        if needed or not download:
            try:
                folder = Path(snapshot_download(name, allow_patterns=list(patterns), local_files_only=True))
                if all(any(folder.glob(pattern)) for pattern in needed):
                    return folder
            except LocalEntryNotFoundError as error:
                if not download:
                    raise NotCached(f"{name} is not in the hub's cache") from error
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"no folder {name}, and downloading it from the hub failed: {reason}") from error
