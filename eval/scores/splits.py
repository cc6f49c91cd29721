"""Which rows of a dataset file are scored, and whether the figures say anything of pictures that training has not seen."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from data_prep.errors import InputError
from data_prep.rows.rows import RejectedRow, Row, is_absent, read_rows
from data_prep.rows.tables import read_table

HELD_OUT, TRAINED, EVERY = "validation", "train", "all"


@dataclass(frozen=True)
class ScoredRows:
    """The rows of a split."""

    rows: Sequence[Row | RejectedRow]
    """In order. The rejected ones are there whatever the split, since theirs is not known."""
    caution: str | None
    """A sentence on rows that are not held out, or may not be; None for those that are."""


def rows_of_split(dataset: str, root: str | None, split: str) -> ScoredRows:
    """Reads the rows of one split, or `all` of them. A file that names no split is taken whole by `validation`.

    Raises:
        InputError: the file cannot be read, or has no row of the split.
    """
    rows = list(read_rows(dataset, root))
    good = [row for row in rows if isinstance(row, Row)]
    names_splits = any(isinstance(each, dict) and not is_absent(each.get("split")) for each in read_table(dataset))
    if good and not names_splits and split == HELD_OUT:
        return ScoredRows(
            rows,
            "The dataset has no column split, so the adapter may have been trained on these rows. "
            f"Rows with split={HELD_OUT} count as held out.",
        )
    chosen = good if split == EVERY else [row for row in good if row.split == split]
    if good and not chosen:
        counts = ", ".join(f"{name} ({count})" for name, count in Counter(row.split for row in good).items())
        raise InputError(
            f"{dataset} has no rows of the split {split!r}. Its splits are: {counts}. "
            f"Choose one with --split, or hold rows out with data_prep/run.py split"
        )
    numbers = {row.number for row in chosen}
    trained = sum(row.split == TRAINED for row in chosen)
    caution = (
        f"{trained} of the {len(chosen)} rows are training rows (split={TRAINED}), not held out." if trained else None
    )
    return ScoredRows([row for row in rows if isinstance(row, RejectedRow) or row.number in numbers], caution)


def chosen_rows(rows: Sequence[Row | RejectedRow], num_rows: int | None, seed: int) -> list[Row | RejectedRow]:
    """So many of the usable rows (None: all), in order, and the rejected ones, which are to be reported."""
    good = [row for row in rows if isinstance(row, Row)]
    if num_rows is None:
        return list(rows)
    chosen = choose_rows(len(good), num_rows, seed)
    return [*(good[index] for index in chosen), *(row for row in rows if isinstance(row, RejectedRow))]


def choose_rows(available: int, num_rows: int, seed: int) -> list[int]:
    """`num_rows` of the indices below `available`, in order; random, since neighbours in a file are often alike."""

    def draw(index: int) -> bytes:
        return hashlib.blake2b(f"{seed}/{index}/validation".encode(), digest_size=8).digest()

    return sorted(sorted(range(available), key=draw)[:num_rows])
