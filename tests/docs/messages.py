"""Collects the texts of errors, warnings and log records from the sources of pgbackend."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from tests.docs.snippets import ROOT

PACKAGE = ROOT / "pgbackend"
_TELLERS = {"warn", "debug", "info", "warning", "error", "exception", "critical", "log"}
#: Placeholders of a value in a text: a field of `str.format`, or one of `%`.
_VALUE = re.compile(r"\{\w*(?:![rs])?(?::[^}]*)?\}|%(?:\(\w+\))?[-+ 0#]*[\d.]*[srdfi](?!\w)|…")
_EXCEPTION = re.compile(
    r"[A-Z]\w*(?:Error|Configured|Timeout|Closed|Full|Failed|Unknown|Ended|Answer|Unusable|Green)"
)
_WORD = re.compile(r"[A-Za-z]{2,}")
#: Kinds of other texts of several words: SQL, source code, names of attributes, patterns.
_NO_PROSE = re.compile(
    r"\s*(?:SELECT|SET|NOT|RESET|WITH|INSERT|CASE|BEGIN|COMMIT|ROLLBACK|CLOSE|import|def)\b"
    r"|.*(?:pg_catalog\.|\\[sb.]|\w \| \w|\(\?:)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Message:
    """A text of the sources, with `…` for each value in it."""

    where: str
    text: str


def plain(text: str) -> str:
    """Return `text` in one line, with `…` for each value."""
    return re.sub(r"…+", "…", _VALUE.sub("…", " ".join(text.split())))


def collected(elsewhere: dict[str, str]) -> Iterator[Message]:
    """Yield the texts that are raised, warned of or logged, and other texts that may be.

    From files that match a key of `elsewhere`, only texts that a statement raises, warns of or logs
    by itself are taken.
    """
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(PACKAGE))
        tree = ast.parse(path.read_text())
        nodes = _told(tree)
        if not any(fnmatch(name, pattern) for pattern in elsewhere):
            nodes = {**nodes, **_prose(tree)}
        for line, text in nodes.values():
            yield Message(f"{name}:{line}", plain(text))


def _told(tree: ast.Module) -> dict[ast.AST, tuple[int, str]]:
    """Return the texts that are arguments of an exception that is raised, of a warning or a log."""
    calls = [
        node
        for each in ast.walk(tree)
        for node in (each.exc if isinstance(each, ast.Raise) else each,)
        if isinstance(node, ast.Call) and (isinstance(each, ast.Raise) or _tells(node))
    ]
    found = {node: _text(node) for call in calls for node in call.args[:2]}
    return {
        node: (node.lineno, text)
        for node, text in found.items()
        if text is not None and len(_WORD.findall(text)) > 1
    }


def _tells(call: ast.Call) -> bool:
    """Return whether a call warns, writes to a log, or makes an exception."""
    if isinstance(call.func, ast.Attribute) and call.func.attr in _TELLERS:
        return True
    name = ast.unparse(call.func).rpartition(".")[2]
    return _EXCEPTION.fullmatch(name) is not None


def _prose(tree: ast.Module) -> dict[ast.AST, tuple[int, str]]:
    """Return the texts of four words or more, but no docstrings and parts of other texts."""
    passed: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr | ast.JoinedStr):
            passed.update(ast.iter_child_nodes(node))
    found = {node: _text(node) for node in ast.walk(tree) if node not in passed}
    return {
        node: (getattr(node, "lineno", 0), text)
        for node, text in found.items()
        if text is not None and _is_prose(text)
    }


def _is_prose(text: str) -> bool:
    words = [word for word in text.split() if _WORD.search(word)]
    dotted = [word for word in words if re.fullmatch(r"\w+\.\w+", word)]
    return (
        len(_WORD.findall(text)) >= 4
        and len(words) >= 4
        and len(dotted) < len(words) / 2
        and not _NO_PROSE.match(text)
    )


def _text(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = (each.value if isinstance(each, ast.Constant) else "…" for each in node.values)
        return "".join(str(part) for part in parts)
    if isinstance(node, ast.Call) and _is_format(node.func):
        return _text(node.func.value)  # type: ignore[attr-defined]
    return None


def _is_format(func: ast.expr) -> bool:
    return isinstance(func, ast.Attribute) and func.attr == "format"


def listed(page: Path) -> list[str]:
    """Return the texts that a page lists: each is a code span that opens an item of a list."""
    return re.findall(r"^- `([^`\n]+)`", page.read_text(), re.MULTILINE)
