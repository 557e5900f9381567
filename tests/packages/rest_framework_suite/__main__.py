"""Runs the REST framework's own tests: ``python -m tests.packages.rest_framework_suite``.

The tests come with its source distribution, unedited. They run on Django's engine, on pgbackend in
sync code, and through the whole stack, each in a process of its own. The exit status is 1 if an
outcome differs from stock's, unless `KNOWN` has the reason.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path
from xml.etree import ElementTree as ET

import pgbackend
from pgbackend import embedded
from tests.server import server
from tests.suite.source import CACHE

HERE = Path(__file__).parent
ENGINES = {
    "stock": "django.db.backends.postgresql",
    "sync": "pgbackend",
    "whole": "pgbackend",
}
BY_NAME = "the package's conftest.py knows PostgreSQL by the name of Django's ENGINE only; skips"
#: The tests whose outcome differs: a pattern, the contexts, the outcome, and the reason.
KNOWN = [
    (f"tests.test_filters.{test}", ("sync", "whole"), "skipped", BY_NAME)
    for test in ("SearchFilterFullTextTests.*", "SearchFilterTests.test_unaccented_search_lookups")
]


def main() -> int:
    source = _source()
    with tempfile.TemporaryDirectory() as out:
        outcomes = {context: _run(context, source, Path(out)) for context in ENGINES}
    bad = 0
    for context, found in outcomes.items():
        print(f"{context:6} {len(found)} tests: {dict(Counter(found.values()))}")
        for test in sorted(outcomes["stock"].keys() | found.keys()):
            theirs, ours = outcomes["stock"].get(test, "not run"), found.get(test, "not run")
            if theirs == ours:
                continue
            reason = _reason(test, context, ours)
            bad += reason is None
            print(f"  {test}: {theirs} on stock, {ours} here: {reason or 'no reason is known'}")
    return int(bad > 0 or not outcomes["stock"])


def _reason(test: str, context: str, outcome: str) -> str | None:
    for pattern, contexts, known, reason in KNOWN:
        if fnmatchcase(test, pattern) and context in contexts and known == outcome:
            return reason
    return None


def _source() -> Path:
    """Return the directory of the source distribution, which pip downloads once."""
    version = importlib.metadata.version("djangorestframework")
    home = CACHE / f"djangorestframework-{version}"
    if not home.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", "djangorestframework", "--dest", str(CACHE)]
        subprocess.run([*command, f"djangorestframework=={version}"], check=True)
        with tarfile.open(CACHE / f"djangorestframework-{version}.tar.gz") as tar:
            tar.extractall(CACHE, filter="data")
    return home


def _run(context: str, source: Path, out: Path) -> dict[str, str]:
    """Run all tests in one context; return the outcome of each."""
    entry = {
        **embedded.database_settings(server.url),
        "ENGINE": ENGINES[context],
        "NAME": f"rest_framework_{context}_{os.getpid()}",
    }
    log, report = out / f"{context}.txt", out / f"{context}.xml"
    arguments = ["-q", "-p", "no:cacheprovider", "-p", "no:asyncio", f"--junitxml={report}"]
    with log.open("w") as output:
        subprocess.run(
            [sys.executable, str(HERE / "start.py"), context, *arguments, "tests"],
            cwd=source,
            env={
                **os.environ,
                "DATABASE_URL": "see dj_database_url.py",
                "SUITE_DATABASE": json.dumps(entry),
                "PYTHONPATH": os.pathsep.join(
                    [str(source), str(HERE), str(Path(pgbackend.__file__).parents[1])]
                ),
            },
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if not report.exists():
        print(log.read_text()[-5000:])
        return {}
    found = _outcomes(report)
    for line in log.read_text().splitlines():
        if line.startswith(("FAILED", "ERROR", "requests through")):
            print(f"{context}: {line}")
    return found


def _outcomes(report: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for case in ET.parse(report).iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}"
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        found[name] = kinds.pop() if kinds else "passed"
    return found


if __name__ == "__main__":
    status = main()
    server.release()
    sys.exit(status)
