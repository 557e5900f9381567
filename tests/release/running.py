"""Runs programs, and ends the checks with their output if one fails."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]


class Failed(Exception):
    """A check that failed: its text says what was found, and what to do."""


def fail(text: str) -> NoReturn:
    raise Failed(text)


@dataclass(frozen=True)
class Ended:
    """The exit status of a program, and all that it printed."""

    status: int
    output: str


def run(command: Sequence[object], *, status: int = 0, **given: object) -> str:
    """Return the output of `command`; fail if it does not end with `status`."""
    ended = outcome(command, **given)
    if ended.status != status:
        words = " ".join(map(str, command))
        fail(f"{words}\nended with {ended.status}, not {status}:\n{ended.output}")
    return ended.output


def outcome(
    command: Sequence[object],
    *,
    cwd: Path = ROOT,
    environment: Mapping[str, str] | None = None,
    umask: int = -1,
) -> Ended:
    """Run `command` to its end; return its exit status and output."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment,
        umask=umask,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    return Ended(done.returncode, done.stdout)


def tool(name: str) -> Path:
    """Return the path of the program `name` of this environment."""
    return Path(sys.executable).parent / name


def git(*arguments: str, cwd: Path = ROOT) -> str:
    """Return the output of a command of git."""
    return run(["git", *arguments], cwd=cwd).strip()
