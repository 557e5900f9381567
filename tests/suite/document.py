"""Writes docs/suite.md from the results of runs of the whole suite.

``python -m tests.suite.document [DIR ...]``; by default, the directories that runs write to. Every
figure on the page comes from there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from .compare import compare, load
from .results import OUTCOMES, Results
from .source import CACHE

PAGE = Path(__file__).resolve().parents[2] / "docs" / "suite.md"

INTRODUCTION = """\
# Django's own test suite

Written by `python -m tests.suite.document` from the runs that it tells of.

Django's tests are run as they are in its source distribution, none edited, in three contexts and
against one server:

- **stock**: Django's own backend, the reference;
- **sync**: pgbackend where no event loop runs;
- **green**: pgbackend with the whole run inside a greenlet on an event loop. Databases are made,
  classes and tests set up, run and torn down there, and async tests run on that same loop, so all
  of it goes through the async pool. The run fails if a statement of the main thread goes over
  another connection of an alias, or if a wait blocks the loop. A test begins when the pool has done
  what the last one left to it: a session to reset, a connection to open. (A test that calls
  `asyncio.run()` by itself, which cannot be done on a loop, is given a thread for it.)

A test that has another outcome than in stock, also one that is skipped, is a difference. Each is
listed in `tests/suite/differences.py` with its reason; one that is not makes a run fail, and so
does one that does not occur any more.

To repeat it (PostgreSQL with its contributed extensions is taken from `/usr/lib/postgresql`, or
named by `DATABASE_URL`; `make postgresql` installs it on Debian):

    make suite                                # all modules, the three contexts
    make suite ARGS="--backend"               # those that exercise a backend most; some minutes
    make suite ARGS="--gis"                   # GeoDjango's, on PostGIS; 'make postgis' first
    make suite ARGS="--context green queries" # what you like

It may be interrupted and gone on with by `--resume`. Tests that fail in all three columns fail of
the machine: those of file permissions when root runs them, and what GDAL or GEOS of its age do.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directories", nargs="*", type=Path)
    given = parser.parse_args().directories
    directories = given or sorted(CACHE.glob("results-*"), reverse=True)
    runs = [all_results for path in directories if (all_results := load(path))]
    if faults := [fault for all_results in runs for fault in _faults(all_results)]:
        sys.exit("\n".join(["not written:", *faults]))
    sections = [_section(all_results) for all_results in runs]
    PAGE.write_text("\n".join([INTRODUCTION, *sections]), encoding="utf-8")
    print(f"written: {PAGE.name}, {len(sections)} runs")


def _faults(all_results: Mapping[str, Results]) -> Iterator[str]:
    """Yield the reasons why the results must not be published."""
    stock = all_results["stock"]
    for results in all_results.values():
        if results.versions != stock.versions or results.labels != stock.labels:
            yield f"{results.run}: {results.versions} is not what stock ran with"
        if results.crashes:
            yield f"{results.run}: {len(results.crashes)} crashes"
        if results is not stock and not compare(stock, results).is_good:
            yield f"{results.run}: has unexpected differences, or faults"


def _section(all_results: Mapping[str, Results]) -> str:
    stock = all_results["stock"]
    versions = dict(stock.versions)
    processes = versions.pop("processes")
    del versions["pgbackend"]
    what = "gis_tests" if stock.labels == ["gis_tests"] else f"{len(stock.labels)} modules"
    title = f"## Django {versions.pop('Django')}, {what}"
    machine = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [
        title,
        "",
        f"{machine}; {processes} process{'' if processes == '1' else 'es'} at a time.",
        "",
    ]
    return "\n".join([*lines, *_table(all_results), "", *_differences(all_results), ""])


def _table(all_results: Mapping[str, Results]) -> Iterator[str]:
    stock = all_results["stock"]
    runs = all_results.values()
    yield "| | " + " | ".join(_name(results) for results in runs) + " |"
    yield "|---|" + "--:|" * len(all_results)
    yield _row("tests", [f"{len(results.tests):,}" for results in runs])
    for outcome in OUTCOMES:
        if any(results.count(outcome) for results in runs):
            yield _row(outcome, [f"{results.count(outcome):,}" for results in runs])
    ours = [compare(stock, results) for results in runs if results is not stock]
    yield _row("differences with a reason", ["", *(str(len(each.known)) for each in ours)])
    yield _row("other differences", ["", *(str(len(each.unexpected)) for each in ours)])
    yield _row(
        "statements beside the pool, blocking waits",
        ["", *(str(len(each.results.faults)) for each in ours)],
    )
    yield _row(
        "complaints that Python could only print",
        [str(len(results.unraisable)) for results in runs],
    )
    yield _row("seconds of all processes", [f"{results.seconds:,.0f}" for results in runs])
    yield _row("to stock", [f"{results.seconds / stock.seconds:.2f}" for results in runs])
    kinds = sorted({kind for results in runs for kind in results.connections})
    for kind in kinds:
        counts = [str(results.connections.get(kind, 0)) for results in runs if results is not stock]
        yield _row(f"connections: {kind}", ["", *counts])


def _name(results: Results) -> str:
    number = results.run.partition("-")[2]
    return f"{results.context}, run {number}" if number else results.context


def _row(title: str, cells: list[str]) -> str:
    return f"| {title} | " + " | ".join(cells) + " |"


def _differences(all_results: Mapping[str, Results]) -> Iterator[str]:
    """Yield each difference once, with the contexts that have it."""
    stock = all_results["stock"]
    where: dict[str, list[str]] = {}
    reasons: dict[str, str] = {}
    for results in all_results.values():
        if results is not stock:
            for test, difference in compare(stock, results).known.items():
                where.setdefault(test, []).append(_name(results))
                reasons[test] = f"{difference.outcome}: {difference.reason}"
    for reason in dict.fromkeys(reasons.values()):
        yield f"- {reason}."
        for test in (test for test, its_reason in reasons.items() if its_reason == reason):
            yield f"  - `{test}` ({', '.join(where[test])})"


if __name__ == "__main__":
    main()
