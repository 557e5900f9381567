"""Tests that each environment variable and setting that is read is on docs/environment.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache

from django.conf import global_settings

from tests.docs.snippets import ROOT

PAGE = (ROOT / "docs" / "environment.md").read_text()
_NAME = re.compile(r"[A-Z][A-Z_]{3,}")
#: Functions that read the variable, or the setting, that their first argument names.
_READERS = {"_switch", "of_project", "getenv"}

#: Variables that tests pass to programs which they start, and that nobody else sets.
PASSED = {"OTHER", "SHOP_DATABASE", "SHOP_DEBUG", "SHOP_TOOL", "SUITE_DATABASE", "SUITE_JOB"}
PASSED |= {
    "GITHUB_REF_NAME",
    "GITHUB_REF_TYPE",
    "TENANT_LIMIT_SET_CALLS",
    "PATH_INFO",
    "REQUEST_METHOD",
    "TMPDIR",
}


def _on_page(name: str) -> bool:
    return f"`{name}`" in PAGE


@cache
def _names(folder: str, mark: str = "environ|settings|conf") -> frozenset[str]:
    """Return the names of what is read by files that have `mark`: parsing takes its time."""
    paths = sorted((ROOT / folder).rglob("*.py"))
    texts = [text for path in paths if re.search(mark, text := path.read_text())]
    return frozenset(name for text in texts for name in _read(text) if _NAME.fullmatch(name))


def _read(text: str) -> Iterator[str]:
    """Yield the names of the variables and settings that a file reads."""
    tree = ast.parse(text)
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        key = _key(node)
        if isinstance(key, ast.Name):
            key = constants.get(key.id, key)
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            yield key.value
        if isinstance(node, ast.Attribute) and _is(node.value, "settings"):
            yield node.attr


def _key(node: ast.AST) -> ast.expr | None:
    """Return the expression that names what `node` reads, if it reads from the environment."""
    match node:
        case ast.Subscript(value=read, slice=key) if _is(read, "environ"):
            return key
        case ast.Compare(left=key, comparators=[read]) if _is(read, "environ"):
            return key
        case ast.Call(func=ast.Attribute(value=read), args=[key, *_]) if _is(read, "environ"):
            return key
        case ast.Call(func=ast.Name(id="getattr"), args=[read, key, *_]) if _is(read, "settings"):
            return key
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=[key, *_]) if (
            name in _READERS
        ):
            return key
    return None


def _is(node: ast.expr, name: str) -> bool:
    """Return whether `node` is the name `name`, or an attribute of that name."""
    if isinstance(node, ast.Attribute):
        return node.attr == name
    return isinstance(node, ast.Name) and node.id == name


def _missing(folder: str) -> set[str]:
    return {name for name in _names(folder) if not _on_page(name)}


def test_what_pgbackend_reads_is_on_the_page() -> None:
    assert {"PGBACKEND_CONTROL_DIR", "DEBUG", "PGSERVICE"} <= {*_names("pgbackend")}
    assert _missing("pgbackend") - {"SETTINGS_MODULE"} == set()  # Django's name of the module


def test_what_the_demo_reads_is_on_the_page() -> None:
    assert {"KITCHEN_SERVICE_URL", "DEBUG", "GREEN"} <= {*_names("proj"), *_names("kitchen")}
    assert _missing("proj") | _missing("kitchen") == set()


def test_what_the_tests_read_is_on_the_page() -> None:
    names = _names("tests", r"\benviron\b")
    assert {"PGBOUNCER", "HELPERS_ONLY"} <= names
    missing = {name for name in names if not _on_page(name)}
    assert missing - PASSED - {*dir(global_settings), "ROOT_URLCONF"} == set()


def test_what_make_reads_is_on_the_page() -> None:
    lines = (ROOT / "Makefile").read_text().splitlines()
    names = [found[1] for line in lines if (found := re.match(r"#   ([A-Z_]+)=", line))]
    assert {"PYTHON", "VENV", "PORT"} <= {*names}
    assert [name for name in names if not _on_page(name)] == []
