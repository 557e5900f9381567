"""Makes what is missing for the cells that are named, runs them, and writes the table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import page
from .cells import named
from .interpreters import ROOT
from .journal import Journal
from .running import run_cell


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        cells = named(options.cells)
    except ValueError as exc:
        print(exc, file=sys.stderr)
        return 2
    if options.list:
        print(*(f"{cell.name}  {cell.loop}" for cell in cells), sep="\n")
        return 0
    journal = Journal()
    home = options.dir.resolve()
    home.mkdir(parents=True, exist_ok=True)
    passed = True
    if not options.table:
        for cell in cells:
            passed &= run_cell(cell, home, journal, quick=options.quick, again=options.again)
    page.write(journal)
    return 0 if passed else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.matrix",
        description="Run the tests with each version of Python, Django and PostgreSQL. Steps that "
        "have passed with the code as it is are not run again.",
    )
    parser.add_argument("cells", nargs="*", help="such as 3.12-6.0-16, oldest, next; default: all")
    parser.add_argument("--list", action="store_true", help="show the cells")
    parser.add_argument("--quick", action="store_true", help="leave the slow tests out")
    parser.add_argument("--again", action="store_true", help="run what has passed, too")
    parser.add_argument("--table", action="store_true", help="write the table, and run nothing")
    parser.add_argument(
        "--dir",
        type=Path,
        default=ROOT / ".pgbackend" / "matrix",
        help="for what is made (default: %(default)s)",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
