"""Makes the virtual environment of each cell, and tells which versions it has."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

from .cells import Cell
from .interpreters import ROOT, CannotMake, Interpreter, interpreter, run

#: Packages that are installed beside the groups, for some Pythons: the last autobahn that daphne
#: takes and that has a wheel for them.
BESIDES = {"3.15": ("autobahn<25", "--only-binary", "autobahn")}
#: The distributions whose versions the journal has.
TOLD = ("Django", "psycopg", "psycopg-pool", "greenlet", "asgiref", "uvloop")
#: The answer of an environment when it is asked for its versions.
ASK = """
import json, platform, sys
from importlib import metadata
found = {"Python": platform.python_version()}
for name in sys.argv[1:]:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


class NotYet(CannotMake):
    """Says that the package index has no pre-release of the next Django yet."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment, and how to run a program of it."""

    directory: Path
    interpreter: Interpreter

    def command(self, *arguments: str | Path) -> list[str]:
        return self.interpreter.command(self.directory / "bin/python", *arguments)

    def versions(self) -> dict[str, str]:
        command = self.command("-c", ASK, *TOLD)
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        found: dict[str, str] = json.loads(done.stdout)
        return found


def environment(cell: Cell, home: Path) -> Environment:
    """Return the environment of a cell; makes it if it is missing.

    Those of cells with other dependencies than usual are made anew, since "newest" changes.

    Raises:
        NotYet: the cell is for Django's next version, and pip finds none.
        CannotMake: its Python cannot be had, or pip could not install something.
    """
    name = "-".join(filter(None, ["env", cell.python, cell.django, cell.dependencies]))
    made = Environment(home / name, interpreter(cell.python, home))
    done = made.directory / "installed"
    if done.exists() and not cell.dependencies:
        return made
    shutil.rmtree(made.directory, ignore_errors=True)
    run(made.interpreter.command(made.interpreter.program, "-m", "venv", made.directory))
    pip = made.command("-m", "pip", "install", "--quiet")
    if cell.dependencies == "next":
        try:
            run([*pip, "--dry-run", *_next(cell)])
        except CannotMake as exc:
            raise NotYet(f"the package index has no Django after {cell.django} yet\n{exc}") from exc
    for arguments in installations(cell):
        run([*pip, *arguments])
    done.touch()
    return made


def installations(cell: Cell) -> list[list[str]]:
    """Return the arguments of each `pip install` that a cell needs, in order."""
    usual = ["--editable", ".", "--group", "test", "--group", "suite"]
    usual += [f"Django=={cell.django}.*", *BESIDES.get(cell.python, ())]
    all_of_them = [["pip>=25.1"], usual]  # the first that knows dependency groups
    if cell.dependencies == "newest":
        usual += ["--upgrade", "--upgrade-strategy", "eager"]
    elif cell.dependencies == "oldest":  # afterwards: some packages of the tests ask for later ones
        all_of_them.append(["--no-deps", *floors()])
    elif cell.dependencies == "next":
        all_of_them.append(_next(cell))
    return all_of_them


def _next(cell: Cell) -> list[str]:
    return ["--no-deps", "--pre", f"Django>{cell.django}.999"]


def floors() -> list[str]:
    """Return a requirement for each dependency of the package: the lowest version it allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lowest: dict[str, str] = {}
    for dependency in project["dependencies"]:
        found = re.match(r"([\w-]+)(\[.*\])?>=([\d.]+)", dependency)
        if found is None:
            raise CannotMake(f"pyproject.toml: {dependency!r} has no floor")
        name, extras, version = found.groups()
        lowest[name] = version
        if "binary" in (extras or ""):
            lowest[f"{name}-binary"] = version
    return [f"{name}=={version}" for name, version in lowest.items()]
