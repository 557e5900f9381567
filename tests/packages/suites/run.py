"""Runs the tests of one package in one context, in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

import pgbackend
from pgbackend import embedded
from tests.packages.suites.table import Package

HERE = Path(__file__).parent
ROOT = Path(pgbackend.__file__).parents[1]
#: Git ignores this directory, and deleting it is harmless.
CACHE = HERE.parents[2] / ".pgbackend" / "packages"
ENGINES = {
    "stock": "django.db.backends.postgresql",
    "sync": "pgbackend",
    "green": "pgbackend",
}
#: Seconds after which a context that hangs is ended.
TIMEOUT = 900


def fetch(package: Package) -> Path:
    """Return the directory that has the package's source and what its tests require, fetched once.

    What is fetched is installed without dependencies, so that Django stays the one that runs this.
    """
    home = CACHE / f"{package.name}-{package.version}"
    if not home.is_dir():
        partial = home.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        pinned = f"{package.name}=={package.version}"
        _pip("download", "--no-binary", package.name, "--dest", str(partial), pinned)
        _pip("install", "--target", str(partial / "installed"), pinned, *package.requires)
        (archive,) = partial.glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(partial / "unpacked", filter="data")
        partial.rename(home)
    return home


def _pip(command: str, *arguments: str) -> None:
    pip = [sys.executable, "-m", "pip", command, "--quiet", "--no-deps", *arguments]
    subprocess.run(pip, check=True)


def run(package: Package, context: str, url: str) -> dict[str, str]:
    """Run all tests in one context; return the outcome of each; the log stays in `CACHE`."""
    home = fetch(package)
    (source,) = (home / "unpacked").iterdir()
    log, report = home / f"{context}.txt", home / f"{context}.xml"
    report.unlink(missing_ok=True)
    where = source / package.directory
    arguments = _arguments(package, where, report)
    with log.open("w") as output:
        try:
            subprocess.run(
                [sys.executable, "-P", str(HERE / "start.py"), context, *arguments],
                cwd=where,
                env={**os.environ, **_environment(package, context, url, home, source)},
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
                timeout=TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            print(f"{package.name}, {context}: was ended after {TIMEOUT} s")
    if not report.exists():
        print(f"{package.name}, {context}: no report:\n{log.read_text()[-3000:]}")
        return {}
    return outcomes(report)


def _arguments(package: Package, where: Path, report: Path) -> Iterator[str]:
    yield from ("-q", "-p", "no:cacheprovider", "-p", "no:asyncio", f"--junitxml={report}")
    if package.settings:
        yield from ("-c", str(HERE / "pytest.ini"), f"--rootdir={where}", f"--confcutdir={where}")
        yield f"--ds={package.settings}"
    yield from package.tests


def _environment(
    package: Package, context: str, url: str, home: Path, source: Path
) -> dict[str, str]:
    entry = {
        **embedded.database_settings(url),
        "ENGINE": ENGINES[context],
        "NAME": f"{package.name.replace('-', '_')}_{context}_{os.getpid()}",
    }
    path = [source / package.directory, source, home / "installed", HERE / "stand_ins", ROOT]
    return {
        "DATABASE_URL": url,
        "SUITE_DATABASE": json.dumps(entry),
        "PYTHONPATH": os.pathsep.join(map(str, path)),
    }


def outcomes(report: Path) -> dict[str, str]:
    """Return the outcome of each test in a report of pytest's."""
    found: dict[str, str] = {}
    for case in ET.parse(report).iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}"
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        # A test that fails, and whose teardown fails too, has both: sorted, that is one answer.
        found[name] = min(kinds) if kinds else "passed"
    return found
