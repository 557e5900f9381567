"""The command: starts the server and the workers, gathers what they wrote, and compares."""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import django
import psycopg
from psycopg import sql

import pgbackend
from pgbackend import embedded

from .compare import CONTEXTS, report
from .results import Results, fold
from .source import CACHE, NoSource, tests_dir

MODULES = (
    "basic",
    "transactions",
    "transaction_hooks",
    "select_for_update",
    "delete",
    "bulk_create",
    "async",
    "backends",
)
ENGINES = {"stock": "django.db.backends.postgresql", "sync": "pgbackend", "green": "pgbackend"}
#: Nothing here is worth keeping after a crash of the machine.
SERVER_SETTINGS = {
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "max_connections": "200",
}


@dataclass(frozen=True)
class Job:
    """What one worker does."""

    context: str
    number: int
    labels: list[str]
    url: str
    out: Path
    timeout: float

    @property
    def name(self) -> str:
        return f"{self.context}-{self.number}"

    @property
    def journal(self) -> Path:
        return self.out / f"{self.name}.jsonl"

    @property
    def log(self) -> Path:
        return self.out / f"{self.name}.log"

    @property
    def databases(self) -> dict[str, str]:
        """Names that no other worker of any run uses."""
        name = f"suite_{os.getpid()}_{self.context}_{self.number}"
        return {"default": name, "other": f"{name}_other"}

    def environment(self) -> dict[str, str]:
        job: dict[str, Any] = {
            "context": self.context,
            "engine": ENGINES[self.context],
            "labels": self.labels,
            "url": self.url,
            "journal": str(self.journal),
            "timeout": self.timeout,
            "databases": self.databases,
        }
        # Where this package, and pgbackend, were imported from.
        ours = [Path(__file__).parents[2], Path(pgbackend.__file__).parents[1]]
        path = [str(ours[1]), str(ours[0]), os.environ.get("PYTHONPATH", "")]
        return {
            **os.environ,
            "SUITE_JOB": json.dumps(job),
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
        }


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    try:
        source = tests_dir()
    except NoSource as exc:
        print(exc, file=sys.stderr)
        return 2
    contexts = [name for name in CONTEXTS if name in (options.context or CONTEXTS)]
    with embedded.server(settings=SERVER_SETTINGS) as server:
        all_results = _run_contexts(contexts, options, server.url, out, source)
    for results in all_results.values():
        results.save(out / f"{results.context}.json")
        print(results.summary())
    if "stock" not in all_results:
        reference = _earlier_reference(out, options.modules)
        if reference is None:
            return _judge_alone(all_results)
        all_results = {"stock": reference, **all_results}
    return 0 if report(all_results) else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.suite", description="Run Django's own test suite on pgbackend."
    )
    parser.add_argument("modules", nargs="*", default=list(MODULES), help="as runtests.py has them")
    parser.add_argument(
        "--context", action="append", choices=CONTEXTS, help="may be repeated; default: all"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=CACHE / f"results-{django.__version__}",
        help="directory for outcomes (JSON) and logs",
    )
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="worker processes")
    parser.add_argument(
        "--timeout", type=float, default=120, metavar="SECONDS", help="for a single test"
    )
    options = parser.parse_args(arguments)
    options.modules = [module.rstrip("/") for module in options.modules]
    return options


def _run_contexts(
    contexts: list[str], options: argparse.Namespace, url: str, out: Path, source: Path
) -> dict[str, Results]:
    shards = _share_out(options.modules, options.parallel, source)
    jobs = [
        Job(context, number, labels, url, out, options.timeout)
        for context in contexts
        for number, labels in enumerate(shards)
    ]
    all_results = {name: Results(name, django.__version__, options.modules) for name in contexts}
    with ThreadPoolExecutor(options.parallel) as workers:
        times = workers.map(lambda job: _work(job, source), jobs)
        for job, seconds in zip(jobs, times, strict=True):
            results = all_results[job.context]
            fold(results, job.journal, job.log)
            results.seconds += seconds
    return all_results


def _share_out(labels: list[str], shares: int, source: Path) -> list[list[str]]:
    """Deal the labels out so that each share has about as many tests."""
    piles: list[tuple[int, list[str]]] = [(0, []) for _ in range(min(shares, len(labels)))]
    for label in sorted(labels, key=lambda label: -_weight(label, source)):
        index = min(range(len(piles)), key=lambda index: piles[index][0])
        total, pile = piles[index]
        piles[index] = (total + _weight(label, source), [*pile, label])
    return [pile for _, pile in piles]


def _weight(label: str, source: Path) -> int:
    """The number of tests that a module of Django's suite defines."""
    files = (source / label.replace(".", os.sep)).glob("**/test*.py")
    trees = (ast.parse(path.read_bytes()) for path in files)
    return 1 + sum(
        isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test")
        for tree in trees
        for node in ast.walk(tree)
    )


def _work(job: Job, source: Path) -> float:
    """Run a worker to its end, however it ends; return how long it took."""
    job.journal.write_text("")
    started = time.monotonic()
    with job.log.open("wb") as log:
        status = subprocess.run(
            [sys.executable, "-X", "faulthandler", "-m", "tests.suite.worker"],
            cwd=source,
            env=job.environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    if status:
        _drop_databases(job)
    return time.monotonic() - started


def _drop_databases(job: Job) -> None:
    """Drop what a worker that crashed has left."""
    with psycopg.connect(job.url, autocommit=True) as connection:
        for name in job.databases.values():
            connection.execute(
                sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(
                    sql.Identifier(f"test_{name}")
                )
            )


def _earlier_reference(out: Path, modules: list[str]) -> Results | None:
    """Stock's results of an earlier run of the same modules with the same Django."""
    path = out / "stock.json"
    if not path.exists():
        return None
    results = Results.load(path)
    same = results.django == django.__version__ and set(results.labels) == set(modules)
    return results if same else None


def _judge_alone(all_results: dict[str, Results]) -> int:
    """Without a reference: every failure counts, as stock is known to have none."""
    bad = False
    for results in all_results.values():
        for test, record in results.tests.items():
            if record.outcome in ("failed", "error", "unexpected success"):
                bad = True
                print(f"\n{results.context}: {test}: {record.outcome}\n{record.text}")
        for trouble in (*results.crashes, *(fault["text"] for fault in results.faults)):
            bad = True
            print(f"\n{results.context}: {trouble}")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
