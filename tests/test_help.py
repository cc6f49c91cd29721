"""The help of every command: whole sentences, which refer to nothing that was not said."""

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from data_prep.run import COMMANDS
from eval.app import app
from eval.edit import edit
from eval.export import merge
from eval.run import score
from tests.commands import ROOT
from train.config.keys import all_keys

FUNCTIONS = {
    **{f"data_prep/run.py {name}": import_module(module).command for name, (module, _) in COMMANDS.items()},
    **{"eval/edit.py": edit, "eval/run.py": score, "eval/app.py": app, "eval/export.py merge": merge},
}
SOURCES = [file for floor in ("data_prep", "train", "eval", "scripts") for file in sorted((ROOT / floor).rglob("*.py"))]
"""Where options are declared, also those of parsers that are only made when a command runs."""


def is_sentence(text: str) -> bool:
    """Whether it begins with a capital letter, ends in a full stop, and does not continue what nobody began."""
    return bool(re.match(r"(?!(Of|As|Whose|Which|That|Than|With which)\b)[A-Z]", text)) and text.endswith(".")


def helps_in(file: Path) -> Iterator[str]:
    """The texts of `help=` in a source, with nothing where a value is put in."""
    for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        for given in call.keywords if isinstance(call, ast.Call) else ():
            parts = given.value.values if isinstance(given.value, ast.JoinedStr) else [given.value]
            if given.arg == "help" and any(isinstance(part, ast.Constant) for part in parts):
                yield "".join(str(part.value) for part in parts if isinstance(part, ast.Constant))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_option_is_explained_in_sentences(name):
    program = typer.Typer(add_completion=False)
    program.command()(FUNCTIONS[name])
    command = get_command(program)
    texts = {option.name: getattr(option, "help", None) or "" for option in command.params}
    assert len(texts) >= 5
    assert {option: text for option, text in texts.items() if not is_sentence(text)} == {}
    assert is_sentence((command.help or "").split("\n\n")[0])


def test_every_command_has_a_sentence():
    assert [line for _, line in COMMANDS.values() if not is_sentence(line)] == []


def test_every_key_of_the_configuration_is_explained_in_sentences():
    assert {key.name: key.meaning for key in all_keys() if not is_sentence(key.meaning)} == {}


def test_every_help_in_the_sources_is_a_sentence():
    texts = {(file.name, text) for file in SOURCES for text in helps_in(file)}
    assert len(texts) > 200
    assert [each for each in sorted(texts) if not is_sentence(each[1])] == []
