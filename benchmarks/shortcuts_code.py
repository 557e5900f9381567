"""The code of each shortcut, and how many lines it takes: for `benchmarks/shortcuts.py`.

Lines are counted that have code: no comments, docstrings and empty lines.
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


_COMPILER = "pgbackend.compiler"
#: Comparing columns with values, and noticing what has changed of a model.
_FOR_COMPARING = _in(
    _COMPILER,
    "_for_comparison _WHERE _COMPARISON _CAST _OLD_CAST _COMPARISONS _Params _cast_nothing "
    "_is_plain_comparison _comparison_in _COMPARES _COMPILE _is_usual",
)
_FOR_KEEPING = _in(
    _COMPILER,
    "_PLAIN _is_plain _are_plain _is_plain_column _KEPT_OF_OPS _said_by_ops _said_by_kind _COLUMN "
    "_Said",
)
#: The code of each shortcut: functions, classes and constants most of which would go with it. What
#: two of them share is named by both.
CODE: Mapping[str, tuple[str, ...]] = {
    "select": (
        *_FOR_COMPARING,
        *_FOR_KEEPING,
        *_in(
            _COMPILER,
            "_QUOTES_ALIKE _for_select _SELECT _Columns _with_fields_seen _selects_a_model "
            "_names_its_table _is_ordered SQLCompiler.makes_objects SQLCompiler._is_djangos "
            "SQLCompiler.get_select SQLCompiler.as_sql SQLCompiler._select "
            "SQLCompiler._usual_statement SQLCompiler._limits SQLCompiler._compile_where "
            "SQLCompiler.get_converters SQLCompiler.has_composite_fields",
        ),
    ),
    "known": _in(
        _COMPILER,
        "_INTEGER_FIELDS _PREPARING _prepared_by _for_integers _KNOWN _INTEGERS _MOST_STATEMENTS "
        "_Integers _Columns.keep SQLCompiler._known_statement",
    ),
    "insert": (
        *_FOR_KEEPING,
        *_in(
            _COMPILER,
            "_for_insert _INSERT _VALUES _SENDS_NULL _GET_PLACEHOLDER _has_placeholder "
            "_has_default_or_placeholder _RETURNING _inserting_by _INSERT_BY _insert_features "
            "_INSERTS_AND_RETURNS _is_read_by_django _Insert _is_usual SQLInsertCompiler.as_sql "
            "SQLInsertCompiler._is_usual SQLInsertCompiler._usual_statement "
            "SQLInsertCompiler._prepared_values SQLInsertCompiler._with_expressions",
        ),
    ),
    "update": (
        *_FOR_COMPARING,
        *_in(
            _COMPILER,
            "_for_update _UPDATE _is_resolved SQLUpdateCompiler.as_sql "
            "SQLUpdateCompiler._usual_statement SQLUpdateCompiler._assign",
        ),
    ),
    "rows": ("pgbackend.objects",),
    "statements": (
        "pgbackend.statements",
        *_in(
            _COMPILER,
            "_for_executing _EXECUTE CompiledStatement._is_executed_by_django _FetchedAtOnce "
            "SQLInsertCompiler.execute_sql SQLUpdateCompiler._execute_at_once "
            "SQLUpdateCompiler.execute_returning_sql",
        ),
        "pgbackend.base:DatabaseWrapper._fetches_at_once",
        "pgbackend.base:DatabaseWrapper.pool_alone",
    ),
    "cursors": _in(
        "pgbackend.base",
        "_ASKING _asks _djangos_asks _DJANGO_ASKS _CURSOR _CREATE_CURSOR _open_cursor "
        "_create_cursor DatabaseWrapper.create_cursor",
    ),
    "blocks": (
        "pgbackend.fast.blocks",
        *_in("pgbackend.base", "DatabaseWrapper.end_pooled DatabaseWrapper.commit_pooled"),
    ),
    "handler": _in(
        "pgbackend.asgi",
        "handle _read_body _names _is_method _READ_BODY _Connected LISTEN_AFTER _Busy _busy",
    ),
    "signals": _in("pgbackend.asgi", "_LIVE _known _receivers_of _stays _send send"),
    "wrappers": ("pgbackend.wrappers",),
    "lease": _in("pgbackend.driver.pool", "_Psycopg.take_free _Psycopg.put_free"),
    "queue": _in("pgbackend.driver.pool", "_Place _Queue _Psycopg.wait_free Pool._wait"),
    "run": _in(
        "pgbackend.driver.connection",
        "_OF_A_STATEMENT _FOR_A_STATEMENT _StatementCursor _ClientStatementCursor statement_class "
        "AsyncConnection.run_statement AsyncConnection._new_cursor "
        "AsyncConnection.makes_cursors_of",
    ),
    "begin": _in("pgbackend.driver.connection", "_BEGIN _BeginningCursor _NotBegunError"),
    "portals": _in("pgbackend.driver.bridge", "_keep_portal"),
}


def lines(names: Iterable[str]) -> set[tuple[str, int]]:
    """Return the lines of all that is named, each once: as module and number."""
    return {(name.partition(":")[0], number) for name in names for number in _numbers(name)}


def _numbers(name: str) -> Iterator[int]:
    """Yield the numbers of the lines that have code of ``module:Class.method``, or of a module.

    Raises `LookupError` if there is no such thing.
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
