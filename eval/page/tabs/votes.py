"""Blind comparisons of two adapters: the votes, and how often each won."""

import fcntl
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from scipy.stats import binomtest

Choice = Literal["A", "B", "tie"]
CONFIDENCE = 0.95

logger = logging.getLogger("page")


@dataclass(frozen=True)
class Contestant:
    """What made a picture, as a vote remembers it; where anything differs, it is another contestant."""

    name: str
    """Run and step, or the base model's."""
    digest: str = ""
    """Of the adapter's file: another training under the same name is another contestant. Empty for the base model."""
    weight: float = 1.0
    base: str = ""
    """Kind of the base model. Votes of before this was kept have it empty, and so what follows."""
    model: str = ""
    """Fingerprint of the base model's files."""
    steps: int | None = None
    sampler: str = ""
    """Its name and settings, as text."""


@dataclass(frozen=True)
class Vote:
    """One line of `votes.jsonl`."""

    time: str
    """UTC, ISO 8601."""
    a: Contestant
    """Shown as A, on the left."""
    b: Contestant
    choice: Choice
    prompt: str
    seed: int
    source: str
    """Digest of the source picture's file."""
    images: tuple[str, str]
    """Digests of the pixels of A and B."""
    voter: str = ""
    """The name that they logged in with, if the page asks for one."""

    @property
    def winner(self) -> Contestant | None:
        """None for a tie."""
        return {"A": self.a, "B": self.b}.get(self.choice)


class Interval(NamedTuple):
    """Bounds in [0, 1]."""

    low: float
    high: float


@dataclass(frozen=True)
class Standing:
    """How two contestants stand against each other."""

    first: Contestant
    second: Contestant
    wins: int
    """Votes for `first`."""
    losses: int
    """Votes for `second`."""
    ties: int

    @property
    def win_rate(self) -> float | None:
        """Share of `first` among the votes that decided; ties count for neither. None without a decided vote."""
        decided = self.wins + self.losses
        return self.wins / decided if decided else None

    @property
    def interval(self) -> Interval | None:
        """Wilson score interval of the win rate, 95 %, without continuity correction (Wilson 1927); ties left out."""
        decided = self.wins + self.losses
        if not decided:
            return None
        bounds = binomtest(self.wins, decided).proportion_ci(CONFIDENCE, method="wilson")
        return Interval(float(bounds.low), float(bounds.high))


def append_vote(path: Path, vote: Vote) -> None:
    """Adds a line, whole and on disk when this returns, also among several processes.

    A line that a killed process left half written is closed first, so that it spoils nothing but itself.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(asdict(vote), ensure_ascii=False) + "\n"
    with open(path, "a+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if size := file.seek(0, os.SEEK_END):
            file.seek(size - 1)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode())
        os.fsync(file.fileno())


def read_votes(path: Path) -> list[Vote]:
    """All votes so far; lines that are not a vote are left out, with a warning in the log."""
    if not path.exists():
        return []
    votes = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            try:
                votes.append(_parse(json.loads(line)))
            except (ValueError, TypeError, KeyError) as error:
                logger.warning("%s, line %d is not a vote (%s): left out", path, number, error)
    return votes


def _parse(fields: dict[str, Any]) -> Vote:
    if fields["choice"] not in ("A", "B", "tie"):
        raise ValueError(f"choice is {fields['choice']!r}")
    first, second = fields["images"]
    return Vote(**{**fields, "a": Contestant(**fields["a"]), "b": Contestant(**fields["b"]), "images": (first, second)})


def standings(votes: Iterable[Vote]) -> list[Standing]:
    """One for each pair that was compared, the most compared first; `first` is the one that won more often."""
    pairs: dict[frozenset[Contestant], list[Vote]] = {}
    for vote in votes:
        pairs.setdefault(frozenset((vote.a, vote.b)), []).append(vote)
    tables = [_standing(group) for group in pairs.values()]
    return sorted(tables, key=lambda table: -(table.wins + table.losses + table.ties))


def _standing(votes: list[Vote]) -> Standing:
    winners = [vote.winner for vote in votes]
    pair = sorted((votes[0].a, votes[0].b), key=lambda each: (-winners.count(each), each.name, each.digest, str(each)))
    first, second = pair
    return Standing(first, second, winners.count(first), winners.count(second), winners.count(None))
