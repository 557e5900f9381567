"""Runs the steps of a cell: our own tests, and those modules of Django's that CI runs."""

from __future__ import annotations

import datetime
import os
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from .cells import Cell
from .environments import Environment, NotYet, environment
from .interpreters import ROOT, CannotMake
from .journal import Entry, Journal, code
from .servers import newer_pgbouncer, programs

STEPS = ("tests", "django")
TESTS = ("tests/driver", "tests/backend", "tests/contract", "tests/testcases")
#: A step that takes longer hangs.
HOURS = {"tests": 3, "django": 2}
#: The lines in which Django's tests say how many passed in each context.
SUMMARY = r"^((?:stock|sync|green)\s+\d+ passed, \d+ failed, \d+ skipped) in"
#: The version, in what a server says at its start.
SERVER_VERSION = "from pgbackend import embedded; import psycopg; \
print(psycopg.connect(embedded.server().url).info.parameter_status('server_version'))"


@dataclass(frozen=True)
class Made:
    """A cell whose environment and server exist, and where its logs go."""

    cell: Cell
    environment: Environment
    variables: dict[str, str]
    logs: Path

    def log(self, step: str) -> Path:
        return self.logs / f"{self.cell.name}.{step}.log"

    def report(self, step: str) -> Path:
        return self.logs / f"{self.cell.name}.{step}.xml"


def run_cell(cell: Cell, home: Path, journal: Journal, *, quick: bool, again: bool) -> bool:
    """Run the steps of a cell that have not passed yet; return whether all have passed."""
    steps = [s for s in STEPS if again or not journal.has_passed(cell, s, quick=quick)]
    if not steps:
        return True
    try:
        made = make(cell, home)
        versions = made.environment.versions() | {"PostgreSQL": _server_version(made)}
    except CannotMake as exc:
        print(exc, file=sys.stderr)
        reason = str(exc).splitlines()[0]
        journal.add(Entry(cell.name, "tests", passed=False, outcome=reason, day=_today()))
        return isinstance(exc, NotYet)
    passed = True
    for step in steps:
        entry = _run_step(made, step, versions, quick=quick)
        journal.add(entry)
        print(f"{cell.name} {step}: {entry.outcome}; {made.log(step)}", flush=True)
        passed &= entry.passed
    return passed


def make(cell: Cell, home: Path) -> Made:
    """Make what a cell needs, if it is missing."""
    logs = home / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    variables = newer_pgbouncer(home)
    variables |= {k: v for k, v in os.environ.items() if k not in ("DATABASE_URL", "PYTHONPATH")}
    variables["PGBACKEND_PG_BINDIR"] = str(programs(cell.postgresql, home))
    return Made(cell, environment(cell, home), variables, logs)


def _server_version(made: Made) -> str:
    done = subprocess.run(
        made.environment.command("-c", SERVER_VERSION),
        cwd=ROOT,
        env=made.variables,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise CannotMake(f"PostgreSQL {made.cell.postgresql} does not start:\n{done.stderr}")
    return done.stdout.split()[0]


def _run_step(made: Made, step: str, versions: dict[str, str], *, quick: bool) -> Entry:
    began, its_code = time.monotonic(), code()
    made.report(step).unlink(missing_ok=True)
    try:
        with made.log(step).open("w") as log:
            status = subprocess.run(
                made.environment.command(*_arguments(made, step, quick=quick)),
                cwd=ROOT,
                env=made.variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=HOURS[step] * 3600,
                check=False,
            ).returncode
        outcome, skipped = _outcome(made, step)
    except subprocess.TimeoutExpired:
        status, outcome, skipped = 1, f"did not end in {HOURS[step]} hours", {}
    return Entry(
        made.cell.name,
        step,
        passed=status == 0,
        outcome=outcome,
        day=_today(),
        minutes=round((time.monotonic() - began) / 60, 1),
        loop=made.cell.loop,
        code=its_code,
        quick=quick,
        versions=versions,
        skipped=skipped,
    )


def _arguments(made: Made, step: str, *, quick: bool) -> list[str | Path]:
    if step == "tests":
        slow = [] if quick else ["--slow"]
        report = f"--junit-xml={made.report(step)}"
        return ["-m", "pytest", *TESTS, "--loop", made.cell.loop, report, "-q", *slow]
    out = made.logs / f"{made.cell.name}.suite"
    return ["-m", "tests.suite", "--backend", "--parallel", "2", "--out", out]


def _outcome(made: Made, step: str) -> tuple[str, dict[str, int]]:
    """Say in a few words what a step came to, and count the tests that it skipped."""
    log = made.log(step).read_text(errors="replace")
    if step == "tests":
        return read_report(made.report(step)) if made.report(step).exists() else (_last(log), {})
    return "; ".join(re.findall(SUMMARY, log, re.MULTILINE)) or _last(log), {}


def read_report(report: Path) -> tuple[str, dict[str, int]]:
    """Return what pytest's report says: the numbers of outcomes, and of skips by their reason."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    kinds = Counter(child.tag for case in cases for child in case)
    failed, errors, skips = kinds["failure"], kinds["error"], kinds["skipped"]
    parts = [f"{len(cases) - failed - errors - skips} passed"]
    parts += [f"{n} {word}" for n, word in ((failed, "failed"), (errors, "errors")) if n]
    reasons = Counter(
        child.get("message", "") for case in cases for child in case if child.tag == "skipped"
    )
    return ", ".join([*parts, f"{skips} skipped"] if skips else parts), dict(reasons)


def _last(log: str) -> str:
    lines = log.strip().splitlines()
    return lines[-1] if lines else "said nothing"


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()
