"""Makes the interpreter of the servers: a virtual environment with all peers, made once."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Git ignores this directory, and deleting it is harmless.
HOME = ROOT / ".pgbackend" / "bench"
_REQUIREMENTS = Path(__file__).parent / "requirements.txt"
#: django-async-backend asks for this version of Python.
_OLDEST = (3, 12)
_NAMES = ("python3.13", "python3.14", "python3.12", "python3")


class NoEnvironmentError(RuntimeError):
    """Says that the environment could not be made, why, and what to do."""


def interpreter(given: str | None = None) -> Path:
    """Return the environment's interpreter; make it if it is missing or out of date."""
    base = given or _find_base()
    version = _version(base)
    if version is None or version < _OLDEST:
        raise NoEnvironmentError(f"{base} is no Python 3.12 or later: name another with --python")
    home = HOME / f"venv-{'.'.join(map(str, version))}"
    python, stamp = home / "bin" / "python", home / "requirements.txt"
    wanted = _REQUIREMENTS.read_text()
    if not (stamp.exists() and stamp.read_text() == wanted and _version(str(python))):
        print(f"Installing the peers into {home.relative_to(ROOT)} ...", flush=True)
        _run([base, "-m", "venv", "--clear", str(home)])
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        _run([*pip, "-r", str(_REQUIREMENTS)])
        stamp.write_text(wanted)
    return python


def _find_base() -> str:
    """Return this interpreter if it is new enough, else the first of the usual names that is."""
    if sys.version_info >= _OLDEST:
        return sys.executable
    for name in _NAMES:
        version = _version(name) if shutil.which(name) else None
        if version is not None and version >= _OLDEST:
            return name
    raise NoEnvironmentError(
        "the peers need Python 3.12 or later, and none is on the PATH: name one with --python"
    )


def _version(python: str) -> tuple[int, ...] | None:
    command = [python, "-c", "import sys; print(*sys.version_info[:2])"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None  # a shim may lead nowhere
    return tuple(map(int, done.stdout.split()))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoEnvironmentError(
            f"{' '.join(command[1:4])} failed; is pip's package index reachable?\n"
            f"{(done.stdout + done.stderr)[-2000:]}"
        )
