"""Writes what each shortcut saves into docs/shortcuts.md: ``python benchmarks/shortcuts.py``.

For each it runs ``benchmarks/cost.py --instructions --without NAME``, green, and compares with all
of them on. Instructions are the same on each run of one version of Python (3.12 and later), so one
round is enough.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import django
import psycopg

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from pgbackend.fast.registry import SHORTCUTS

PAGE = ROOT / "docs" / "shortcuts.md"
BEGIN, END = "<!-- written by benchmarks/shortcuts.py -->", "<!-- end -->"
#: Stack and operation, as benchmarks/cost.py has them.
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
    """Return the instructions of each operation without some shortcuts."""
    command = [sys.executable, str(ROOT / "benchmarks" / "cost.py"), "--instructions", "--json"]
    command += ["--rounds", "1", "--stacks", "sync", "green", "--without", *without]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout)
    return [found[operation][stack]["median"] for stack, operation in OPERATIONS]


def row(title: str, stands_for: str, costs: list[float], base: list[float]) -> str:
    more = [round((each / all_on - 1) * 100, 1) for each, all_on in zip(costs, base, strict=True)]
    cells = [f"+{each} %" if each > 0 else "" for each in more]
    return f"| {title} | {stands_for} | {' | '.join(cells)} |"


def main() -> None:
    base = cost()
    heads = [f"`{operation}`, {stack}" for stack, operation in OPERATIONS]
    numbers = {
        "Python": sys.version.split()[0],
        "Django": django.__version__,
        "psycopg": psycopg.__version__,
    }
    versions = ", ".join(f"{name} {number}" for name, number in numbers.items())
    lines = [
        f"How many more instructions an operation takes without the shortcut ({versions}):",
        "",
        f"| shortcut | what it does | {' | '.join(heads)} |",
        f"|---|---|{'--:|' * len(heads)}",
    ]
    lines += [
        row(f"`{name}`", shortcut.stands_for, cost(name), base)
        for name, shortcut in SHORTCUTS.items()
    ]
    lines.append(row("all", "", cost("0"), base))
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{after}")


if __name__ == "__main__":
    main()
