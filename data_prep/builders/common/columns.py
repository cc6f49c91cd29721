"""Which columns of somebody else's table are the columns of a dataset file: `--column image=after_path`."""

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from data_prep.errors import InputError
from data_prep.rows.rows import MAX_SOURCES, is_absent
from data_prep.rows.tables import COLUMNS, REQUIRED, BadRow

ColumnOption = Annotated[
    list[str] | None,
    typer.Option("--column", help="Read the dataset column NAME from the table's COLUMN, as NAME=COLUMN. Repeatable."),
]


@dataclass(frozen=True)
class ColumnMap:
    """Dataset column -> the table's columns. Columns that are already called as in a dataset file map to themselves."""

    given: tuple[tuple[str, tuple[str, ...]], ...]
    """Dataset column -> table columns. `a|b` names candidates, of which the table must have exactly one."""
    templated: bool
    """Whether the instruction comes from templates, and not from a column."""

    def unchecked(self) -> dict[str, tuple[str, ...]]:
        """What the columns are in a table whose rows may have different ones."""
        columns = {name: (name,) for name in COLUMNS} | dict(self.given)
        if self.templated:
            del columns["prompt"]
        return columns

    def resolve(self, names: Collection[str], where: str) -> dict[str, tuple[str, ...]]:
        """What the columns of a table are.

        Args:
            names: all columns of the table.
            where: the table, for messages.

        Raises:
            InputError: a mapped column is not there, or a required one is mapped to nothing.
        """
        own = {name: (name,) for name in COLUMNS if name in names}
        columns = own | {name: tuple(_present(one, names, where) for one in columns) for name, columns in self.given}
        if self.templated:
            columns.pop("prompt", None)
        for name in REQUIRED:
            if name not in columns and not (self.templated and name == "prompt"):
                way_out = "add --prompt, --templates or " if name == "prompt" else "add "
                raise InputError(
                    f"{where} has no column {name!r}: {way_out}--column {name}=…; it has {', '.join(names)}"
                )
        return columns


def make_column_map(options: Iterable[str], templated: bool) -> ColumnMap:
    """Reads `NAME=COLUMN` options.

    Args:
        options: as given; a NAME may come again for edit_image (several sources) and id (joined by `-`).
        templated: whether there are templates for the instruction.

    Raises:
        InputError: not of this form, an unknown or repeated NAME, or two ways to the instruction.
    """
    columns: dict[str, list[str]] = {}
    for option in options:
        name, sign, column = option.partition("=")
        if not sign or not column:
            raise InputError(f"--column {option} must be NAME=COLUMN, e.g. --column image=after_path")
        if name not in COLUMNS:
            nearest = difflib.get_close_matches(name, COLUMNS, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(COLUMNS)}"
            raise InputError(f"--column {option}: a dataset has no column {name!r}; {hint}")
        columns.setdefault(name, []).append(column)
    for name, several in columns.items():
        limit = {"edit_image": MAX_SOURCES, "id": len(several)}.get(name, 1)
        if len(several) > limit:
            raise InputError(f"--column {name}=… is given {len(several)} times, at most {limit} can be")
    if templated and "prompt" in columns:
        raise InputError("--column prompt=… and a prompt template both give the instruction: use only one of them")
    return ColumnMap(tuple((name, tuple(several)) for name, several in columns.items()), templated)


def map_cells(cells: Mapping[str, Any], columns: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """A row of the table under the names of a dataset file. Of several sources, the second and third may be empty.

    Raises:
        BadRow: a part of the id is empty.
    """
    values = {name: cells.get(own[0]) for name, own in columns.items()}
    if len(own := columns.get("edit_image", ())) > 1 and not is_absent(values["edit_image"]):
        values["edit_image"] = [cells[column] for column in own if not is_absent(cells.get(column))]
    if len(own := columns.get("id", ())) > 1:
        if empty := [column for column in own if is_absent(cells.get(column))]:
            raise BadRow(f"{empty[0]}, a part of the id, is missing or empty")
        values["id"] = "-".join(str(cells[column]) for column in own)
    return values


def text_fields(cells: Mapping[str, Any]) -> dict[str, str]:
    """What a prompt template may use: the cells that are text or numbers."""
    return {
        name: str(value)
        for name, value in cells.items()
        if isinstance(value, (str, int, float)) and not is_absent(value)
    }


def _present(candidates: str, names: Collection[str], where: str) -> str:
    found = [name for name in candidates.split("|") if name in names] if candidates not in names else [candidates]
    if len(found) != 1:
        wanted = " or ".join(repr(name) for name in candidates.split("|"))
        several = "more than one of the columns" if found else "no column"
        raise InputError(f"{where} has {several} {wanted}; it has {', '.join(names)}")
    return found[0]
