"""Installs the wheel alone in an empty environment, and uses it as a new project would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError, URLError

from tests.support.polling import wait_for
from tests.support.ports import free_port

from .running import ROOT, fail, outcome, run, tool

#: The list of what is installed with pgbackend, for `.github/workflows/release.yml`.
BILL = ROOT / "build/pgbackend.cdx.json"

_SETTINGS = """
from pgbackend import embedded

DATABASES = {"default": {"ENGINE": "pgbackend", **embedded.server(BASE_DIR / "var").params}}
INSTALLED_APPS += ["pgbackend"]
"""
_URLS = """
import asyncio

from django.contrib.auth.models import User
from django.db import transaction
from django.http import JsonResponse
from django.urls import path

import pgbackend


async def users(request):
    async with transaction.atomic():
        await User.objects.acreate(username="a")
    User.objects.create(username="b")  # no await
    counts = await asyncio.gather(*(User.objects.acount() for _ in range(20)))
    return JsonResponse({"users": counts, "open": pgbackend.metrics.connections().async_open})


urlpatterns = [path("users/", users)]
"""


@dataclass(frozen=True)
class Environment:
    """A virtual environment, and the folder of a project beside it."""

    home: Path

    @property
    def python(self) -> Path:
        return self.home / "venv/bin/python"

    def make(self) -> None:
        """Make the environment and the folder, both empty."""
        run([sys.executable, "-m", "venv", "--without-pip", self.home / "venv"], cwd=self.home)
        self.project.mkdir()

    @property
    def project(self) -> Path:
        return self.home / "project"

    @property
    def variables(self) -> Mapping[str, str]:
        ours = {"DJANGO_SETTINGS_MODULE", "PYTHONPATH", "DATABASE_URL", "PGBACKEND_SHORTCUTS"}
        return {name: value for name, value in os.environ.items() if name not in ours}

    def pip(self, *arguments: object, status: int = 0) -> str:
        """Return the output of this interpreter's pip, told to work in the environment."""
        pip = (sys.executable, "-m", "pip", "--python", self.python)
        quiet = ("--quiet", "--disable-pip-version-check")
        return run([*pip, *arguments, *quiet], status=status, environment=self.variables)

    def run(self, *arguments: object, status: int = 0) -> str:
        """Return the output of the environment's Python, which must end with `status`."""
        return run(
            [self.python, *arguments], status=status, cwd=self.project, environment=self.variables
        )


def check(wheel: Path, version: str, home: Path) -> str:
    """Fail if the wheel does not work in an empty environment; return what was done."""
    environment = Environment(home)
    environment.make()
    environment.pip("install", wheel)
    write_bill_of_materials(environment)
    environment.pip("install", f"{wheel}[embedded]", "uvicorn")
    environment.pip("check")
    _look_at(environment, version)
    _use(environment)
    _with_other_psycopgs(environment, wheel)
    return "startproject, migrate, an async view, check and report; older psycopg refused"


def write_bill_of_materials(environment: Environment) -> None:
    """Write what an installation brings today, in the form of CycloneDX, to `build/`."""
    BILL.parent.mkdir(exist_ok=True)
    wanted = ("--output-reproducible", "--pyproject", ROOT / "pyproject.toml")
    run([tool("cyclonedx-py"), "environment", *wanted, "-o", BILL, environment.python])


def _look_at(environment: Environment, version: str) -> None:
    code = (
        "import pgbackend, importlib.metadata as m; "
        "print(pgbackend.__version__, m.version('pgbackend'), pgbackend.__file__)"
    )
    stated, installed, place = environment.run("-c", code).split(maxsplit=2)
    if {stated, installed} != {version} or not place.startswith(str(environment.home)):
        fail(f"the wheel of {version} gives {stated}, {installed} at {place}")


def _use(environment: Environment) -> None:
    run(
        [environment.home / "venv/bin/django-admin", "startproject", "shop", "."],
        cwd=environment.project,
        environment=environment.variables,
    )
    shop = environment.project / "shop"
    with (shop / "settings.py").open("a") as settings:
        settings.write(_SETTINGS)
    (shop / "urls.py").write_text(_URLS)
    environment.run("manage.py", "migrate", "--verbosity=0")
    with _served(environment) as address:
        answer = json.loads(_read(f"{address}/users/") or "{}")
    if answer.get("users") != [2] * 20 or not 1 <= answer["open"] <= 10:
        fail(f"the async view answered {answer}")
    checked = environment.run("manage.py", "pgbackend", "check")
    if "All is well." not in checked:
        fail(f"manage.py pgbackend check says:\n{checked}")
    _check_report(environment)


def _check_report(environment: Environment) -> None:
    without = environment.run("-m", "pgbackend.report")
    within = run(
        [environment.python, "-m", "pgbackend.report"],
        cwd=environment.project,
        environment={**environment.variables, "DJANGO_SETTINGS_MODULE": "shop.settings"},
    )
    if "SETTINGS_MODULE is not set" not in without or "The server is PostgreSQL" not in within:
        fail(f"python -m pgbackend.report says:\n{without}\n{within}")


@contextmanager
def _served(environment: Environment) -> Iterator[str]:
    """Serve the project by uvicorn; yield its address."""
    port = free_port()
    log = environment.home / "uvicorn.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [environment.python, "-m", "uvicorn", "shop.asgi:application", f"--port={port}"],
            cwd=environment.project,
            env=environment.variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(lambda: server.poll() is not None or _listens(address), "uvicorn", 60)
        yield address
    except (AssertionError, URLError) as exc:
        fail(f"{exc!r}; uvicorn's log:\n{log.read_text()}")
    finally:
        server.terminate()
        server.wait(30)


def _listens(address: str) -> bool:
    try:
        _read(f"{address}/nothing-here")
    except HTTPError:
        return True
    except URLError:
        return False
    return True


def _read(address: str) -> str:
    with urllib.request.urlopen(address, timeout=30) as answer:
        return str(answer.read().decode())


def _with_other_psycopgs(environment: Environment, wheel: Path) -> None:
    """Ask for a psycopg that is too old, by pip's rules and against them."""
    refused = environment.pip("install", "--dry-run", wheel, "psycopg==3.2.*", status=1)
    if "psycopg" not in refused or "conflict" not in refused.lower():
        fail(f"pip does not tell why it refuses:\n{refused}")
    environment.pip("uninstall", "--yes", "psycopg-pool")
    missing = "needs psycopg-pool, which is not installed"
    _check_told(environment, missing, "psycopg-pool>=3.3.3,<3.4")
    environment.pip("install", "--no-deps", "psycopg==3.2.*", "psycopg-binary==3.2.*")
    _check_told(environment, "does not support psycopg 3.2.", "psycopg[binary]>=3.3.9,<3.4")


def _check_told(environment: Environment, cause: str, cure: str) -> None:
    """Fail unless Django and the report both tell `cause` and `cure`."""
    ended = outcome(
        [environment.python, "manage.py", "check"],
        cwd=environment.project,
        environment=environment.variables,
    )
    reported = environment.run("-m", "pgbackend.report")
    for said in (ended.output, reported):
        if ended.status == 0 or cause not in said or f"pip install '{cure}'" not in said:
            fail(f"neither cause nor cure is told ({ended.status}):\n{said}")
