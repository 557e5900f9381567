"""Starts the server and the workers, collects their results, and compares them."""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import django
import psycopg
from psycopg import sql

import pgbackend

from .compare import report
from .differences import BEHIND_A_POOLER, DIFFERENCES
from .pooler import pooler
from .results import CONTEXTS, WHOLE, Results, fold, read, tail
from .server import NotEnough, server
from .source import CACHE, NoSource, modules_of, tests_dir

#: The modules that exercise a backend most, for a shorter run.
BACKEND_MODULES = (
    "aggregation",
    "aggregation_regress",
    "annotations",
    "asgi",
    "async",
    "backends",
    "basic",
    "bulk_create",
    "composite_pk",
    "constraints",
    "custom_lookups",
    "dates",
    "db_functions",
    "defer",
    "delete",
    "delete_regress",
    "expressions",
    "expressions_window",
    "fixtures",
    "get_or_create",
    "handlers",
    "indexes",
    "inspectdb",
    "introspection",
    "lookup",
    "many_to_many",
    "migrations",
    "model_fields",
    "multiple_database",
    "postgres_tests",
    "prefetch_related",
    "queries",
    "schema",
    "select_for_update",
    "servers",
    "test_utils",
    "transaction_hooks",
    "transactions",
    "update",
)
#: The modules that send requests, for the context whole.
WHOLE_STACK_MODULES = (
    "admin_views",
    "asgi",
    "auth_tests",
    "handlers",
    "middleware",
    "middleware_exceptions",
    "sessions_tests",
    "test_client",
)
STOCK = {False: "django.db.backends.postgresql", True: "django.contrib.gis.db.backends.postgis"}
OURS = {False: "pgbackend", True: "pgbackend.gis"}
#: The exit status where the machine lacks something that a run needs.
CANNOT = 3
#: About how many tests one worker runs; starting a worker takes some seconds.
SHARE = 1000
#: How often a worker that ends early is started again, for the tests that it left.
RESTARTS = 3


