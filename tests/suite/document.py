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
from .results import OUTCOMES, WHOLE, Results
from .source import CACHE

PAGE = Path(__file__).resolve().parents[2] / "docs" / "suite.md"

INTRODUCTION = """\
# Django's own test suite

`python -m tests.suite.document` writes this page from the results of the runs that the page
reports.

The tests are those of Django's source distribution, unedited. They run in these contexts, against
one server:

- **stock**: Django's own backend, the reference.
- **sync**: pgbackend where no event loop runs.
- **green**: pgbackend with the whole run inside a greenlet on an event loop. Databases are made,
  and classes and tests are set up, run and torn down there. Async tests run on that same loop. So
  all statements go through the async pool.
- **whole** (by `--whole-stack`): as green, and the requests of the test clients come through
  `pgbackend.get_asgi_application()` ([sync-views.md](sync-views.md)), as from a server.

In the contexts green and whole,

- the run fails if a statement of the main thread reaches an alias by a connection that is not the
  pool's, or if a wait blocks the loop;
- a test begins when the pool has finished its work for the test before: resetting a session,
  opening a connection;
- a test's own call of `asyncio.run()` is made in a thread, because `asyncio.run()` refuses to start
  where a loop runs.

A test whose outcome differs from that in stock is a *difference*; "skipped" is an outcome, too.
`tests/suite/differences.py` lists each difference with its reason. A run fails if it has a
difference that is not listed, or if a listed difference does not occur.

To repeat the runs:

    make suite                                # all modules, the three contexts
    make suite ARGS="--backend"               # modules that exercise a backend most; some minutes
    make suite ARGS="--gis"                   # GeoDjango's, on PostGIS; 'make postgis' first
    make suite ARGS="--whole-stack"           # the modules that send requests; stock and whole
    make suite ARGS="--pooler newer basic"    # through PgBouncer; 'make pgbouncer-newer' first
    make suite ARGS="--context green queries" # one context, one module

A run takes PostgreSQL with its contributed extensions from `/usr/lib/postgresql` (`make postgresql`
installs it on Debian), or uses the server of `DATABASE_URL`. `--resume` continues a run that was
interrupted.

Tests that fail in all three columns fail because of the machine: tests of file permissions fail
when root runs them, and some tests fail with the installed versions of GDAL and GEOS.
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
    if WHOLE in all_results:
        what += ", the whole stack"
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
