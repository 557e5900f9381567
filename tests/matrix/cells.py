"""Chooses the cells: which Python runs the tests with which Django, PostgreSQL and event loop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations, product

#: Each Django with the Pythons that its project supports, and with the PostgreSQLs.
PYTHONS = {
    "5.2": ("3.11", "3.12", "3.13", "3.14"),
    "6.0": ("3.12", "3.13", "3.14"),
    "6.1": ("3.12", "3.13", "3.14", "3.15"),
}
SERVERS = {
    "5.2": ("14", "15", "16", "17", "18"),
    "6.0": ("14", "15", "16", "17", "18"),
    "6.1": ("15", "16", "17", "18"),
}
LOOPS = ("asyncio", "uvloop")


@dataclass(frozen=True)
class Cell:
    """Names what one run of the tests uses."""

    python: str
    django: str
    postgresql: str
    loop: str
    dependencies: str = ""
    """``oldest``: each at its floor; ``newest``: all upgraded; ``next``: Django's next."""

    @property
    def name(self) -> str:
        return self.dependencies or f"{self.python}-{self.django}-{self.postgresql}"

    def pairs(self) -> set[tuple[tuple[str, str], tuple[str, str]]]:
        """Return the pairs of versions, each with the name of its factor, that the cell covers."""
        factors = ("python", "django", "postgresql", "loop")
        return set(combinations([(factor, getattr(self, factor)) for factor in factors], 2))


#: The cells beside the covering choice. The next Django replaces the one that is named.
SPECIAL = (
    Cell("3.11", "5.2", "14", "asyncio", "oldest"),
    Cell("3.14", "6.1", "18", "uvloop", "newest"),
    Cell("3.14", "6.1", "18", "asyncio", "next"),
)


def supported() -> Iterator[Cell]:
    """Yield each combination that Django supports."""
    for django, pythons in PYTHONS.items():
        for python, postgresql, loop in product(pythons, SERVERS[django], LOOPS):
            yield Cell(python, django, postgresql, loop)


def covering() -> list[Cell]:
    """Return cells that together have each pair of versions that any supported cell has.

    Always takes the cell that has most of the pairs that are still missing, so that there are few;
    among equal ones, one with the event loop that fewer cells have.
    """
    candidates = list(supported())
    missing = set[object]().union(*(cell.pairs() for cell in candidates))
    chosen: list[Cell] = []
    while missing:
        loops = Counter(cell.loop for cell in chosen)
        best = max(candidates, key=lambda c: (len(c.pairs() & missing), -loops[c.loop]))
        missing -= best.pairs()
        chosen.append(best)
    return sorted(chosen, key=lambda cell: [_number(part) for part in cell.name.split("-")])


def all_cells() -> list[Cell]:
    return [*covering(), *SPECIAL]


def named(names: Iterable[str]) -> list[Cell]:
    """Return the cells of these names; all, without a name.

    A combination that is supported may be named, also one that the covering choice lacks.

    Raises:
        ValueError: a name names no cell.
    """
    known = {cell.name: cell for cell in (*supported(), *all_cells())}
    names = list(names)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"no cell is named {', '.join(unknown)}: --list shows the cells; others are named "
            "PYTHON-DJANGO-POSTGRESQL, such as 3.12-5.2-14, if Django supports that"
        )
    return [known[name] for name in names] or all_cells()


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
