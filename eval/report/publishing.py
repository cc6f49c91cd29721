"""Where a report goes: files, the terminal, a card, W&B and the hub; what would fail there is refused before anything is
computed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # of whichever client the hub is asked with
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id

from data_prep.errors import InputError
from data_prep.files import write_text
from eval.report.card import Card, card_adapter, write_card
from eval.report.evaluation_page import PictureFile, print_report, write_page
from eval.report.run_history import RunSummary
from eval.report.summary import Report
from eval.report.wandb_table import log_wandb
from eval.scores.metrics.metric import first_line
from train.record.loggers import Picture


@dataclass(frozen=True)
class Publication:
    """What becomes of a report besides its files."""

    card: Card | None = None
    push_to: str | None = None
    """OWNER/NAME on the hub."""
    private: bool = False
    wandb: str | None = None
    """Project."""

    def publish(
        self,
        report: Report,
        out: Path,
        picture: PictureFile | None = None,
        samples: Mapping[str, Sequence[Picture]] | None = None,
        rank_by: str = "psnr",
        runs: Sequence[RunSummary] = (),
    ) -> None:
        """Writes `report.json` and `report.html`, prints the tables, and does the rest.

        Args:
            picture: finds a row's pictures.
            samples: rows' pictures by subject, for the card.
            rank_by: metric that best, median and worst pictures are chosen by.
            runs: whose training is shown.

        Raises:
            InputError: W&B cannot be reached.
            SystemExit: the hub did not take the adapter.
        """
        write_text(out / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        write_page(out / "report.html", report, picture, rank_by, runs)
        print_report(report)
        print(out / "report.html")
        if self.card and samples:
            print(write_card(self.card, report, samples[card_adapter(report)]))
        try:
            if self.push_to and self.card:
                print(push(self.card.folder, self.card.files, self.push_to, self.private))
        finally:  # neither server keeps the other from its part
            if self.wandb and picture:
                log_wandb(self.wandb, report, picture, out)


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