@dataclass(frozen=True)
class Job:
    """Describes the work of one worker: some modules, in one context."""

    run: str
    """The context, and which run of it, if it is not the first: ``green-2``."""
    number: int
    labels: list[str]
    gis: bool
    versions: dict[str, str]
    url: str
    out: Path
    timeout: float
    worker: str = "tests.suite.worker"
    """The module that does it."""
    pooler: int | None = None
    """The port of the pooler that our connections go through, if they do."""

    @property
    def context(self) -> str:
        return self.run.partition("-")[0]

    @property
    def journal(self) -> Path:
        return self.out / f"{self.run}.{self.number}.jsonl"

    @property
    def log(self) -> Path:
        return self.out / f"{self.run}.{self.number}.log"

    @property
    def databases(self) -> dict[str, str]:
        """Return database names that no other worker of any run uses."""
        name = f"suite_{os.getpid()}_{self.run.replace('-', '_')}_{self.number}"
        return {"default": name, "other": f"{name}_other"}

    def describe(self) -> dict[str, Any]:
        """Return the facts that must be the same for a journal to be continued."""
        return {"labels": self.labels, "gis": self.gis, "versions": self.versions}

    def environment(self) -> dict[str, str]:
        job: dict[str, Any] = {
            "context": self.context,
            "engine": (STOCK if self.context == "stock" else OURS)[self.gis],
            "labels": self.labels,
            "url": self.url,
            "journal": str(self.journal),
            "timeout": self.timeout,
            "databases": self.databases,
            "pooler": None if self.context == "stock" else self.pooler,
        }
        # The directories from which this package and pgbackend were imported.
        ours = [Path(__file__).parents[2], Path(pgbackend.__file__).parents[1]]
        path = [str(ours[1]), str(ours[0]), os.environ.get("PYTHONPATH", "")]
        return {
            **os.environ,
            "SUITE_JOB": json.dumps(job),
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
        }


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        source = tests_dir()
    except NoSource as exc:
        print(exc, file=sys.stderr)
        return CANNOT
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    labels = _labels(options, source)
    usual = ["stock", WHOLE] if options.whole_stack else list(CONTEXTS)
    runs = _runs(options.context or usual)
    try:
        with server(labels) as url:
            with pooler(url, options.pooler) if options.pooler else nullcontext() as port:
                all_results = _run_all(runs, labels, options, url, source, port)
    except NotEnough as exc:
        print(exc, file=sys.stderr)
        return CANNOT
    for run, results in all_results.items():
        results.save(out / f"{run}.json")
        print(results.summary())
    if "stock" not in all_results:
        reference = _earlier_reference(out, labels)
        if reference is None:
            return _judge_alone(all_results)
        all_results = {"stock": reference, **all_results}
    differences = (*DIFFERENCES, *(BEHIND_A_POOLER if options.pooler else ()))
    return 0 if report(all_results, differences) else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.suite", description="Run Django's own test suite on pgbackend."
    )
    parser.add_argument("modules", nargs="*", help="as runtests.py has them; default: all")
    parser.add_argument(
        "--backend",
        action="store_true",
        help="only the modules that exercise a database backend most",
    )
    parser.add_argument(
        "--whole-stack",
        action="store_true",
        help="only the modules that send requests, served by stock and by "
        "pgbackend.get_asgi_application(), unless contexts are named",
    )
    parser.add_argument(
        "--gis",
        action="store_true",
        help="on PostGIS: gis_tests, if no modules are named; needs GDAL, and a server that has "
        "PostGIS (PGBACKEND_PG_BINDIR, or DATABASE_URL)",
    )
    parser.add_argument(
        "--context",
        action="append",
        choices=[*CONTEXTS, WHOLE],
        help="may be given several times, for one context too; default: each once",
    )
    parser.add_argument(
        "--pooler",
        choices=["older", "newer"],
        help="lead pgbackend's connections through this PgBouncer, in transaction mode; prints "
        "what would pin a session of RDS Proxy",
    )
    parser.add_argument("--out", type=Path, help="directory for outcomes (JSON) and logs")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="worker processes")
    parser.add_argument(
        "--timeout", type=float, default=120, metavar="SECONDS", help="for a single test"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with a run that was interrupted"
    )
    options = parser.parse_args(arguments)
    if options.out is None:
        suffix = "-pooler" if options.pooler else ""
        suffix += "-gis" if options.gis else "-whole-stack" if options.whole_stack else ""
        options.out = CACHE / f"results-{django.__version__}{suffix}"
    return options


def _labels(options: argparse.Namespace, source: Path) -> list[str]:
    if options.modules:
        return [module.rstrip("/") for module in options.modules]
    if options.backend:
        return [module for module in BACKEND_MODULES if (source / module).is_dir()]
    if options.whole_stack:
        return [*WHOLE_STACK_MODULES]
    if options.gis:
        return ["gis_tests"]
    return [module for module in modules_of(source) if not module.startswith("gis_tests")]


def _runs(contexts: list[str]) -> list[str]:
    """Name the runs: a repeated context has a number."""
    return [
        context if (number := contexts[: place + 1].count(context)) == 1 else f"{context}-{number}"
        for place, context in enumerate(contexts)
    ]


def _run_all(
    runs: list[str],
    labels: list[str],
    options: argparse.Namespace,
    url: str,
    source: Path,
    port: int | None = None,
) -> dict[str, Results]:
    shares = _share_out(labels, options.parallel, source)
    out = options.out.resolve()
    with psycopg.connect(url) as connection:
        versions = versions_of(connection, options.parallel)
    jobs = [
        Job(run, number, share, options.gis, versions, url, out, options.timeout, pooler=port)
        for run in runs
        for number, share in enumerate(shares)
    ]
    all_results = {run: Results(run, django.__version__, labels, versions) for run in runs}
    with ThreadPoolExecutor(options.parallel) as workers:
        for job in workers.map(lambda job: work(job, source, resume=options.resume), jobs):
            fold(all_results[job.run], job.journal, job.log)
    return all_results


def versions_of(connection: psycopg.Connection[Any], parallel: int) -> dict[str, str]:
    return {
        "Python": ".".join(map(str, sys.version_info[:3])),
        "Django": django.__version__,
        "psycopg": psycopg.__version__,
        "PostgreSQL": connection.info.parameter_status("server_version") or "",
        "processes": str(parallel),
        "pgbackend": _fingerprint(Path(pgbackend.__file__).parent),
    }


