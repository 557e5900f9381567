"""Makes the projects to serve: our shop, and the site that ``wagtail start`` generates."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psycopg

from .ways import WAYS, Way

ROOT = Path(__file__).parents[2]
#: The begin of the databases' names, and the `application_name` of what is served.
NAME = "pgbackend_sync_stack"


@dataclass(frozen=True)
class Project:
    """A project that can be served, with its own database."""

    settings: str
    url: str
    paths: tuple[Path, ...]
    told: dict[str, Any]
    """The facts that its clients must know: cookies, tokens, numbers of rows."""

    def environment(self, way: Way) -> dict[str, str]:
        """Return the environment of a process that serves the project in `way`."""
        return _environment(self.settings, self.url, self.paths, way)


def _environment(settings: str, url: str, paths: tuple[Path, ...], way: Way) -> dict[str, str]:
    given = {
        "url": url,
        "engine": way.engine,
        "options": way.options,
        "max_age": way.max_age,
        "name": NAME,
        "whole": way.whole,
    }
    return {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": settings,
        "SYNC_STACK": json.dumps(given),
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *paths))),
        "PYTHONWARNINGS": "ignore",
    }


@contextmanager
def made(name: str, server: str) -> Iterator[Project]:
    """Make the project `name` with a database on `server`, which is dropped afterwards."""
    with TemporaryDirectory() as directory, _database(f"{NAME}_{name}", server) as url:
        paths: tuple[Path, ...] = ()
        if name == "wagtail":
            _generate(Path(directory))
            paths = (Path(directory),)
        settings = f"benchmarks.sync_stack.{name}.settings"
        environment = _environment(settings, url, paths, WAYS[0])
        output = _run([sys.executable, "-m", f"benchmarks.sync_stack.{name}.prepare"], environment)
        yield Project(settings, url, paths, json.loads(output))


def _generate(directory: Path) -> None:
    """Have Wagtail generate its site, with the packages `mysite`, `home` and `search`."""
    start = "import sys; from wagtail.bin.wagtail import main; main()"
    _run([sys.executable, "-c", start, "start", "mysite", str(directory)], dict(os.environ))


def _run(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return done.stdout


@contextmanager
def _database(name: str, server: str) -> Iterator[str]:
    with psycopg.connect(server, autocommit=True) as session:
        session.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        session.execute(f"CREATE DATABASE {name}")
        head, slash, rest = server.partition("?")
        try:
            yield f"{head.rpartition('/')[0]}/{name}{slash}{rest}"
        finally:
            session.execute(f"DROP DATABASE {name} WITH (FORCE)")
