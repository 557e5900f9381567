"""Writes the table of docs/versions.md from the journal; the rest is written by hand."""

from __future__ import annotations

from collections.abc import Mapping

from .cells import Cell, all_cells, supported
from .interpreters import ROOT
from .journal import Entry, Journal

PAGE = ROOT / "docs" / "versions.md"
BEGIN = "<!-- The table is written by 'python -m tests.matrix'. -->"
END = "<!-- The end of the table. -->"
HEAD = "| cell | Python | Django | PostgreSQL | loop | our tests | Django's tests | when |"


def write(journal: Journal) -> None:
    """Replace what is between the two marks of the page by the table."""
    page = PAGE.read_text()
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{PAGE} has no place for the table: add the lines {BEGIN!r} and {END!r}")
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(journal)}\n{END}{after}")


def table(journal: Journal) -> str:
    lines = [HEAD, "|---" * HEAD.count(" | ") + "|---|"]
    lines += [_row(cell, journal.of(cell)) for cell in [*all_cells(), *_others(journal)]]
    return "".join(f"{line}\n" for line in lines)


def _others(journal: Journal) -> list[Cell]:
    """Return the cells that ran because they were named: the covering choice lacks them."""
    loops = {name: entry.loop for (name, _), entry in journal.entries.items()}
    usual = {cell.name for cell in all_cells()}
    ran = [cell for cell in supported() if cell.name not in usual and cell.name in loops]
    return [cell for cell in ran if cell.loop == loops[cell.name]]


def _row(cell: Cell, entries: Mapping[str, Entry]) -> str:
    found = {name: v for entry in entries.values() for name, v in entry.versions.items()}
    versions = [
        found.get(name, f"({usual})")
        for name, usual in (
            ("Python", cell.python),
            ("Django", cell.django),
            ("PostgreSQL", cell.postgresql),
        )
    ]
    days = {entry.day for entry in entries.values()}
    outcomes = [_outcome(entries.get(step)) for step in ("tests", "django")]
    columns = [f"`{cell.name}`", *versions, cell.loop, *outcomes, max(days, default="–")]
    return f"| {' | '.join(columns)} |"


def _outcome(entry: Entry | None) -> str:
    if entry is None:
        return "not run yet"
    if not entry.versions:
        return f"not run: {entry.outcome}"
    if entry.step == "django" and entry.passed:
        return "as with Django's backend"
    verdict = "" if entry.passed else "**no**: "
    return f"{verdict}{entry.outcome}{' (the quick ones)' if entry.quick else ''}"