def _fingerprint(package: Path) -> str:
    """Return a hash of the package's code, which tells its versions apart."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _share_out(labels: list[str], processes: int, source: Path) -> list[list[str]]:
    """Deal the labels out, the longest first, so that each share has about as many tests."""
    weights = {label: _weight(label, source) for label in labels}
    shares = max(processes, sum(weights.values()) // SHARE)
    piles: list[tuple[int, list[str]]] = [(0, []) for _ in range(min(shares, len(labels)))]
    for label in sorted(labels, key=lambda label: -weights[label]):
        index = min(range(len(piles)), key=lambda index: piles[index][0])
        total, pile = piles[index]
        piles[index] = (total + weights[label], [*pile, label])
    return [pile for _, pile in sorted(piles, key=lambda pile: -pile[0])]


def _weight(label: str, source: Path) -> int:
    """Return the number of tests that a module of Django's suite defines."""
    files = (source / label.replace(".", os.sep)).glob("**/test*.py")
    trees = (ast.parse(path.read_bytes()) for path in files)
    return 1 + sum(
        isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test")
        for tree in trees
        for node in ast.walk(tree)
    )


def work(job: Job, source: Path, *, resume: bool) -> Job:
    """Run all tests of a job, and start its worker again when it ends early."""
    entry = read(job.journal) if resume and job.journal.exists() else None
    if entry is None or entry.job != job.describe():
        job.journal.write_text(json.dumps({"event": "job", "test": "", **job.describe()}) + "\n")
        job.log.write_text("")
    elif entry.running is not None:
        _append(job, event="forgotten", test=entry.running)  # interrupted: it runs again
    for _ in range(1 + RESTARTS):
        if (entry := read(job.journal)).finished:
            break
        _start_worker(job, source)
        _note_crash(job)
    return job


def _start_worker(job: Job, source: Path) -> None:
    started = time.monotonic()
    with job.log.open("ab") as log:
        status = subprocess.run(
            [sys.executable, "-m", job.worker],
            cwd=source,
            env=job.environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    _append(job, event="ran", test="", seconds=time.monotonic() - started)
    if status:
        _drop_databases(job)


def _note_crash(job: Job) -> None:
    """Record a crash, of the running test or between tests, if the worker has not finished."""
    entry = read(job.journal)
    if entry.finished:
        return
    test = entry.running
    text = tail(job.log)
    _append(job, event="crash", test=test or f"after {entry.begun[-1:]}", text=text)
    if test is not None:
        text = f"the process ended while the test ran:\n{text}"
        _append(job, event="outcome", test=test, outcome="error", text=text)
        _append(job, event="stopped", test=test, seconds=0.0)


def _append(job: Job, **record: Any) -> None:
    with job.journal.open("a", encoding="utf-8") as journal:
        journal.write(json.dumps(record) + "\n")


def _drop_databases(job: Job) -> None:
    """Drop the databases that a crashed worker has left."""
    with psycopg.connect(job.url, autocommit=True) as connection:
        for name in job.databases.values():
            connection.execute(
                sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(
                    sql.Identifier(f"test_{name}")
                )
            )


def _earlier_reference(out: Path, labels: list[str]) -> Results | None:
    """Return stock's results of an earlier run of the same modules with the same Django."""
    path = out / "stock.json"
    if not path.exists():
        return None
    results = Results.load(path)
    same = results.django == django.__version__ and set(results.labels) == set(labels)
    return results if same else None


def _judge_alone(all_results: dict[str, Results]) -> int:
    """Judge without a reference: every failure counts, as stock is known to have none."""
    bad = False
    for results in all_results.values():
        for test, record in results.tests.items():
            if record.outcome in ("failed", "error", "unexpected success"):
                bad = True
                print(f"\n{results.run}: {test}: {record.outcome}\n{record.text}")
        for trouble in (*results.crashes, *(fault["text"] for fault in results.faults)):
            bad = True
            print(f"\n{results.run}: {trouble}")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
