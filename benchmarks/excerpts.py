"""Writes excerpts of docs/benchmarks.md into the pages that cite it.

    python -m benchmarks.excerpts

So a figure on these pages is one of the last run: the report that writes docs/benchmarks.md calls
this, too, and `tests/test_excerpts.py` compares.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
SOURCE = DOCS / "benchmarks.md"
BEGIN = "<!-- figures: written by benchmarks.excerpts -->"
END = "<!-- end of figures -->"

Row = list[str]

#: The stacks that docs/from-sqlalchemy-tortoise.md compares, and its endpoints.
_STACKS = (
    "**pgbackend, QuerySets**",
    "SQLAlchemy on asyncpg",
    "SQLAlchemy on psycopg",
    "Tortoise on asyncpg",
)
_ENDPOINTS = ("`one`", "`list`", "`insert`", "`page`", "`wait50`", "`stream`")
#: The ways of docs/sync-views.md, and with how many clients.
_WAYS = ("stock, uvicorn", "`ENGINE` alone, uvicorn", "the whole stack green, uvicorn")
_CLIENTS = "16"
_COLUMNS = ("way", "requests a second", "CPU for a request, ms", "threads", "connections")


def written(text: str, excerpt: str) -> str:
    """Return the text of a page with `excerpt` in its place.

    Raises:
        ValueError: the page has no place for it.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page has no place for the figures: {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n\n{excerpt}\n\n{END}{after}"


def beside_other_orms(source: str) -> str:
    """Return the requests a second with 64 clients of pgbackend and the other ORMs."""
    header, *rows = _first_table(_after(source, "## At a glance"))
    by_stack = {row[0]: row for row in rows}
    chosen = [header.index(name) for name in _ENDPOINTS]
    return _table(
        ["", *_ENDPOINTS],
        ([name, *(_without_ratio(by_stack[name][n]) for n in chosen)] for name in _STACKS),
    )


def of_sync_views(source: str) -> str:
    """Return what each way of serving sync views gives, for each project."""
    section = _after(source, "## Projects of sync views")
    titles = re.findall(r"^### (.+)$", section, re.MULTILINE)
    return _table(
        ["project", *_COLUMNS], (row for title in titles for row in _ways(section, title))
    )


def _ways(section: str, title: str) -> Iterator[Row]:
    header, *rows = _first_table(_after(section, f"### {title}\n"))
    chosen = [header.index(name) for name in _COLUMNS]
    by_way = {row[1]: row for row in rows if row[0] == _CLIENTS}
    for way in _WAYS:
        yield [title if way == _WAYS[0] else "", *(by_way[way][n] for n in chosen)]


def _after(text: str, heading: str) -> str:
    _, found, rest = text.partition(heading)
    if not found:
        raise ValueError(f"{SOURCE.name} has no {heading!r}")
    return rest


def _first_table(text: str) -> list[Row]:
    """Return the cells of the first table: its header, and its rows."""
    found = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert found is not None
    header, _, *rows = found[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, *rows)]


def _without_ratio(cell: str) -> str:
    return cell.partition(" (")[0]


def _table(header: Row, rows: Iterator[Row]) -> str:
    texts = {"", "project", "way"}
    kinds = ["---" if name in texts else "--:" for name in header]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, kinds, *rows)).replace(
        "|  |", "| |"
    )


PAGES: dict[str, Callable[[str], str]] = {
    "from-sqlalchemy-tortoise.md": beside_other_orms,
    "sync-views.md": of_sync_views,
}


def write(docs: Path = DOCS) -> None:
    """Put the excerpts of docs/benchmarks.md into the pages."""
    source = (docs / SOURCE.name).read_text(encoding="utf-8")
    for name, excerpt in PAGES.items():
        page = docs / name
        text = page.read_text(encoding="utf-8")
        page.write_text(written(text, excerpt(source)), encoding="utf-8")


if __name__ == "__main__":
    write()
