"""What `check` tells: `check.json` for programs, tables for the terminal."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from data_prep.check.findings import ERRORS, KINDS, Finding
from data_prep.check.measures.column_store import TRAINED, VALIDATED
from data_prep.check.report.summary import Groups, Layout, quantiles, spreads
from data_prep.check.survey import Survey
from data_prep.files import atomic_file
from data_prep.rows.rows import Row, read_rows

READ = (TRAINED, VALIDATED)
LISTED = 20
"""Errors on the terminal."""
LISTED_WARNINGS = 2
"""Most warnings of each kind on the terminal."""
LISTED_BUCKETS = 10


@dataclass(frozen=True)
class Facts:
    """All that is told, but for the findings, which may be many."""

    dataset: str
    root: Path | None
    survey: Survey
    layout: Layout
    groups: tuple[Groups, ...]
    tokenizer: str
    """Where token counts are from, in words."""
    seconds_per_row: float | None = None
    """Seconds per row for caching; None if not measured."""
    device: str = ""
    """That it was measured on."""

    @property
    def num_errors(self) -> int:
        """Rows that must be fixed."""
        return sum(self.survey.has_error)

    @property
    def num_usable(self) -> int:
        """Rows that can be read."""
        return int(self.survey.columns["usable"].sum())

    @property
    def caching_seconds(self) -> float | None:
        """For the rows to train on and to validate with."""
        rows = int(self.survey.columns.in_split(TRAINED, VALIDATED).sum())
        return None if self.seconds_per_row is None else self.seconds_per_row * rows

    @property
    def spreads(self) -> dict[str, np.ndarray]:
        """The histograms' values."""
        return spreads(self.survey.columns, self.survey.limits.geometry)

    @property
    def split_sizes(self) -> dict[str, int]:
        """Usable rows by split."""
        columns = self.survey.columns
        counts = np.bincount(columns["split"][columns["usable"]], minlength=len(columns.splits))
        return dict(zip(columns.splits, counts.tolist(), strict=True))

    @property
    def other_splits(self) -> dict[str, int]:
        """Splits that are neither trained on nor validated with, and the first row of each."""
        columns = self.survey.columns
        rows = {name: np.flatnonzero(columns.in_split(name)) for name in self.split_sizes if name not in READ}
        return {name: int(found[0]) + 1 for name, found in rows.items() if len(found)}

    def as_dict(self) -> dict[str, Any]:
        """As `check.json` has it."""
        limits = asdict(self.survey.limits)
        counts = self.survey.counts
        return {
            "dataset": self.dataset,
            "root": self.root and str(self.root),
            "rows": self.survey.num_rows,
            "usable": self.num_usable,
            "rows_with_errors": self.num_errors,
            "rows_with_warnings_only": self.survey.num_warned,
            "splits": self.split_sizes,
            "kinds": [
                {"kind": kind, "severity": "error" if kind in ERRORS else "warning", "findings": counts[kind]}
                for kind in KINDS
                if counts[kind]
            ],
            "tokenizer": self.tokenizer,
            "spreads": {name: quantiles(values) for name, values in self.spreads.items()},
            "buckets": [{"bucket": bucket.name, "rows": bucket.rows} for bucket in self.layout.buckets],
            "groups": [asdict(each) for each in self.groups],
            "cache": {
                "bytes": self.layout.cache_bytes,
                "seconds": self.caching_seconds,
                "seconds_per_row": self.seconds_per_row,
                "device": self.device or None,
            },
            "limits": limits | {"ignored": sorted(limits["ignored"])},
        }


def write_json(path: Path, facts: Facts) -> None:
    """The facts, and under `findings` one line for each finding, however many they are."""
    head = json.dumps(facts.as_dict(), indent=2, ensure_ascii=False).removesuffix("\n}")
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(head + ',\n  "findings": [')
        separator = "\n"
        for finding in _with_ids(facts):
            values = asdict(finding) | {"severity": finding.severity}
            values = {name: value for name, value in values.items() if value is not None and name != "weight"}
            file.write(f"{separator}    {json.dumps(values, ensure_ascii=False)}")
            separator = ",\n"
        file.write("\n  ]\n}\n")


