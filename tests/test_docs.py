"""The documentation: every link leads somewhere, the index and the menu have every page, the guide's commands are good."""

import itertools
import re
import shlex
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import typer
from markdown_it import MarkdownIt
from markdown_it.token import Token

from data_prep.run import COMMANDS
from tests.commands import ROOT
from train.config.compose import compose

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKDOWN = MarkdownIt("commonmark").enable("table")
GUIDE = [
    line
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "docs/guide.md").read_text(encoding="utf-8"), re.DOTALL)
    for line in block.splitlines()
]
"""Its commands, one a line."""


def tokens(page: Path) -> list[Token]:
    """Blocks, and what is inside them."""
    blocks = MARKDOWN.parse(page.read_text(encoding="utf-8"))
    return [token for block in blocks for token in (block, *(block.children or ()))]


def links(page: Path) -> list[str]:
    """Where its links lead and its pictures come from."""
    return [str(token.attrs[name]) for token in tokens(page) for name in ("href", "src") if name in token.attrs]


def anchors(page: Path) -> set[str]:
    """The names of its headings, as GitHub makes them."""
    found: list[str] = []
    blocks = MARKDOWN.parse(page.read_text(encoding="utf-8"))
    for heading, inline in itertools.pairwise(blocks):
        if heading.type == "heading_open":
            text = "".join(child.content for child in inline.children or ())
            name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found.append(f"{name}-{found.count(name)}" if name in found else name)
    return set(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    broken = []
    for link in links(page):
        parts = urlsplit(link)
        if parts.scheme:
            continue
        target = page.parent / unquote(parts.path) if parts.path else page
        if not target.exists() or (parts.fragment and unquote(parts.fragment) not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_index_names_every_page():
    assert {page.name for page in PAGES[1:]} - {"index.md"} == set(links(ROOT / "docs/index.md"))


def test_the_site_menu_has_every_page():
    menu = (ROOT / "scripts/mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    assert sorted(re.findall(r"\w+\.md", menu)) == sorted(page.name for page in PAGES[1:])


def arguments(program: str) -> list[list[str]]:
    """What follows `program` in each of the guide's commands that has it."""
    found = [words[words.index(program) + 1 :] for words in map(shlex.split, GUIDE) if program in words]
    assert found, f"the guide has no command of {program}"
    return found


def test_the_trainings_of_the_guide_are_good_configurations():
    for overrides in arguments("train/run.py"):
        compose(overrides)


def options(function: Callable[..., None], words: list[str]) -> None:
    """Reads a command's words as the command would, and does nothing with them."""
    app = typer.Typer()
    app.command()(function)
    typer.main.get_command(app).make_context("guide", list(words))


@pytest.mark.slow
def test_the_data_commands_of_the_guide_have_their_options():
    for name, *words in arguments("data_prep/run.py"):
        options(import_module(COMMANDS[name][0]).command, words)


@pytest.mark.slow
@pytest.mark.parametrize(("module", "command"), [("eval.run", "score"), ("eval.edit", "edit")])
def test_the_edits_and_scores_of_the_guide_have_their_options(module, command, tmp_path, monkeypatch):
    adapter = tmp_path / "mine/checkpoints/step-001200/adapter_model.safetensors"
    adapter.parent.mkdir(parents=True)
    adapter.touch()
    monkeypatch.setenv("CHECKPOINT_DIR", str(tmp_path))
    for words in arguments(module.replace(".", "/") + ".py"):
        options(getattr(import_module(module), command), words)
