"""Writes Django projects of a few lines into a directory, and runs their commands."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from django.db import connections

from tests.support.processes import ROOT, Finished, Program, run_all

_SETTINGS = """
SECRET_KEY = "tests"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
ROOT_URLCONF = "views"
ALLOWED_HOSTS = ["*"]
"""


class Project:
    """A project in the directory `home`, whose settings are the module `project_settings`."""

    def __init__(self, home: Path, **settings: Any) -> None:
        self.home = home
        given = {"INSTALLED_APPS": ["pgbackend"], "DATABASES": {"default": own_database()}}
        self.write("project_settings", _SETTINGS + _assigned({**given, **settings}))
        self.write("views", "urlpatterns = []\n")

    def write(self, module: str, text: str) -> None:
        (self.home / f"{module}.py").write_text(text)

    def program(self, *arguments: str) -> Program:
        """Return a Python program that runs in the project."""
        return Program(arguments, self.home, {"PYTHONPATH": f"{ROOT}:{self.home}"})

    def command(self, *arguments: str) -> Program:
        """Return the program ``manage.py`` with `arguments`."""
        own = ("--settings=project_settings",)
        return self.program("-W", "error", "-m", "django", *arguments, *own)

    def run(self, *arguments: str) -> Finished:
        """Run ``manage.py`` with `arguments`."""
        (finished,) = run_all([self.command(*arguments)])
        return finished

    def script(self, text: str) -> str:
        """Run the Python code `text` after `django.setup()`; return its output."""
        self.write("script", _SET_UP + text)
        (finished,) = run_all([self.program("-W", "error", "script.py")])
        return finished.check()

    @contextmanager
    def started(self, text: str) -> Iterator[subprocess.Popen[str]]:
        """Run `text` as `script()` does; yield its process when it has printed a first line."""
        self.write("started", _SET_UP + text)
        program = self.program()
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "started.py"],
            cwd=self.home,
            env=_environment(program.environment or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline(), "the program says that it is ready"
            yield process
        finally:
            process.kill()
            process.communicate()


_SET_UP = """
import os
os.environ["DJANGO_SETTINGS_MODULE"] = "project_settings"
import django
django.setup()
"""


def _environment(added: Mapping[str, str]) -> dict[str, str]:
    import os

    return {**os.environ, **added}


def own_database() -> dict[str, Any]:
    """Return the settings of the tests' database, as a project would write them."""
    given = connections.settings["default"]
    names = ("ENGINE", "NAME", "USER", "PASSWORD", "HOST", "PORT")
    return {name: str(given[name]) for name in names if given[name]}


def _assigned(settings: Mapping[str, Any]) -> str:
    return "".join(f"{name} = {value!r}\n" for name, value in settings.items())
