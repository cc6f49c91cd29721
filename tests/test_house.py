"""The tree: no folder of the floors is crowded, and a module's name says which one of its floor it is."""

from collections import Counter

import pytest

from tests.commands import ROOT

FLOORS = ("losses", "data_prep", "train", "eval")
MOST_ENTRIES = 12
"""Besides `__init__.py`, which every folder of modules has."""
NO_ENTRIES = ("__init__.py", "__pycache__")
MAY_REPEAT = ("__init__", "command")
"""`command` is what each builder's folder begins with."""


@pytest.mark.parametrize("floor", FLOORS)
def test_no_folder_has_more_than_a_dozen_entries(floor):
    folders = [
        ROOT / floor,
        *(path for path in (ROOT / floor).rglob("*") if path.is_dir() and path.name != "__pycache__"),
    ]
    entries = {str(path): sum(each.name not in NO_ENTRIES for each in path.iterdir()) for path in folders}
    assert {path: number for path, number in entries.items() if number > MOST_ENTRIES} == {}


@pytest.mark.parametrize("floor", FLOORS)
def test_no_two_modules_of_a_floor_have_the_same_name(floor):
    names = Counter(path.stem for path in (ROOT / floor).rglob("*.py"))
    assert [name for name, number in names.items() if number > 1 and name not in MAY_REPEAT] == []


@pytest.mark.parametrize("floor", FLOORS)
def test_every_folder_of_modules_says_what_lives_in_it(floor):
    folders = {path.parent for path in (ROOT / floor).rglob("*.py")}
    assert [str(path) for path in folders if not (path / "__init__.py").read_text().startswith('"""')] == []
