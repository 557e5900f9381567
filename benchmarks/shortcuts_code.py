"""Lists the code of each shortcut and counts its lines, for `benchmarks/shortcuts.py`.

Only lines with code are counted: no comments, docstrings or empty lines.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def _in(module: str, names: str) -> tuple[str, ...]:
    return tuple(f"{module}:{name}" for name in names.split())


_FAST = "pgbackend.fast"
_ADAPTER = "pgbackend.driver.psycopg_pool_adapter"
#: Comparing columns with values, and noticing what has changed of a model.
_FOR_COMPARING = (f"{_FAST}.comparisons",)
_FOR_CACHING = (f"{_FAST}.cached_fields",)
#: The code of each shortcut: functions, classes and constants most of which would go with it. What
#: two of them share is named by both.
CODE: Mapping[str, tuple[str, ...]] = {
    "select": (
        *_FOR_COMPARING,
        *_FOR_CACHING,
        *_in(
            f"{_FAST}.select",
            "_for_select _SELECT _CachedColumns _shape _SHAPE _selects_a_model _names_its_table "
            "_is_usual _is_ordered Selects._is_djangos Selects.get_select Selects.as_sql "
            "Selects._select Selects._cached_select Selects._limits Selects._compile_where "
            "Selects.get_converters Selects.has_composite_fields install",
        ),
    ),
    "known": (
        f"{_FAST}.integers",
        *_in(f"{_FAST}.cached_fields", "MOST_STATEMENTS"),
        *_in(f"{_FAST}.select", "_KNOWN _CachedColumns.keep Selects._known_statement"),
    ),
    "insert": (*_FOR_CACHING, f"{_FAST}.insert", f"{_FAST}.written_values"),
    "update": (
        *_FOR_COMPARING,
        f"{_FAST}.update",
        *_in(f"{_FAST}.written_values", "PLAIN_TYPES has_placeholder"),
    ),
    "rows": (f"{_FAST}.rows",),
    "statements": (
        f"{_FAST}.statements",
        *_in(f"{_FAST}.insert", "Inserts.execute_sql"),
        *_in(
            f"{_FAST}.written_values",
            "RETURNING _inserting_by _INSERT_BY are_returned_rows_djangos",
        ),
        "pgbackend.wrapper.cursors:Cursors.acquire_pool",
    ),
    "cursors": ("pgbackend.fast.cursors",),
    "blocks": (
        "pgbackend.fast.blocks",
        *_in(
            "pgbackend.wrapper.transactions", "Transactions.end_pooled Transactions.commit_pooled"
        ),
    ),
    "handler": ("pgbackend.fast.handler",),
    "signals": ("pgbackend.fast.signals",),
    "wrappers": ("pgbackend.fast.wrappers",),
    "lease": _in(_ADAPTER, "PsycopgPool.take_free PsycopgPool.put_free"),
    "queue": (
        *_in(_ADAPTER, "_GreenWaiter PsycopgPool.wait_free"),
        *_in("pgbackend.driver.waiting", "TimedByQueue WaitingQueue"),
        "pgbackend.driver.pool:Pool._wait",
    ),
    "run": _in(
        "pgbackend.driver.pooled",
        "_CURSOR_METHODS _OTHER_METHODS AsyncConnection.run_statement AsyncConnection._new_cursor "
        "AsyncConnection.makes_cursors_of",
    )
    + _in(
        "pgbackend.driver.statement_cursors",
        "StatementCursor _ClientStatementCursor statement_class",
    ),
    "begin": _in("pgbackend.driver.prefix", "BEGIN Begin NotRunError PrefixingCursor"),
    "portals": _in("pgbackend.driver.bridge", "_keep_portal"),
}


def lines(names: Iterable[str]) -> set[tuple[str, int]]:
    """Return the lines of all named pieces of code, each once: as module and number."""
    return {(name.partition(":")[0], number) for name in names for number in _numbers(name)}


def _numbers(name: str) -> Iterator[int]:
    """Yield the numbers of the lines with code in ``module:Class.method``, or in a whole module.

    Raises `LookupError` if there is no such piece of code.
    """
    module, _, qualified = name.partition(":")
    source = ROOT.joinpath(*module.split(".")).with_suffix(".py").read_text()
    found: Any = ast.parse(source)
    for each in qualified.split(".") if qualified else ():
        found = next((node for node in found.body if each in _names_of(node)), None)
        if found is None:
            raise LookupError(name)
    if not qualified:
        yield from _with_code(source)
        return
    first = min([found.lineno, *(each.lineno for each in getattr(found, "decorator_list", ()))])
    yield from (each for each in _with_code(source) if first <= each <= found.end_lineno)


def _names_of(node: Any) -> list[str]:
    """Return the names that a statement of a module, or of a class, defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return [
        each.id
        for target in targets
        if target
        for each in ast.walk(target)
        if isinstance(each, ast.Name)
    ]


_NO_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    tokenize.ENDMARKER,
}


@cache
def _with_code(source: str) -> frozenset[int]:
    """Return the numbers of the lines of a module that have code."""
    tokens = [
        each
        for each in tokenize.generate_tokens(io.StringIO(source).readline)
        if each.type not in {tokenize.COMMENT, tokenize.NL}
    ]
    numbers: set[int] = set()
    for number, token in enumerate(tokens):
        begins = number == 0 or tokens[number - 1].type in _NO_CODE
        is_docstring = token.type == tokenize.STRING and begins
        if token.type not in _NO_CODE and not is_docstring:
            numbers.update(range(token.start[0], token.end[0] + 1))
    return frozenset(numbers)
