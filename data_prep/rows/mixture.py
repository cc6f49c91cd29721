"""Several datasets as one: how often each is drawn, at which areas, and in which further versions of its rows."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeGuard

from data_prep.rows.augmentation import Augment
from data_prep.rows.rows import RejectedRow, Row, read_rows


@dataclass(frozen=True)
class DatasetSource:
    """One of the datasets that are trained on together."""

    dataset: str
    """A file, a folder or a hub id, as `read_rows` takes it."""
    root: str | None = None
    """The folder that its paths are relative to; None: its own."""
    weight: float | None = None
    """Weight of all its rows together, in proportion to the other datasets' weights; None: its size decides."""
    repeats: float = 1.0
    """How often a row of it counts, where no dataset has a weight."""
    resolutions: Mapping[int, float] = field(default_factory=dict)
    """Largest area of a target in pixels -> share of the draws, in any unit. Empty: the configuration's area alone."""


def read_mixture(
    sources: Sequence[DatasetSource], augment: Augment, *, text_to_image: bool = False
) -> Iterator[Row | RejectedRow]:
    """The rows of all datasets, good and bad: those of the split `train` at every area of their dataset and in every version,
    which share the row's weight; those of other splits as they are. Ids begin with the dataset's name if there are several.

    Args:
        sources: at least one; all have a weight, or none.
        augment: the further versions.
        text_to_image: take rows without sources too, which are rejected otherwise.

    Raises:
        InputError: as `read_rows`.
    """
    for source, name in zip(sources, names(sources), strict=True):
        rows: Iterable[Row | RejectedRow] = read_rows(source.dataset, source.root, text_to_image=text_to_image)
        scale = source.repeats
        if source.weight is not None:
            rows = list(rows)
            scale = source.weight / (sum(row.weight for row in rows if _is_trained(row)) or 1.0)
        for row in rows:
            named = replace(row, id=f"{name}/{row.id}") if name else row
            if _is_trained(named):
                yield from _versions(replace(named, weight=named.weight * scale), row.id, source, augment)
            else:
                yield named


def _is_trained(row: Row | RejectedRow) -> TypeGuard[Row]:
    return isinstance(row, Row) and row.split == "train"


def names(sources: Sequence[DatasetSource]) -> list[str]:
    """What the ids of each dataset's rows begin with: the file's name without its ending, and the next free number where two
    have the same. Empty for a single dataset."""
    if len(sources) == 1:
        return [""]
    stems = [Path(source.dataset).stem for source in sources]
    taken, found = set(stems), []
    for stem in stems:
        numbered = (f"{stem}-{number}" for number in itertools.count(2))
        found.append(stem if stem not in found else next(name for name in numbered if name not in taken))
        taken.add(found[-1])
    return found


def _versions(row: Row, own_id: str, source: DatasetSource, augment: Augment) -> Iterator[Row]:
    """The row, and what it becomes at other areas and in other versions; their weights add up to the row's.

    Args:
        own_id: the row's in its file, so that its versions are the same beside other datasets.
    """
    versions = [None, *augment.versions(own_id, row.prompt)]
    total = sum(source.resolutions.values())
    areas: Mapping[int | None, float] = {area: share / total for area, share in source.resolutions.items()} or {
        None: 1.0
    }
    for area, share in areas.items():
        for version in versions:
            marks = (f"@{area}" if len(areas) > 1 else "") + (f"+{version.number}" if version else "")
            yield replace(
                row,
                id=f"{row.id}{marks}",
                weight=row.weight * share / len(versions),
                max_pixels=area,
                augmentation=version,
            )
