"""Runs django-tenants' own tests on pgbackend: ``python -m tests.packages.own_suite``.

The tests come with the package. They run in the three contexts of `tests.suite`, each in a process
of its own: on Django's engine, on pgbackend in sync code, and green, where each class and test is
set up, run and torn down in a greenlet on an event loop. The exit status is 1 if an outcome differs
from stock's and is not in `DIFFERENCES`, or if one of `DIFFERENCES` does not occur any more.

``EXECUTOR=multiprocessing`` makes django-tenants migrate in processes that it forks.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import django
import psycopg

from tests.server import server
from tests.suite.__main__ import Job, versions_of, work
from tests.suite.compare import report
from tests.suite.differences import Difference
from tests.suite.results import CONTEXTS, Results, fold

PROJECT = Path(__file__).with_name("own_suite_project")
TESTS = "django_tenants.tests"
#: Seconds after which a single test that hangs is reported.
TIMEOUT = 60

DIFFERENCES = (
    Difference(
        f"{TESTS}.test_tenants.TenantDataAndSettingsTest.test_switching_search_path_limited_calls",
        "failed",
        "counts one SET for three INSERTs outside of a transaction; green each of them has a "
        "session of its own, which is reset afterwards (contract C9), so each is told the path",
    ),
)
#: Tests that fail wherever they run, and the reason; no other may fail on stock.
FAILS_ON_STOCK = {
    f"{TESTS}.test_commands.AllTenantsCommandTestCase"
    ".test_arguments_are_passed_to_the_wrapped_command": (
        "counts all tenants, and the package's FastTenantTestCase has left two before it"
    )
}


def main() -> int:
    with psycopg.connect(server.url) as connection:
        versions = versions_of(connection, parallel=1)
    with tempfile.TemporaryDirectory() as out:
        all_results = {context: _run(context, versions, Path(out)) for context in CONTEXTS}
    good = report(all_results, DIFFERENCES)
    return 0 if _stock_is_as_known(all_results["stock"]) and good else 1


def _run(context: str, versions: dict[str, str], out: Path) -> Results:
    job = Job(context, 0, [TESTS], False, versions, server.url, out, TIMEOUT, worker="manage")
    work(job, PROJECT, resume=False)
    results = Results(context, django.__version__, job.labels, versions)
    fold(results, job.journal, job.log)
    print(results.summary(), flush=True)
    return results


def _stock_is_as_known(stock: Results) -> bool:
    """Print the failures on stock; return whether they are exactly the known ones."""
    failed = {name for name, test in stock.tests.items() if test.outcome in ("failed", "error")}
    for name in sorted(failed | FAILS_ON_STOCK.keys()):
        outcome = stock.tests[name].outcome if name in stock.tests else "not run"
        print(f"stock: {name}: {outcome}: {FAILS_ON_STOCK.get(name, 'not known to fail')}")
    return failed == FAILS_ON_STOCK.keys()


if __name__ == "__main__":
    status = main()
    server.release()
    sys.exit(status)
