"""Runs the packages' own tests: ``python -m tests.packages.suites [NAME ...]``.

Each package's tests run on Django's engine, on pgbackend in sync code, and green through the whole
stack, each in a process of its own. Without names, all packages of `table` run, and the table of
docs/packages.md is written. Packages whose results are there for the same versions do not run
again, unless ``--again`` says so. The exit status is 1 if an outcome differs from stock's and
`table` has no reason, or if stock passes no test.
"""

from __future__ import annotations

import argparse
import sys

from tests.packages.suites import results
from tests.packages.suites.run import ENGINES, run
from tests.packages.suites.table import PACKAGES, Package
from tests.server import server


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.packages.suites")
    parser.add_argument("names", nargs="*", metavar="NAME", help="all, if none is given")
    parser.add_argument("--again", action="store_true", help="run what has results, too")
    parser.add_argument("--no-write", action="store_true", help="neither keep nor write results")
    options = parser.parse_args(arguments)
    chosen = [package for package in PACKAGES if package.name in options.names or not options.names]
    if unknown := set(options.names) - {package.name for package in PACKAGES}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; table.py names the packages")
    good = True
    for package in chosen:
        kept = None if options.again or options.no_write else results.kept(package)
        result = kept or _run(package)
        if not (kept or options.no_write):
            results.keep(package, result)
        good &= results.report(package, result)
    if not options.no_write:
        results.write_page()
    return 0 if good else 1


def _run(package: Package) -> results.Result:
    found = {context: run(package, context, server.url) for context in ENGINES}
    return results.compare(package, found)


if __name__ == "__main__":
    status = main(sys.argv[1:])
    server.release()
    sys.exit(status)
