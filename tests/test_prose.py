"""Tests that docstrings open so that a reader understands them without reading on."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: The directories whose docstrings are read.
READ = ["benchmarks", "kitchen", "pgbackend", "proj", "tests"]
#: Words that point at a thing instead of naming it, or ask a question instead of answering one.
POINTING = {"How", "That", "Those", "What", "Where", "Whether", "Which", "Who", "Whom", "Whose"}
_WITH_DOCSTRINGS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _docstrings(directory: str) -> Iterator[tuple[str, str]]:
    for path in sorted((ROOT / directory).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, _WITH_DOCSTRINGS) and (text := ast.get_docstring(node)):
                yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}", text


@pytest.mark.parametrize("directory", READ)
def test_docstrings_name_their_subject(directory: str) -> None:
    found = dict(_docstrings(directory))
    assert found
    pointing = {
        place: text.splitlines()[0]
        for place, text in found.items()
        if text.split()[0].strip(",.:;?") in POINTING
    }
    assert not pointing
