"""Does the same work with a shortcut and without it, in one process, and compares what users see.

A process plugs its shortcuts in once, when the backend is loaded. `without()` unplugs one for a
while: it puts the plain way back into each seam, as it is while `PGBACKEND_SHORTCUTS` has the
shortcut switched off. `compare()` checks that this is so: a function that the shortcut bypasses is
called without it, and not with it.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any, Self, TextIO
from unittest import mock

import psycopg
from django.core.handlers.asgi import ASGIHandler
from django.core.signals import request_finished, request_started
from django.db.backends.signals import connection_created
from django.dispatch import Signal
from psycopg.pq import Trace

from pgbackend import asgi, atomic_blocks, request_signals
from pgbackend.compiler import COMPILERS
from pgbackend.driver.shortcuts import Switches, switches
from pgbackend.fast import (
    blocks,
    comparisons,
    cursors,
    insert,
    rows,
    select,
    statements,
    update,
    wrappers,
)
from pgbackend.fast.fingerprints import find
from pgbackend.fast.registry import SHORTCUTS, is_on
from pgbackend.patches import NO_OTHERS
from pgbackend.wrapper import cursors as wrapper_cursors
from pgbackend.wrapper.cursors import Cursors

# --- A shortcut is unplugged ----------------------------------------------------------------------

#: The bases that a shortcut has put in front of those of the compilers.
BASES: dict[str, tuple[type[Any], ...]] = {
    "select": (select.Selects,),
    "insert": (insert.Inserts,),
    "update": (update.Updates,),
    "rows": (rows.MakesObjects,),
    "statements": (
        statements.FetchesAtOnce,
        statements.UpdatesAtOnce,
        statements.InsertsAtOnce,
    ),
    "all": (comparisons.ComparesColumns,),  # `select` and `update` share it
}
DRIVERS = {each.name for each in fields(Switches)}


@contextmanager
def without(name: str) -> Iterator[None]:
    """Unplug the shortcut `name`, or all of them."""
    with ExitStack() as stack:
        for each in SHORTCUTS if name == "all" else (name,):
            if is_on(each):
                _unplug(each, stack)
        if name == "all":
            _take_bases(BASES["all"], stack)
        yield


def _unplug(name: str, stack: ExitStack) -> None:
    def put(owner: object, attribute: str, value: object) -> None:
        stack.enter_context(mock.patch.object(owner, attribute, value))

    if name in DRIVERS:
        put(switches, name, False)
    _take_bases(BASES.get(name, ()), stack)
    if name == "known":
        put(select, "_KNOWN", False)
    elif name == "statements":
        put(Cursors, "cursor_for_compiler", plain(wrapper_cursors, "Cursors.cursor_for_compiler"))
        put(statements, "_DJANGOS", NO_OTHERS)
        put(statements, "_EXECUTE", NO_OTHERS)
    elif name == "cursors":
        for method in ("cursor", "_cursor", "create_cursor"):
            put(Cursors, method, plain(wrapper_cursors, f"Cursors.{method}"))
        stack.callback(
            setattr, Cursors, "close_if_health_check_failed", cursors.close_if_health_check_failed
        )
        del Cursors.close_if_health_check_failed  # type: ignore[attr-defined]  # of the shortcut
        put(statements, "_engines", statements._called_on(Cursors))
    elif name == "blocks":
        put(atomic_blocks, "open_at_once", atomic_blocks._never_open)
        put(atomic_blocks, "commit_at_once", atomic_blocks._never_commit)
        put(blocks, "_open_outermost", None)  # to be sure that nothing calls it
    elif name == "handler":
        put(ASGIHandler, "handle", ASGIHandler.handle.__wrapped__)
    elif name == "signals":
        put(request_signals, "send", Signal.send)
        for signal in (request_started, request_finished):
            stack.callback(setattr, signal, "send", vars(signal).pop("send"))
    elif name == "wrappers":
        put(asgi, "new_wrapper", plain(asgi, "new_wrapper"))
        wrappers.forget()


def _take_bases(bases: tuple[type[Any], ...], stack: ExitStack) -> None:
    for kind in COMPILERS:
        if not {*bases}.isdisjoint(kind.__bases__):
            stack.callback(setattr, kind, "__bases__", kind.__bases__)
            kind.__bases__ = tuple(each for each in kind.__bases__ if each not in bases)


def plain(module: ModuleType, name: str) -> FunctionType:
    """Return the function that a module of the engine defines, and that a shortcut has replaced."""
    assert module.__file__ is not None
    code = compile(Path(module.__file__).read_text(), module.__file__, "exec")
    owner: Any = module
    for each in name.split("."):
        [code] = [
            const
            for const in code.co_consts
            if isinstance(const, CodeType) and const.co_name == each
        ]
        owner, replaced = getattr(owner, each), owner
    assert code.co_freevars in ((), ("__class__",))
    cells = tuple(CellType(replaced) for _ in code.co_freevars)
    return FunctionType(code, vars(module), code.co_name, owner.__defaults__, cells)


# --- What is compared -----------------------------------------------------------------------------

Work = Callable[[], Any]
#: What a shortcut saves that bypasses no function of Django or psycopg.
_OF_NO_PACKAGE = {"portals": ["pgbackend.driver.bridge:_end"]}


def compare(name: str, work: Work) -> Any:
    """Do `work` with a shortcut, without it, and with it again; return what was seen.

    The results must be equal, and without the shortcut the work must call one of the functions that
    it bypasses more often.
    """
    first = work()
    with without(name), calls() as called_without:
        plainly = work()
    with calls() as called_with:
        again = work()
    assert plainly, "there is something to compare"
    for seen in (first, again):
        assert seen == plainly, difference(seen, plainly)
    names = [
        function
        for each, shortcut in SHORTCUTS.items()
        if name in (each, "all")
        for function in shortcut.bypasses or _OF_NO_PACKAGE[each]
    ]
    more = called_without - called_with
    assert {*map(code_of, names)} & more.keys(), f"the shortcut {name!r} was not taken"
    return plainly


def difference(with_it: Any, without_it: Any, place: str = "") -> str:
    """Return a text that says where two results first differ."""
    for kind in (list, tuple):
        if isinstance(with_it, kind) and isinstance(without_it, kind):
            for n, (one, other) in enumerate(zip(with_it, without_it, strict=False)):
                if one != other:
                    return difference(one, other, f"{place}[{n}]")
    return f"{place or 'result'}\nwith the shortcut:    {with_it!r}\nwithout the shortcut: " + repr(
        without_it
    )


@contextmanager
def calls() -> Iterator[Counter[Any]]:
    """Count the calls of each function in this thread, by its code."""
    seen: Counter[Any] = Counter()

    def count(frame: Any, event: str, arg: Any) -> None:
        if event == "call":
            seen[frame.f_code] += 1

    sys.setprofile(count)
    try:
        yield seen
    finally:
        sys.setprofile(None)


def code_of(name: str) -> Any:
    """Return the code of a function of the registry; None if this Django has no such function."""
    function: Any = find(name)
    function = getattr(function, "fget", getattr(function, "__func__", function))
    return getattr(inspect.unwrap(function), "__code__", None) if function is not None else None


def error_of(work: Work) -> Any:
    """Return all that a user sees of the error that `work` raises; its result if there is none."""
    try:
        return "no error", work()
    except Exception as exc:
        return told_error(exc)


def told_error(exc: BaseException | None) -> Any:
    """Return the types, texts and details of an error, and of those that it was raised from."""
    told: list[Any] = []
    while exc is not None:
        details: Any = None
        if isinstance(exc, psycopg.Error):
            diag = exc.diag
            names = [each for each in dir(diag) if not each.startswith(("_", "source", "context"))]
            details = (
                exc.sqlstate,
                {
                    each: re.sub(r"^pg_temp_\d+", "pg_temp", str(getattr(diag, each)))
                    for each in names
                },
            )
        text = re.sub(r"\d+\.\d\d s|0x[0-9a-f]+|Task-\d+", "...", str(exc))
        told.append((type(exc), text, len(exc.args), details, exc.__suppress_context__))
        exc = exc.__cause__ if exc.__suppress_context__ else exc.__context__
    return told


class Wire:
    """Records the messages on the connections that Django opens meanwhile: to and from the server.

    Lengths are left out, and the names that Django gives to savepoints and cursors are numbered.
    """

    def __init__(self) -> None:
        self._files: list[TextIO] = []
        self._traced: list[Any] = []

    def __enter__(self) -> Self:
        self._directory = TemporaryDirectory()
        connection_created.connect(self._trace)
        return self

    def __exit__(self, *exc_info: object) -> None:
        connection_created.disconnect(self._trace)
        for pgconn in self._traced:
            pgconn.untrace()
        for file in self._files:
            file.close()
        self._directory.cleanup()

    def _trace(self, *, connection: Any, **kwargs: Any) -> None:
        self.trace(connection.connection)

    def trace(self, connection: Any) -> None:
        """Record the messages of a connection of psycopg's."""
        file = Path(self._directory.name, str(len(self._files))).open("w+")  # noqa: SIM115
        self._files.append(file)
        pgconn = connection.pgconn
        self._traced.append(pgconn)
        pgconn.trace(file.fileno())
        pgconn.set_trace_flags(Trace.SUPPRESS_TIMESTAMPS | Trace.REGRESS_MODE)

    def messages(self) -> list[list[str]]:
        """Return the messages of each connection, in order."""
        return [self._of(Path(file.name).read_text()) for file in self._files]

    def statements(self) -> list[list[str]]:
        """Return the statements that each connection has executed; BEGIN is always one of its own.

        A statement that the server cannot parse is sent with BEGIN first, which does nothing, and
        then again, after BEGIN: only the second time is in the list. So is no transaction without a
        statement: BEGIN is not sent before a first statement whose parameters cannot be sent.
        """
        sent = [
            [found[1] for line in lines if (found := re.match(r'F\tQuery\t *"(.*)"', line))]
            for lines in self.messages()
        ]
        return [
            _without_empty_transactions(
                part
                for n, each in enumerate(lines)
                if each.split("; ", 1) != lines[n + 1 : n + 3]
                for part in _split_begin(each, lines[n + 1 : n + 2])
            )
            for lines in sent
        ]

    def _of(self, text: str) -> list[str]:
        names: dict[str, str] = {}
        numbered = re.sub(
            r"s\d+_x\d+|_django_curs_\w+",
            lambda found: names.setdefault(found[0], f"name {len(names)}"),
            text,
        )
        numbered = re.sub(r"pg_temp_\d+", "pg_temp", numbered)
        return [re.sub(r"^([FB])\t\d+", r"\1", line) for line in numbered.splitlines()]


def _split_begin(statement: str, after_it: list[str]) -> list[str]:
    begin, separator, rest = statement.partition("; ")
    if not separator or not begin.startswith("BEGIN"):
        return [statement]
    is_nothing = not rest or rest.startswith("--")  # it is sent again, to get its own result
    return [begin] if is_nothing and after_it == [rest] else [begin, rest]


def _without_empty_transactions(statements: Iterable[str]) -> list[str]:
    kept: list[str] = []
    for each in statements:
        if each in ("COMMIT", "ROLLBACK") and kept[-1:] == ["BEGIN"]:
            kept.pop()
        else:
            kept.append(each)
    return kept
