"""The documentation: every link leads somewhere, and the index and the site's menu have every page."""

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.commands import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKDOWN = MarkdownIt("commonmark").enable("table")


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
    for heading, inline in zip(blocks, blocks[1:], strict=False):
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
