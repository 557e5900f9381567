"""Writes what each shortcut saves into docs/shortcuts.md: ``python benchmarks/shortcuts.py``.

For each shortcut it runs ``benchmarks/cost.py --instructions --without NAME``, green, and compares
with all shortcuts on. Instructions are the same on each run of one version of Python (3.12 and
later), so one round is enough. ``--lines`` measures nothing, and counts the lines of code of each
shortcut anew.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import django
import psycopg

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.shortcuts_code import CODE, lines
from pgbackend.fast.registry import SHORTCUTS

PAGE = ROOT / "docs" / "shortcuts.md"
BEGIN, END = "<!-- written by benchmarks/shortcuts.py -->", "<!-- end -->"
#: Stack and operation, named as in benchmarks/cost.py.
OPERATIONS = [
    ("green", "get(pk)"),
    ("green", "100 rows"),
    ("green", "save()"),
    ("green", "update(F)"),
    ("green", "create() in atomic()"),
    ("green", "get(pk) in atomic()"),
    ("sync", "SELECT 1"),
]


def cost(*without: str) -> list[float]:
    """Return the instructions of each operation when the shortcuts `without` are off."""
    command = [sys.executable, str(ROOT / "benchmarks" / "cost.py"), "--instructions", "--json"]
    command += ["--rounds", "1", "--stacks", "sync", "green", "--without", *without]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout)
    return [found[operation][stack]["median"] for stack, operation in OPERATIONS]


def row(title: str, count: int, stands_for: str, costs: list[float], base: list[float]) -> str:
    more = [round((each / all_on - 1) * 100, 1) for each, all_on in zip(costs, base, strict=True)]
    cells = [f"+{each} %" if each > 0 else "" for each in more]
    return f"| {title} | {stands_for} | {count} | {' | '.join(cells)} |"


def lines_of(names: Iterable[str]) -> int:
    """Return how many lines of code the named shortcuts take; lines that they share count once."""
    return len(lines(each for name in names for each in CODE[name]))


def count_anew(table: str) -> str:
    """Return a copy of `table` in which only the numbers of lines are counted anew."""
    for names, title in [*(([name], f"`{name}`") for name in SHORTCUTS), ([*SHORTCUTS], "all")]:
        cell = re.compile(rf"^(\| {re.escape(title)} \| [^|]*\| )\d*", re.MULTILINE)
        table, found = cell.subn(rf"\g<1>{lines_of(names)}", table)
        if found != 1:
            raise SystemExit(f"the table has no row of {title}: measure first")
    return table


def measured() -> str:
    """Return the whole table."""
    base = cost()
    heads = [f"`{operation}`, {stack}" for stack, operation in OPERATIONS]
    numbers = {
        "Python": sys.version.split()[0],
        "Django": django.__version__,
        "psycopg": psycopg.__version__,
    }
    versions = ", ".join(f"{name} {number}" for name, number in numbers.items())
    rows = [
        "How many lines of code a shortcut takes (what two of them share counts for both, and once",
        "in the last row), and how many more instructions an operation takes without it",
        f"({versions}):",
        "",
        f"| shortcut | what it does | lines | {' | '.join(heads)} |",
        f"|---|---|--:|{'--:|' * len(heads)}",
    ]
    rows += [
        row(f"`{name}`", lines_of([name]), shortcut.stands_for, cost(name), base)
        for name, shortcut in SHORTCUTS.items()
    ]
    rows.append(row("all", lines_of(SHORTCUTS), "", cost("0"), base))
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lines", action="store_true", help="only count lines of code")
    only_lines = parser.parse_args().lines
    before, _, rest = PAGE.read_text().partition(BEGIN)
    table, _, after = rest.partition(END)
    table = count_anew(table.strip()) if only_lines else measured()
    PAGE.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}")


if __name__ == "__main__":
    main()
