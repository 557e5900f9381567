"""Writes the table of docs/packages.md from the projects' results: ``python -m tests.packages``."""

from __future__ import annotations

import platform
import re

import django

from tests.packages.play import NAMES, Said, play
from tests.server import server
from tests.support.processes import ROOT

PAGE = ROOT / "docs" / "packages.md"
HEAD = """\
| package | keeps its state in | wrong here | wrong on stock: sync, async views | needs | test |
|---|---|---|---|---|---|
"""


def main() -> None:
    rows = [_row(name, play(name, stock_views="sync async")) for name in NAMES]
    by = f"Python {platform.python_version()}, Django {django.__version__}."
    table = f"<!-- table -->\n{by}\n\n{HEAD}{''.join(rows)}<!-- end of table -->"
    page = PAGE.read_text()
    PAGE.write_text(
        re.sub(r"<!-- table -->.*<!-- end of table -->", lambda _: table, page, flags=re.DOTALL)
    )
    server.release()


def _row(name: str, said: dict[str, Said]) -> str:
    here, stock = said["pgbackend"], said["stock"]
    told = here.told
    cells = [
        f"{told['package']} {told['version']}",
        told["state"],
        f"{here.count()}",
        f"{stock.count('sync view')}, {stock.count('async view')}",
        told["line"] or "nothing",
        f"[{name}](../tests/packages/{name}.py)",
    ]
    print(f"{told['package']}: {here.count()} wrong", flush=True)
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    main()
