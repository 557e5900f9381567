"""Builds the release of the last commit into `dist/`, and checks it: `python -m tests.release`."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from . import agreeing, building, contents, forge, smoke
from .running import ROOT, Failed, git

T = TypeVar("T")


def main() -> int:
    """Return the exit status: 0 if nothing is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.release", description=__doc__)
    parser.add_argument("--no-install", action="store_true", help="do not install the wheel")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pgbackend-release-") as folder:
        try:
            _check(Path(folder), install=not given.no_install)
        except Failed as exc:
            print(f"FAILED: {exc}", file=sys.stderr)
            return 1
    return 0


def _check(folder: Path, *, install: bool) -> None:
    if git("status", "--porcelain"):
        print("Note: changes that are not committed are not in the release.")
    _step("version", agreeing.check)
    with ThreadPoolExecutor(1) as pool:  # it waits for programs, as the builds do
        files = pool.submit(forge.check)
        built = _built_and_checked(folder, install=install)
        _step("files for the forge", files.result)
    _keep(built)


def _built_and_checked(folder: Path, *, install: bool) -> building.Built:
    built = _step("two builds, the same bytes", lambda: building.build(folder))
    _step("contents and metadata", lambda: contents.check(built))
    if install:
        home = folder / "smoke"
        home.mkdir()
        _step("installed alone", lambda: smoke.check(built.wheel, agreeing.version(), home))
    return built


def _step(name: str, check: Callable[[], T]) -> T:
    began = time.monotonic()
    found = check()
    told = f": {found}" if isinstance(found, str) else ""
    print(f"ok  {time.monotonic() - began:5.1f} s  {name}{told}", flush=True)
    return found


def _keep(built: building.Built) -> None:
    """Put the files in `dist/`, and say what they are."""
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    dist.mkdir()
    for path in (built.sdist, built.wheel):
        shutil.copy2(path, dist)
        print(f"dist/{path.name}  sha256 {built.hashes[path.name]}")


if __name__ == "__main__":
    sys.exit(main())
