"""Tests that docs/errors.md has each exception class, and each logger with its levels."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from functools import cache

from pgbackend import outcomes
from pgbackend.driver import errors
from tests.docs.messages import PACKAGE
from tests.docs.snippets import ROOT

PAGE = (ROOT / "docs" / "errors.md").read_text()
_BASES = {"Exception", "RuntimeError", "OperationalError", "InterfaceError", "LeaseEnded"}
_LEVELS = {"exception": "ERROR"}


@cache
def _trees() -> list[ast.Module]:
    return [ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))]


def _classes() -> Iterator[str]:
    for tree in _trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
                if bases & _BASES:
                    yield node.name


def test_each_class_is_on_the_page() -> None:
    names = {*_classes()}
    assert {"PoolTimeout", "EmbeddedError", "TurnLostError"} <= names
    assert {name for name in names if not re.search(rf"[`.]{name}`", PAGE)} == set()


def test_each_class_derives_from_what_the_page_says() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `([\w.]+)` \|", PAGE, re.MULTILINE)
    assert ("OutcomeUnknown", "django.db.OperationalError") in rows
    found = dict(rows)  # the driver's class comes after Django's of the same name
    assert issubclass(outcomes.OutcomeUnknown, outcomes.OperationalError)
    own = inspect.getmembers(errors, inspect.isclass)
    theirs = {name: each for name, each in own if each.__module__ == errors.__name__}
    for name, each in theirs.items():
        assert each.__base__.__name__ == found[name].rpartition(".")[2], name


def _logged() -> Iterator[tuple[str, str]]:
    """Yield the logger and the level of each record that the sources write."""
    for tree in _trees():
        names = [node for node in ast.walk(tree) if _called(node, "getLogger")]
        for node in ast.walk(tree):
            if names and isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                method, owner = node.func.attr, ast.unparse(node.func.value)
                if owner.endswith("logger") and method != "log":
                    yield (
                        ast.literal_eval(names[0].args[0]),  # type: ignore[attr-defined]
                        _LEVELS.get(method, method.upper()),
                    )


def _called(node: ast.AST, name: str) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == name
    )


def _on_page() -> set[tuple[str, str]]:
    found, logger = set(), ""
    for name, levels in re.findall(r"^\| (`[\w.]+`)? ?\| ([A-Z, ]+) \|", PAGE, re.MULTILINE):
        logger = name.strip("`") or logger
        found |= {(logger, level) for level in levels.split(", ")}
    return found


def test_each_logger_and_level_is_on_the_page() -> None:
    logged = {*_logged()}
    assert ("pgbackend.driver", "WARNING") in logged
    assert logged - _on_page() == set()
    # Written by `logger.log()`, with a level that is computed.
    computed = {("pgbackend.shortcuts", "INFO"), ("pgbackend.shortcuts", "WARNING")}
    assert _on_page() - logged - computed == set()
