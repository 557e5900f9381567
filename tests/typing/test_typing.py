"""The public names as mypy and pyright know them: `shown` passes, `refused` fails where it says.

Both run as a project would run them, without Django's plugin for mypy; from pgbackend they see only
what ``py.typed`` lets them see.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from django.db import transaction

import pgbackend
from pgbackend import aio, embedded, metrics

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FILES = sorted(HERE.glob("*/[!_]*.py"))
#: A place and what is said of it.
Messages = dict[tuple[str, int], str]


def output_of(module: str, *arguments: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=HERE,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def messages_of_mypy(tmp_path_factory: pytest.TempPathFactory) -> Messages:
    said = output_of(
        "mypy",
        *("--strict", "--follow-imports=silent", "--config-file=", "--output=json"),
        f"--cache-dir={tmp_path_factory.mktemp('mypy')}",
        *FILES,
        MYPYPATH=str(ROOT),
    )
    errors = [json.loads(line) for line in said.splitlines()]
    return {
        (Path(error["file"]).name, error["line"]): error["message"]
        for error in errors
        if error["severity"] == "error"
    }


def report_of_pyright(*arguments: str | Path) -> dict[str, Any]:
    # --verifytypes finds packages by the first interpreter of the PATH, whatever it is told.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    said = output_of(
        *("pyright", "--outputjson", "--pythonpath", sys.executable, *arguments),
        PYTHONPATH=str(ROOT),
        PATH=path,
    )
    report: dict[str, Any] = json.loads(said)
    return report


@pytest.fixture(scope="module")
def messages_of_pyright() -> Messages:
    errors = report_of_pyright(*FILES)["generalDiagnostics"]
    return {
        (Path(error["file"]).name, error["range"]["start"]["line"] + 1): error["message"]
        for error in errors
        if error["severity"] == "error"
    }


@pytest.fixture(params=["mypy", "pyright"])
def messages(request: pytest.FixtureRequest) -> Messages:
    messages: Messages = request.getfixturevalue(f"messages_of_{request.param}")
    return messages


def marked() -> set[tuple[str, int]]:
    return {
        (path.name, number)
        for path in FILES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if line.endswith("# refused")
    }


@pytest.mark.slow
def test_what_the_pages_show_passes_and_each_mistake_is_refused(messages: Messages) -> None:
    unexpected = {place: text for place, text in messages.items() if place not in marked()}
    passed = marked() - set(messages)
    assert (unexpected, passed) == ({}, set())
    assert marked()


def test_every_public_name_is_tried() -> None:
    shown = "".join(path.read_text() for path in HERE.glob("shown/*.py"))
    names = {*pgbackend.__all__, *aio.__all__, *metrics.__all__, *embedded.__all__}
    assert not {name for name in names if not re.search(rf"\b{name}\b", shown)}


def test_atomic_is_djangos_own() -> None:
    assert pgbackend.atomic is transaction.atomic
    assert aio.atomic is transaction.atomic


#: Modules with public names, and classes of others that these show.
_PUBLIC = re.compile(
    r"pgbackend\.(\w+|(aio|metrics|embedded|driver\.errors)\.[\w.]+|driver\.events\.[A-Z][\w.]+"
    r"|driver\.\w+\.PoolStatistics(\.\w+)?)"
)


@pytest.mark.slow
def test_the_public_surface_has_no_unknown_type() -> None:
    report = report_of_pyright("--ignoreexternal", "--verifytypes", "pgbackend")
    symbols = report["typeCompleteness"]["symbols"]
    public = [symbol for symbol in symbols if _PUBLIC.fullmatch(symbol["name"])]
    assert len(public) > 50
    assert not {
        symbol["name"]: [said["message"] for said in symbol["diagnostics"]]
        for symbol in public
        if symbol["isExported"] and (not symbol["isTypeKnown"] or symbol["isTypeAmbiguous"])
    }
