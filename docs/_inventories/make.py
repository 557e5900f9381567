"""Makes psycopg.inv: ``python docs/_inventories/make.py OBJECTS``.

OBJECTS is the ``objects.inv`` of Debian's package `python-psycopg-doc`, which is older than the
psycopg that pgbackend needs, and was built without psycopg_pool. `NEWER` and `POOL` have the names
of psycopg's pages errors.rst and pool.rst that are missing there. Each class of an SQLSTATE leads
to psycopg's table of them, since no page documents them one by one.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

from psycopg import errors

HERE = Path(__file__).parent
NEWER = {
    "psycopg.errors.CancellationTimeout": "py:exception 1 api/errors.html#$",
    "psycopg.errors.ConnectionTimeout": "py:exception 1 api/errors.html#$",
}
_METHODS = ("connection", "open", "close", "wait", "resize", "check", "getconn", "putconn")
POOL = {
    "ConnectionPool": (*_METHODS, "get_stats", "pop_stats"),
    "AsyncConnectionPool": _METHODS,
    "NullConnectionPool": ("wait", "resize", "check"),
    "AsyncNullConnectionPool": (),
    "PoolTimeout": (),
    "PoolClosed": (),
    "TooManyRequests": (),
}
HEADER = b"""# Sphinx inventory version 2
# Project: psycopg
# Version: 3
# The remainder of this file is compressed using zlib.
"""


def read(inventory: Path) -> Iterator[str]:
    """Yield the lines of an inventory, without those that name a page's section."""
    packed = inventory.read_bytes().split(b"\n", 4)[4]
    for line in zlib.decompress(packed).decode().splitlines():
        if " std:" not in line:
            yield line


def states() -> Iterator[str]:
    """Yield a line for each class of an SQLSTATE."""
    for name, value in sorted(vars(errors).items()):
        if isinstance(value, type) and issubclass(value, errors.Error) and value.sqlstate:
            yield f"psycopg.errors.{name} py:exception 1 api/errors.html#sqlstate-exceptions -"


def pools() -> Iterator[str]:
    """Yield a line for each class of psycopg_pool, and for each of its methods."""
    for name, methods in POOL.items():
        kind = "class" if "Pool" in name.removeprefix("Pool") else "exception"
        yield f"psycopg_pool.{name} py:{kind} 1 api/pool.html#$ -"
        for method in methods:
            yield f"psycopg_pool.{name}.{method} py:method 1 api/pool.html#$ -"


def main(inventory: Path) -> None:
    """Write psycopg.inv."""
    newer = [f"{name} {where} -" for name, where in NEWER.items()]
    lines = sorted({*read(inventory), *states(), *pools(), *newer})
    text = "".join(f"{line}\n" for line in lines).encode()
    (HERE / "psycopg.inv").write_bytes(HEADER + zlib.compress(text, 9))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
