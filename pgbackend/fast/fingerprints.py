"""Fingerprints of functions: hashes of their installed source text.

The text of a function begins with its decorators, and ends with the last line that has code. This
rule gives the same text for an installed function and for one in source that is only compiled
(`of_source()`), on every version of Python.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

_LENGTH = 12


def of_text(text: bytes) -> str:
    """Return the fingerprint of a source text."""
    return hashlib.sha256(text).hexdigest()[:_LENGTH]


class Installed:
    """Finds the source texts of functions of installed packages; reads each file once."""

    def __init__(self) -> None:
        self._lines: dict[str, list[bytes]] = {}

    def text(self, name: str) -> bytes | None:
        """Return the text of the function that is named ``module:Class.method``.

        Returns None if there is no function of that name, or if it is patched: then it is not the
        package's own. Raises `OSError` if its file is missing.
        """
        function = find(name)
        if function is None or not _is_of_package(function, name.partition(".")[0]):
            return None
        code = inspect.unwrap(function).__code__
        if code.co_qualname != name.partition(":")[2]:
            return None  # another function of the package: its test cases patch, too
        lines = self._lines.get(code.co_filename)
        if lines is None:
            lines = Path(code.co_filename).read_bytes().splitlines()
            self._lines[code.co_filename] = lines
        return _text(lines, code)


def find(name: str) -> Any:
    """Return the function that is named ``module:Class.method``; None if there is none."""
    module, _, qualified = name.partition(":")
    found: Any = import_module(module)
    *owners, last = qualified.split(".")
    for each in owners:
        found = vars(found).get(each)
        if found is None:
            return None
    found = vars(found).get(last)
    for inside in ("__func__", "fget", "func"):  # classmethod, property, cached_property
        found = getattr(found, inside, found)
    return found


def _is_of_package(function: Any, package: str) -> bool:
    """Return True if `package` defines `function`, and only it or pgbackend has wrapped that."""
    met: set[int] = set()
    while function is not None:
        if id(function) in met:  # a cycle of wrappers
            return False
        met.add(id(function))
        if type(function) is not FunctionType:  # a proxy, whose other attributes are the function's
            return False
        if function.__globals__["__name__"].partition(".")[0] not in {package, "pgbackend"}:
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def of_source(source: bytes) -> dict[str, bytes]:
    """Return the texts of all functions in a module's source, by their names ``Class.method``."""
    lines = source.splitlines()
    module = compile(source, "<source>", "exec", dont_inherit=True)
    return {code.co_qualname: _text(lines, code) for code in _functions(module)}


def _functions(code: CodeType) -> Iterator[CodeType]:
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield each
            yield from _functions(each)


def _text(lines: list[bytes], code: CodeType) -> bytes:
    return b"\n".join(lines[code.co_firstlineno - 1 : _last_line(code)])


def _last_line(code: CodeType) -> int:
    last = code.co_firstlineno
    for _, _, line in code.co_lines():
        if line is not None and line > last:
            last = line
    for each in code.co_consts:
        if type(each) is CodeType:
            last = max(last, _last_line(each))
    return last
