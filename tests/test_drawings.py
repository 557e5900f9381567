"""Tests that docs/drawings.md draws what the code does: its names exist, and are called in order.

The calls are those of `tests/support/drawn_calls.py`, which runs as a program of its own, because
the drawings show the plain way, and shortcuts are switched off for a process.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from pgbackend.fast.registry import SHORTCUTS
from tests.support.drawn_calls import DRAWN, ENGINE
from tests.support.processes import Program, run_all

PAGE = Path(__file__).parents[1] / "docs" / "drawings.md"
#: The participants that are no files of pgbackend, and the modules whose names are drawn.
OTHERS = {
    "Django": (
        "django.core.handlers.asgi",
        "django.db.models",
        "django.db.models.sql.compiler",
        "django.db.transaction",
    ),
    "PostgreSQL": (),
    "event loop": (),
    "psycopg": ("psycopg", "psycopg._cursor_base", "psycopg.waiting", "psycopg_pool"),
}
#: How many files of pgbackend each drawing has, and how many calls of functions, at least.
AT_LEAST = {"files": 8, "calls": 25}
#: How many files of pgbackend a `get()` passes, from the call of `QuerySet.get()` on, at most.
FILES_OF_A_GET = 8
_LINE = re.compile(
    r"participant (?P<key>\w+) as (?P<name>.+)"
    r"|(?P<from>\w+)(?P<arrow>-?->>)(?P<to>\w+): (?P<text>[^;#]+)"
    r"|Note over (?P<over>\w+): [^;#]+"
)
_CALL = re.compile(r"([\w.]+)\(\)")


@dataclass(frozen=True)
class Message:
    """A call that is drawn: of the function `name` of `receiver`, by code of `sender`."""

    sender: str
    receiver: str
    name: str

    def is_made_by(self, call: tuple[str, str, list[str]]) -> bool:
        """Return whether `call`, as `drawn_calls.py` prints it, is this one.

        The sender may have called helpers that are not drawn, and these the function.
        """
        here, name, below = call
        return (here, name) == (self.receiver, self.name) and self.sender in below


class Drawing:
    """The participants of a drawing, and its calls."""

    def __init__(self, text: str) -> None:
        kind, *lines = (line.strip() for line in text.splitlines() if line.strip())
        assert kind == "sequenceDiagram"
        self.names: dict[str, str] = {}
        self.calls: list[Message] = []
        for line in lines:
            found = _LINE.fullmatch(line)
            assert found, line
            if found["key"]:
                self.names[found["key"]] = found["name"]
            elif found["over"]:
                assert found["over"] in self.names, line
            else:
                sender, receiver = self.names[found["from"]], self.names[found["to"]]
                if found["arrow"] == "->>":
                    call = _CALL.fullmatch(found["text"])
                    assert call, f"a solid arrow is a call: {line}"
                    self.calls.append(Message(sender, receiver, call[1]))
                else:
                    assert not _CALL.search(found["text"]), f"only solid arrows are calls: {line}"

    @property
    def files(self) -> list[str]:
        """Return the files of pgbackend that are drawn."""
        return [name for name in self.names.values() if name not in OTHERS]


DRAWINGS = [
    Drawing(text) for text in re.findall(r"```mermaid\n(.*?)```", PAGE.read_text(), re.DOTALL)
]


_NAMED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _defines(file: str, name: str) -> bool:
    """Return whether a file of pgbackend defines a function, inside what `name` names before it."""
    scope: ast.AST = ast.parse((ENGINE / file).read_text())
    for part in name.split("."):
        inside = {
            each.name: each for each in ast.iter_child_nodes(scope) if isinstance(each, _NAMED)
        }
        if part not in inside:
            return False
        scope = inside[part]
    return not isinstance(scope, ast.ClassDef)


def _is_found_in(modules: tuple[str, ...], name: str) -> bool:
    """Return whether one of `modules` has a function of that name."""
    for module in modules:
        found: Any = import_module(module)
        for part in name.split("."):
            found = getattr(found, part, None)
        if callable(found):
            return True
    return False


def _is_found_anywhere(name: str) -> bool:
    files = [path.relative_to(ENGINE).as_posix() for path in ENGINE.rglob("*.py")]
    return any(_defines(file, name) for file in files) or any(
        _is_found_in(modules, name) for modules in OTHERS.values()
    )


def test_there_are_three_drawings_and_none_is_empty() -> None:
    assert len(DRAWINGS) == len(DRAWN) == 3
    for drawing in DRAWINGS:
        assert len(drawing.files) >= AT_LEAST["files"]
        assert len(drawing.calls) >= AT_LEAST["calls"]
        called = {each.receiver for each in drawing.calls}
        assert not {*drawing.files} - called, "a file that nothing leads to"


def test_a_get_passes_few_files_of_pgbackend() -> None:
    calls = DRAWINGS[0].calls
    begins = [call.name for call in calls].index("QuerySet.get")
    passed = {file for call in calls[begins:] for file in (call.sender, call.receiver)}
    assert len(passed.difference(OTHERS)) <= FILES_OF_A_GET


@pytest.mark.parametrize("drawing", DRAWINGS, ids=DRAWN)
def test_each_function_that_is_drawn_is_defined_where_its_arrow_ends(drawing: Drawing) -> None:
    assert not [file for file in drawing.files if not (ENGINE / file).is_file()]
    missing = [
        each
        for each in drawing.calls
        if not (
            _is_found_in(OTHERS[each.receiver], each.name)
            if each.receiver in OTHERS
            else _defines(each.receiver, each.name)
        )
    ]
    assert not missing


def test_a_name_that_is_not_there_is_noticed() -> None:
    assert _defines("driver/pool.py", "Pool.lease")
    assert _defines("asgi.py", "make_call.__call__")
    assert not _defines("driver/pool.py", "Pool.lend")
    assert not _defines("driver/pool.py", "lease")
    assert not _defines("driver/pool.py", "Pool")
    assert not _defines("driver/lease.py", "Pool.lease")
    assert _is_found_in(OTHERS["Django"], "QuerySet.get")
    assert not _is_found_in(OTHERS["Django"], "QuerySet.fetch")
    assert not _is_found_in(OTHERS["event loop"], "call_soon")


def test_the_lines_about_shortcuts_name_them_all_and_functions_that_exist() -> None:
    lists = re.findall(
        r"^Shortcuts leave this way at:\n\n(.*?)(?=^#|\Z)",
        PAGE.read_text(),
        re.DOTALL | re.MULTILINE,
    )
    assert len(lists) == 3
    named: set[str] = set()
    for text in lists:
        for heads in re.findall(r"^- (.*?):", text, re.MULTILINE):
            named |= {*re.findall(r"`(\w+)`", heads)}
        files = re.findall(r"`([\w/]+\.py)`", text)
        assert not [file for file in files if not (ENGINE / file).is_file()]
        assert not {name for name in _CALL.findall(text) if not _is_found_anywhere(name)}
    assert named == {*SHORTCUTS} - {"cursors"}  # of synchronous code


# --- The calls themselves -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(conninfo: str) -> dict[str, list[tuple[str, str, list[str]]]]:
    environment = {"DATABASE_URL": conninfo, "PGBACKEND_SHORTCUTS": "0"}
    (finished,) = run_all([Program(["tests/support/drawn_calls.py"], environment=environment)])
    found: dict[str, list[tuple[str, str, list[str]]]] = json.loads(finished.check())
    return found


@pytest.mark.parametrize(("name", "drawing"), [*zip(DRAWN, DRAWINGS, strict=True)], ids=DRAWN)
def test_the_functions_are_called_in_the_order_in_which_they_are_drawn(
    recorded: Any, name: str, drawing: Drawing
) -> None:
    calls = iter(recorded[name])
    for number, message in enumerate(drawing.calls, 1):
        found = any(message.is_made_by(call) for call in calls)  # goes on where it has stopped
        assert found, f"call {number} of {name!r} does not come next: {message}"
