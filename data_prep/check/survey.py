"""One pass over a dataset: every row measured and judged, with little kept of each."""

import heapq
import json
import tempfile
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_prep.check.findings import Finding, Limits, judge, judge_rejected
from data_prep.check.measures.column_store import Columns
from data_prep.check.measures.measurement import Measure, as_item
from data_prep.check.overlaps import cross_findings
from data_prep.jobs.items import PARTS_FOLDER, Done, Engine, Item, run_items
from data_prep.rows.rows import RejectedRow, Row, read_rows

PICTURED = 6
"""Rows of each kind that the page shows."""


class Survey:
    """What is known about a dataset. Findings wait on the disk: a dataset may have one in every row."""

    def __init__(self, folder: Path, limits: Limits):
        """Args: folder: the report's, where there is space."""
        self.folder, self.limits = folder, limits
        self.columns = Columns(folder)
        self.has_error = bytearray()
        """1 for each row that must be fixed."""
        self.counts: Counter[str] = Counter()
        """Findings of each kind."""
        self._has_warning = bytearray()
        self._worst: dict[str, list[tuple[float, int, Finding]]] = defaultdict(list)
        self._spill = tempfile.TemporaryFile("w+", dir=folder, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
        self._across = tempfile.TemporaryFile("w+", dir=folder)  # noqa: SIM115

    @property
    def num_rows(self) -> int:
        """Number of rows of the dataset file."""
        return len(self.has_error)

    @property
    def num_warned(self) -> int:
        """Rows that have warnings alone."""
        return sum(warning and not error for warning, error in zip(self._has_warning, self.has_error, strict=True))

    def worst(self) -> dict[str, list[Finding]]:
        """The findings to show, by kind, the worst first."""
        ranked = {kind: sorted(found, reverse=True) for kind, found in self._worst.items()}
        return {kind: [finding for *_, finding in found] for kind, found in ranked.items()}

    def add(self, row: Row | None, answer: Done | RejectedRow) -> None:
        """The next row. `row` is None if the dataset file's row itself was rejected."""
        self.has_error.append(0)
        self._has_warning.append(0)
        if row and isinstance(answer, Done):
            self.columns.add(row, answer.value)
            found = judge(row, answer.value, self.limits)
        else:
            assert isinstance(answer, RejectedRow)
            self.columns.add_unusable()
            found = judge_rejected(answer, row)
        for finding in found:
            self._count(finding)
            print(json.dumps(asdict(finding)), file=self._spill)

    def finish(self) -> None:
        """Looks for findings across rows, when all rows are there."""
        for finding in cross_findings(self.columns, self.limits.ignored):
            self._count(finding)
            print(json.dumps(asdict(finding)), file=self._across)

    def findings(self) -> Iterator[Finding]:
        """All, by row; those across rows without ids."""
        files = (_read(self._spill), _read(self._across))
        return heapq.merge(*files, key=lambda finding: finding.row)

    def close(self) -> None:
        """Gives the disk's space back."""
        for file in (self.columns, self._spill, self._across):
            file.close()

    def _count(self, finding: Finding) -> None:
        self.counts[finding.kind] += 1
        flags = self.has_error if finding.severity == "error" else self._has_warning
        flags[finding.row - 1] = 1
        worst = self._worst[finding.kind]
        heapq.heappush(worst, (finding.weight, -self.counts[finding.kind], finding))  # no two have the same place
        if len(worst) > PICTURED:
            heapq.heappop(worst)


def _read(file: Any) -> Iterator[Finding]:
    file.seek(0)
    return (Finding(**json.loads(line)) for line in file)


def survey(found: Survey, dataset: str, root: Path | None, measure: Measure, engine: Engine) -> None:
    """Reads and measures every row. What was measured is kept below the survey's folder, to continue after a kill.

    Args:
        found: empty.
        dataset: file, folder or hub id.
        root: as in `read_rows`.

    Raises:
        InputError: no such dataset, not in its format, or without rows.
    """
    waiting: deque[Row | None] = deque()  # the rows whose answers are still to come
    items = _items(read_rows(dataset, root, text_to_image=True), waiting)
    for answer in run_items(items, measure, found.folder / PARTS_FOLDER, engine, "checking"):
        found.add(waiting.popleft(), answer)
    found.finish()


def _items(rows: Iterable[Row | RejectedRow], waiting: deque[Row | None]) -> Iterator[Item | RejectedRow]:
    for row in rows:
        waiting.append(row if isinstance(row, Row) else None)
        yield as_item(row) if isinstance(row, Row) else row
