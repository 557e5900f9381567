"""Runs the cases of all helpers: ``python -m tests.packages.helpers``; prints a JSON object.

For each package: its version, and for each context the errors of the cases that failed.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from importlib import import_module, metadata
from typing import Any

from tests.packages.project import STOCK, configure, create_tables, database, green

NAMES = ["retries", "bulk", "copying", "locks", "activity"]
APPS = ["pgbulk", "pgactivity", "pglock", "tests.packages.helpers"]


def run_sync(case: Callable[[], None]) -> None:
    case()


def run_green(case: Callable[[], None]) -> None:
    asyncio.run(green(case))


def run_async(case: Callable[[], Any]) -> None:
    asyncio.run(case())


def fault(run: Callable[[Any], None], case: Callable[[], Any]) -> str | None:
    """Run a case; return what it raised or warned of, if anything."""
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            run(case)
        return "; ".join(str(each.message) for each in told) or None
    except Exception as exc:
        frame = traceback.extract_tb(exc.__traceback__)[-1]
        if "-v" in sys.argv:
            traceback.print_exc()
        return f"{type(exc).__name__}: {exc} ({frame.name}:{frame.lineno})"[:600]


def results(module: Any) -> dict[str, dict[str, str | None]]:
    runs: dict[str, tuple[Any, list[Any]]] = {"sync": (run_sync, module.CASES)}
    if not STOCK:
        runs["green"] = (run_green, module.CASES)
    runs["async"] = (run_async, module.ASYNC_CASES)
    return {
        context: {case.__name__: fault(run, case) for case in cases}
        for context, (run, cases) in runs.items()
    }


def main() -> None:
    configure(APPS)
    only = os.environ.get("HELPERS_ONLY", "").split() or NAMES
    said = {}
    with database():
        create_tables()
        for name in only:
            module = import_module(f"tests.packages.helpers.{name}")
            version = metadata.version(module.PACKAGE)
            said[name] = {
                "package": module.PACKAGE,
                "version": version,
                "results": results(module),
            }
        from django.db import connections

        connections.close_all()
    print(json.dumps(said))


if __name__ == "__main__":
    main()
