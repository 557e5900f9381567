"""Runs programs for a test, all at once, and returns their output."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Finished:
    """Holds the exit status of a program, and all of its output."""

    returncode: int
    output: str
    errors: str

    def check(self) -> str:
        """Return the standard output; fail if the program failed, or wrote to standard error."""
        assert self.returncode == 0 and not self.errors, f"{self.output}\n{self.errors}"
        return self.output


@dataclass(frozen=True)
class Program:
    """Describes a Python program: its arguments, and the variables added to our environment."""

    arguments: Sequence[str]
    cwd: Path = ROOT
    environment: Mapping[str, str] | None = None


def run_all(programs: Iterable[Program], timeout: float = 120) -> list[Finished]:
    """Run Python programs side by side; return how each ended, in their order."""
    started = [_start(program) for program in programs]
    return [_finish(process, out, errors, timeout) for process, out, errors in started]


def _start(program: Program) -> tuple[subprocess.Popen[str], object, object]:
    # Files rather than pipes: a pipe that nobody reads yet would fill, and stop the program.
    out, errors = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(program.environment or {})}
    environment.pop("DJANGO_SETTINGS_MODULE", None)
    process = subprocess.Popen(
        [sys.executable, *program.arguments],
        cwd=program.cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=errors,
        text=True,
    )
    return process, out, errors


def _finish(process: subprocess.Popen[str], out, errors, timeout: float) -> Finished:
    try:
        process.wait(timeout)
    finally:
        process.kill()
        process.wait()
    texts = []
    for file in (out, errors):
        file.seek(0)
        texts.append(file.read())
        file.close()
    return Finished(process.returncode, *texts)
