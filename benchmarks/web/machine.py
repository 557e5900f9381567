"""Describes the machine and the versions of a run."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path

import pgbackend

from .environment import ROOT

_PACKAGES = (
    "Django",
    "asgiref",
    "psycopg",
    "psycopg-pool",
    "greenlet",
    "django-async-backend",
    "SQLAlchemy",
    "asyncpg",
    "tortoise-orm",
    "starlette",
    "Jinja2",
    "uvicorn",
    "uvloop",
    "httptools",
    "gunicorn",
    "gunicorn_h1c",
)
_ASK = """
import importlib.metadata as m, json, platform, sys
names = sys.argv[1:]
found = {d.metadata["Name"].lower(): d.version for d in m.distributions()}
versions = {name: found[name.lower()] for name in names if name.lower() in found}
print(json.dumps({"Python": platform.python_version(), **versions}))
"""


#: The one entry of `machine()` that differs from run to run.
LOAD = "load when it began"


def machine() -> dict[str, str]:
    """Return processor, memory, system, and how busy the machine was when the run began."""
    return {
        "processor": _field("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": str(os.cpu_count()),
        "memory": f"{int(_field('/proc/meminfo', 'MemTotal').split()[0]) / 2**20:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        LOAD: f"{os.getloadavg()[0]:.2f}",
    }


def versions(python: Path, postgresql: str) -> dict[str, str]:
    """Return the versions of everything that took part."""
    command = [str(python), "-c", _ASK, *_PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    ours = f"{pgbackend.__version__} ({_commit()})"
    return {"pgbackend": ours, **json.loads(done.stdout), "PostgreSQL": postgresql}


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "no commit known"
    return done.stdout.strip()


def has_code_of(version: str) -> bool:
    """Return whether pgbackend's code here is that of a run whose `versions()` has `version`."""
    commit = version.partition("(")[2].rstrip(")")
    command = ["git", "-C", str(ROOT), "diff", "--quiet", commit, "--", "pgbackend"]
    try:
        return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0
    except OSError:  # no git, and so no commit known
        return False


def _field(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""
