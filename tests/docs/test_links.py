"""Tests that what the Markdown files of the repository link to and name is there."""

from __future__ import annotations

import re
import runpy
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.anchors.index import slugify

from tests.docs.snippets import ROOT

_DIRECTORIES = ("docs", "tests", "benchmarks", ".github")
PAGES = sorted(
    [*ROOT.glob("*.md"), *(p for each in _DIRECTORIES for p in (ROOT / each).rglob("*.md"))]
)
#: The sites that pages link to. A link to another one is a decision: add it here.
HOSTS = {
    "cloud.google.com",
    "docs.aws.amazon.com",
    "docs.cloud.google.com",
    "docs.djangoproject.com",
    "docs.python.org",
    "github.com",
    "keepachangelog.com",
    "learn.microsoft.com",
    "neon.com",
    "opentelemetry.io",
    "semver.org",
    "supabase.com",
    "www.contributor-covenant.org",
    "www.postgresql.org",
    "www.psycopg.org",
}
OWN = "127.0.0.1"  # the reader's own server
#: The deepest heading that has an anchor on the site: `myst_heading_anchors`.
DEEPEST = 4
#: A file of the repository, as text names it: with its directory, or a file of tests by its name.
_FILE = re.compile(
    r"(?<![\w/.<*-])((?:benchmarks|docs|kitchen|pgbackend|proj|tests)(?:/[\w-]+)+\.(?:py|md|sh|json|toml)"
    r"|test_\w+\.py)(?:::(\w+))?"
)


def _tokens(path: Path) -> Iterator[Token]:
    for token in MarkdownIt("commonmark").enable("table").parse(path.read_text()):
        yield token
        yield from token.children or ()


@cache
def _links(path: Path) -> list[str]:
    links = [token.attrGet("href") or token.attrGet("src") for token in _tokens(path)]
    return [str(each) for each in links if each]


@cache
def _anchors(path: Path) -> dict[str, int]:
    """Return the anchors of the page's headings, as a forge names them, with their levels."""
    anchors: dict[str, int] = {}
    seen: Counter[str] = Counter()
    level = 0
    for token in _tokens(path):
        if token.type == "heading_open":
            level = int(token.tag[1:])
        elif token.type == "inline" and level:
            slug = _slug(_text(token))
            anchors[f"{slug}-{seen[slug]}" if seen[slug] else slug] = level
            seen[slug] += 1
            level = 0
    return anchors


def _text(heading: Token) -> str:
    return "".join(each.content for each in heading.children or () if not each.nesting)


def _slug(heading: str) -> str:
    """Return the anchor that a forge makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _is_outside(link: str) -> bool:
    return bool(urlsplit(link).scheme)


def _fault(page: Path, link: str) -> str | None:
    """Return what is wrong with a link within the repository, if anything is."""
    target, _, anchor = unquote(link).partition("#")
    path = (page.parent / target).resolve() if target else page
    if not path.is_relative_to(ROOT):
        return "leads out of the repository"
    if not path.exists():
        return "no such file"
    if anchor and path.suffix == ".md":
        level = _anchors(path).get(anchor)
        if level is None:
            return "no such heading"
        if level > DEEPEST:
            return "the heading is too deep for an anchor on the site"
    return None


def _faults(page: Path) -> list[str]:
    links = [link for link in _links(page) if not _is_outside(link)]
    return [f"{link}: {fault}" for link in links if (fault := _fault(page, link))]


def test_pages_are_found() -> None:
    names = {_name(page) for page in PAGES}
    assert names >= {"README.md", "docs/index.md", "tests/README.md", "docs/_inventories/README.md"}
    assert sum(len(_links(page)) for page in PAGES) > 100


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    assert _faults(page) == []


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_to_other_sites_are_known_ones(page: Path) -> None:
    links = [urlsplit(link) for link in _links(page) if _is_outside(link)]
    unknown = [
        each.geturl()
        for each in links
        if each.scheme != "mailto" and each.hostname != OWN
        if each.scheme != "https" or each.hostname not in HOSTS
    ]
    assert unknown == []


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_files_that_are_named_exist(page: Path) -> None:
    assert _missing(page.read_text(), page.parent) == []


def _missing(text: str, directory: Path) -> list[str]:
    """Return the files that a text names from the root, or from the page's directory, in vain."""
    return [
        found[0] for found in _FILE.finditer(text) if not _is_there(found[1], found[2], directory)
    ]


def _is_there(name: str, function: str | None, directory: Path) -> bool:
    places = [ROOT / name, directory / name]
    paths = places if "/" in name else [*(ROOT / "tests").rglob(name)]
    texts = [path.read_text() for path in paths if path.exists()]
    return any(f"def {function}(" in text for text in texts) if function else bool(texts)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_a_forge_and_the_site_agree_on_anchors(page: Path) -> None:
    for token in _tokens(page):
        if token.type == "inline" and token.children:
            assert slugify(_text(token)) == _slug(_text(token))


def test_the_site_has_each_page_that_another_links_to() -> None:
    included = runpy.run_path(str(ROOT / "docs" / "_ext" / "repository_files.py"))["INCLUDED"]
    linked = {
        _name(path)
        for page in PAGES
        if page.parent == ROOT / "docs"
        for link in _links(page)
        if not _is_outside(link)
        and (path := (page.parent / link.partition("#")[0]).resolve()).suffix == ".md"
    }
    assert {each for each in linked if not each.startswith("docs/")} <= set(included)


# --- That these tests can fail ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("link", "fault"),
    [
        ("gone.md", "no such file"),
        ("start.md#gone", "no such heading"),
        ("#gone", "no such heading"),
        ("../../elsewhere.md", "leads out of the repository"),
        ("start.md#install", None),
        ("../README.md", None),
    ],
)
def test_a_fault_is_told(link: str, fault: str | None) -> None:
    assert _fault(ROOT / "docs" / "index.md", link) == fault


def test_a_missing_file_is_told() -> None:
    here = "tests/docs/test_links.py"
    named = f"`{here}`, `{here}::test_a_missing_file_is_told`, `test_links.py`"
    assert _missing(named, ROOT) == []
    gone = f"`tests/docs/test_{'gone'}.py` `{here}::test_{'gone'}` `test_{'gone'}.py`"
    assert len(_missing(gone, ROOT)) == 3
