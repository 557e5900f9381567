"""Reads the tables of the pages."""

from __future__ import annotations

import re
from pathlib import Path


def table_after(page: Path, mark: str) -> list[dict[str, str]]:
    """Return the rows of the first table that follows `mark` on a page, each by its column."""
    _, found, rest = page.read_text().partition(mark)
    assert found, f"{page.name} has no {mark!r}"
    table = re.search(r"(?:^\|.*\n)+", rest, re.MULTILINE)
    assert table is not None, f"{page.name} has no table after {mark!r}"
    header, _, *rows = [_cells(line) for line in table[0].splitlines()]
    return [dict(zip(header, row, strict=True)) for row in rows]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
