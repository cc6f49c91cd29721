"""Where the weights of metrics come from."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from safetensors import SafetensorError

from data_prep.model.hub_files import NotCached, fetch
from eval.scores.metrics.metric import CLIP, DINO, Unavailable, first_line

FILES = ["*.json", "*.txt", "*.safetensors"]
SECONDS = 20.0
"""That a server may take to answer."""


@dataclass(frozen=True)
class Places:
    """Folders, files and hub ids."""

    clip: str = CLIP
    dino: str = DINO
    torch_hub: Path | None = None
    """In the layout of `$TORCH_HOME/hub`, which is the default."""
    face: Path | None = None
    """Folder of dlib's models; by default the package face_recognition_models."""
    fid: Path | None = None
    device: str | torch.device = "cpu"
    download: bool = False
    """Fetch what is not here."""

    @property
    def online(self) -> bool:
        """Whether anything may be fetched: it is wanted, and HF_HUB_OFFLINE does not forbid it."""
        return self.download and not constants.HF_HUB_OFFLINE

    @contextmanager
    def hub_checkpoint(self, name: str) -> Iterator[None]:
        """Inside, torch's hub folder is the chosen one and has the file, or may fetch it.

        Raises:
            Unavailable: it is not there, and cannot be fetched.
        """
        before, timeout = torch.hub.get_dir(), socket.getdefaulttimeout()
        folder = self.torch_hub or Path(before)
        if not (folder / "checkpoints" / name).is_file() and not self.online:
            raise Unavailable(f"{name} is not in {folder / 'checkpoints'}: put it there, or give --torch-hub")
        torch.hub.set_dir(folder)
        socket.setdefaulttimeout(SECONDS)
        try:
            yield
        except (OSError, RuntimeError, KeyError) as error:
            raise Unavailable(f"{name} cannot be downloaded or read: {first_line(error)}") from error
        finally:
            torch.hub.set_dir(before)
            socket.setdefaulttimeout(timeout)

    def pretrained(self, load: Callable[..., Any], place: str, option: str) -> Any:
        """`load(place)` of transformers: a folder, or a hub id that is in the cache or may be fetched.

        An id that is not a default was named by somebody, and may be.

        Args:
            load: takes a folder.
            place: folder or id.
            option: that names another folder, for the message.

        Raises:
            Unavailable: neither, or not what the class reads.
        """
        named = place not in (CLIP, DINO) and not constants.HF_HUB_OFFLINE
        try:
            # the folder first: classes look for more files than they say, and on the hub
            return load(str(fetch(place, FILES, download=named or self.online)), local_files_only=True)
        except NotCached as error:
            way = "unset HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "name the metric in --metrics"
            raise Unavailable(f"{error}: {way}, or give a folder with {option}") from error
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise Unavailable(f"{place} cannot be loaded: {first_line(error)}") from error
