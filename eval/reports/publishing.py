"""An adapter goes to the hub: what is uploaded, and what is refused before anything is computed."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # of whichever client the hub is asked with
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id

from data_prep.errors import InputError
from eval.scores.metrics.metric import first_line


def check_push(repository: str) -> None:
    """Finds what would fail at the end of an evaluation, without a network.

    Raises:
        InputError: the name is not one of the hub's, there is no token, or the hub is switched off.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(f"--push {repository}: {error}") from error
    if repository.count("/") != 1:
        raise InputError(f"--push must look like OWNER/NAME, got {repository!r}")
    if constants.HF_HUB_OFFLINE:
        raise InputError("--push needs the hub, and HF_HUB_OFFLINE is set: unset it, or leave out --push")
    if get_token() is None:
        raise InputError("--push needs a token of the hub: run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, files: Sequence[str], repository: str, private: bool) -> str:
    """Uploads exactly these files of a folder to a repository, which is made if there is none, and returns its address.

    Raises:
        SystemExit: the hub did not take them; the reason has been said, and the files stay where they are.
    """
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=list(files),
            commit_message="Adapter, model card and sample pictures",
        )
    except (HTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        reason = first_line(error)
        raise SystemExit(f"error: {repository} was not uploaded ({reason}); everything is in {folder}") from error
    return str(commit.repo_url)