def _with_ids(facts: Facts) -> Iterator[Finding]:
    """The ids of rows found across rows are looked up in the dataset, in which they stand in the same order."""
    rows = enumerate(read_rows(facts.dataset, facts.root, text_to_image=True), start=1)
    number, row = 0, None
    for finding in facts.survey.findings():
        if finding.id is None:
            while number < finding.row:
                number, row = next(rows)
            assert isinstance(row, Row)
            finding = Finding(**{**asdict(finding), "id": row.id})
        yield finding


def print_tables(facts: Facts) -> None:
    """On standard output."""
    console = Console()
    console.print(f"{facts.survey.num_rows:,} rows, {facts.num_usable:,} usable: {_splits(facts)}", highlight=False)
    for name, row in facts.other_splits.items():
        meant = ": write validation if it is held out" if VALIDATED not in facts.split_sizes else ""
        text = f"split={name} (first in row {row}) is neither trained on nor validated with{meant}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    if facts.survey.counts:
        console.print(_kinds_table(facts))
        _print_findings(console, facts)
    console.print(_buckets_table(facts))
    console.print(_groups_table(facts))
    console.print(f"prompts: {_tokens(facts)}", highlight=False)
    console.print(f"cache: {size_text(facts.layout.cache_bytes)}; caching: {caching_text(facts)}", highlight=False)


def _splits(facts: Facts) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in facts.split_sizes.items())


def _kinds_table(facts: Facts) -> Table:
    table = Table("", "kind", "findings", "what it means", title="Findings", title_justify="left")
    table.columns[2].justify = "right"
    for kind, count in kind_counts(facts):
        error = kind in ERRORS
        table.add_row("[red]error[/]" if error else "[yellow]warning[/]", kind, f"{count:,}", KINDS[kind])
    return table


def kind_counts(facts: Facts) -> list[tuple[str, int]]:
    """The kinds that occur, errors first, with their findings."""
    return [(kind, facts.survey.counts[kind]) for kind in KINDS if facts.survey.counts[kind]]


def _print_findings(console: Console, facts: Facts) -> None:
    """The first errors, and the worst of each kind of warning."""
    errors = (finding for finding in facts.survey.findings() if finding.severity == "error")
    warnings = (found[:LISTED_WARNINGS] for kind, found in facts.survey.worst().items() if kind not in ERRORS)
    for finding in chain(islice(errors, LISTED), *warnings):
        where = f" ({finding.path})" if finding.path else ""
        text = f"row {finding.row}{where}: {finding.kind}: {finding.message}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)  # one line each, to be searched for
    total = sum(facts.survey.counts.values())
    console.print(f"all {total:,} findings are in check.json", highlight=False)


def _buckets_table(facts: Facts) -> Table:
    table = Table("bucket (height x width of target + references)", "rows", title="Buckets", title_justify="left")
    table.columns[1].justify = "right"
    for bucket in facts.layout.buckets[:LISTED_BUCKETS]:
        table.add_row(bucket.name, f"{bucket.rows:,}")
    if rest := facts.layout.buckets[LISTED_BUCKETS:]:
        table.add_row(f"{len(rest)} more", f"{sum(bucket.rows for bucket in rest):,}")
    return table


def _groups_table(facts: Facts) -> Table:
    headings = ("group size", "groups per epoch", "empty places", "buckets smaller than a group")
    table = Table(*headings, title="Groups of one bucket", title_justify="left")
    for column in table.columns:
        column.justify = "right"
    for each in facts.groups:
        share = each.empty_places / max(1, each.groups * each.size)
        empty = f"{each.empty_places:,} ({share:.1%})"
        table.add_row(f"{each.size}", f"{each.groups:,}", empty, f"{each.small_buckets:,}")
    return table


def _tokens(facts: Facts) -> str:
    spread = quantiles(facts.spreads["tokens"])
    if not spread:
        return "none"
    return f"{spread['p50']:.0f} tokens in the median, at most {spread['p100']:.0f} ({facts.tokenizer})"


def caching_text(facts: Facts) -> str:
    """How long it takes, or how to know."""
    if facts.seconds_per_row is None or facts.caching_seconds is None:
        return "its time needs --model DIR --time-caching 4"
    return (
        f"{duration_text(facts.caching_seconds)} on this {facts.device} ({facts.seconds_per_row:.2f} s a row, measured)"
    )


def duration_text(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h`."""
    for limit, unit, length in ((120, "s", 1), (7200, "min", 60)):
        if seconds < limit:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 3600:.1f} h"


def size_text(size: float) -> str:
    """`1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
