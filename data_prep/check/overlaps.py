"""Findings that take two rows: what is there twice, and what training shows although it is held out."""

import heapq
from collections.abc import Iterator

import numpy as np

from data_prep.check.findings import Finding
from data_prep.check.measures.column_store import TRAINED, Columns
from data_prep.rows.duplicates import HASH_BYTES, near_duplicates, plain_pictures

PARTS = ("source", "target")


def cross_findings(columns: Columns, ignored: frozenset[str]) -> Iterator[Finding]:
    """By row. The later of two equal rows has the finding; of a leak it is the row that training would see, so that what
    is held out stays as it is."""
    labels = _labels(columns)
    finders = {
        "leak": lambda: _leaks(columns, labels),
        "duplicate": lambda: _duplicates(columns),
        "near_duplicate": lambda: _near_duplicates(columns, labels),
    }
    found = [find() for kind, find in finders.items() if kind not in ignored]
    return heapq.merge(*found, key=lambda finding: finding.row)


def _labels(columns: Columns) -> np.ndarray:
    """The number of each picture's group of near-duplicates, (N, 2) for source and target; -1 where there is no content
    to compare."""
    hashes = columns["hashes"].reshape(-1, HASH_BYTES)
    labels = near_duplicates(hashes).astype(np.int32)
    labels[plain_pictures(hashes)] = -1
    return labels.reshape(-1, 2)


def _leaks(columns: Columns, labels: np.ndarray) -> Iterator[Finding]:
    trained, groups = columns.in_split(TRAINED), columns["group"]
    held_out = columns["usable"] & ~trained
    if not held_out.any() or not trained.any():
        return
    rows = np.flatnonzero(held_out)
    first_picture = _firsts(labels[rows].reshape(-1), np.repeat(rows, 2))
    first_group = _firsts(groups[rows], rows)
    shown = np.isin(labels, labels[held_out]) & (labels >= 0)
    grouped = np.isin(groups, groups[held_out]) & (groups != 0)
    for row in np.flatnonzero(trained & (shown.any(axis=1) | grouped)):
        if shown[row].any():
            part = int(shown[row].argmax())
            other = first_picture[int(labels[row, part])]
            message = f"its {PARTS[part]} is nearly the same as a picture of row {other + 1}, which is held out"
        else:
            other = first_group[int(groups[row])]
            message = f"it has the same group as row {other + 1}, which is held out"
        yield Finding(int(row) + 1, "leak", message, other_row=other + 1)


def _firsts(keys: np.ndarray, rows: np.ndarray) -> dict[int, int]:
    """The first row of each key. Held-out rows are few."""
    values, places = np.unique(keys, return_index=True)
    return dict(zip(values.tolist(), rows[places].tolist(), strict=True))


def _duplicates(columns: Columns) -> Iterator[Finding]:
    keys = _mixed(columns["digest"], columns["split"])
    for row, other in _repeats(keys, columns["usable"]):
        yield Finding(row + 1, "duplicate", f"the same pictures and prompt as row {other + 1}", other_row=other + 1)


def _near_duplicates(columns: Columns, labels: np.ndarray) -> Iterator[Finding]:
    """Rows with one prompt whose sources are alike and whose targets are too, but not to the last pixel."""
    keys = _mixed(columns["prompt"], columns["split"], labels[:, 0], labels[:, 1])
    digests = columns["digest"]
    for row, other in _repeats(keys, columns["usable"] & (labels >= 0).all(axis=1)):
        if digests[row] != digests[other]:
            message = f"nearly the same pictures as row {other + 1}, and the same prompt"
            yield Finding(row + 1, "near_duplicate", message, other_row=other + 1)


def _mixed(*columns: np.ndarray) -> np.ndarray:
    """One 64-bit number for each combination of values."""
    mixed = np.zeros(len(columns[0]), np.uint64)
    for column in columns:  # splitmix64's step: every bit of what is there so far changes half of the others
        mixed = (mixed ^ column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(31)
    return mixed


def _repeats(keys: np.ndarray, among: np.ndarray) -> Iterator[tuple[int, int]]:
    """Rows whose key an earlier one has, and the first such, in order."""
    rows = np.flatnonzero(among).astype(np.int32)
    order = rows[np.argsort(keys[rows], kind="stable")]
    sorted_keys = keys[order]
    starts = np.flatnonzero(np.r_[True, sorted_keys[1:] != sorted_keys[:-1]]) if len(order) else np.zeros(0, int)
    first = np.repeat(order[starts], np.diff(np.r_[starts, len(order)]))
    repeated = np.flatnonzero(order != first)
    in_order = repeated[np.argsort(order[repeated])]
    for place in in_order:
        yield int(order[place]), int(first[place])
