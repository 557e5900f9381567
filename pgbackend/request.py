"""Keep the values of a request by context, as context variables do, and not by thread.

Stock Django runs the sync code of one ASGI request in one thread, so projects and packages keep the
values of a request in a `threading.local`, or in an attribute of `django.db.connection`. With this
backend the ORM runs on the loop's thread, for all requests. So this module keeps such values, by
their owner (a `threading.local`, or an alias) and name: see thread_locals.py and attributes.py.

Note [Contexts of values]
Code on a loop, and in threads that asgiref starts from it, follows a context (`follows()`): asgiref
copies the context into the thread, and copies changes back from there. For all other code this is
as in Django: its values belong to its thread, and are not kept here. If such code calls
`async_to_sync`, its thread lends its values to the coroutine until that ends (`lend()`).

A task inherits the values of its parent, and keeps its own changes to itself. Lists, dictionaries
and sets are copied for it when it is made, since code appends to them in place: two tasks must not
share a stack. Other objects are shared, as they are by a context variable.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar, Token
from typing import Any, TypeAlias

from .driver import bridge
from .driver.naming import served

_get_running_loop = asyncio._get_running_loop

#: The values of each owner, by name. Setting a value replaces the mappings, and never changes them.
Values: TypeAlias = Mapping[Hashable, Mapping[str, Any]]

_NOTHING: Mapping[Any, Any] = {}


class _Held:
    """A value of `_held`: the values of one task, and of the threads that it waits for."""

    __slots__ = ("passed_on", "task", "values")

    def __init__(
        self,
        values: Values,
        task: weakref.ref[asyncio.Task[Any]] | None,
        passed_on: Values | None = None,
    ) -> None:
        self.values = values
        #: The task; None until a task reads the values, which then owns them without a copy.
        self.task = task
        #: Copies for the child task that is made next; None: a child task copies `values` itself.
        self.passed_on = passed_on


_held: ContextVar[_Held | None] = ContextVar("pgbackend.request", default=None)

#: What `end()` needs to restore what was there before `begin()`.
Begun: TypeAlias = tuple[Token[_Held | None], Token[Mapping[str, Any] | None]]


def follows() -> bool:
    """Return whether the running code's values are kept by context, and not by thread.

    That is so on a loop, and in threads that asgiref starts from a loop.
    """
    return _get_running_loop() is not None or _held.get() is not None


def values_of(owner: Hashable) -> Mapping[str, Any] | None:
    """Return the values of `owner` in this context; None if none was ever set."""
    held = _mine()
    return None if held is None else held.values.get(owner)


def change(owner: Hashable, values: Mapping[str, Any]) -> None:
    """Replace all values of `owner`, in this context and in those that inherit it from now on."""
    held = _mine()
    task = _reference_to_task() if held is None else held.task
    before = _NOTHING if held is None else held.values
    _held.set(_Held({**before, owner: values}, task))
    if _pass_on not in bridge.before_task:
        bridge.before_task.append(_pass_on)


def _reference_to_task() -> weakref.ref[asyncio.Task[Any]] | None:
    task = bridge.current_task()
    return None if task is None else weakref.ref(task)


def _mine() -> _Held | None:
    """Return the values of the running task; None if it has set none, and has inherited none.

    In a thread that a task waits for, return that task's values. When a task first calls this, the
    values that it has inherited become its own; they are copied if another task owns them, too.
    """
    held = _held.get()
    if held is None or (task := bridge.current_task()) is None:
        return held  # in a thread: the values of the task that waits for the thread
    if held.task is not None and held.task() is task:
        return held
    inherited = held.values
    if held.task is not None:
        inherited = held.passed_on if held.passed_on is not None else _copied(inherited)
    held = _Held(inherited, weakref.ref(task))
    _held.set(held)
    return held


def _pass_on() -> None:
    """Copy the values for the task that is about to be made, as they are now."""
    held = _mine()
    if held is not None and held.values:
        # New copies for each task: two tasks must not share any.
        _held.set(_Held(held.values, held.task, _copied(held.values)))


def _copied(values: Values) -> Values:
    memo: dict[int, Any] = {}
    return {
        owner: {name: _copy(value, memo) for name, value in each.items()}
        for owner, each in values.items()
    }


_CONTAINERS = {list, dict, set, deque, defaultdict, OrderedDict, bytearray}


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    """Return a copy of a container, and of containers in it; return any other value as it is.

    `memo` has the copies that were made already, by `id()` of the original.
    """
    if type(value) not in _CONTAINERS:
        return value
    if id(value) in memo:
        return memo[id(value)]
    memo[id(value)] = new = value.copy()
    if isinstance(new, dict):
        for key, each in new.items():
            new[key] = _copy(each, memo)
    elif isinstance(new, list | deque):
        for number, each in enumerate(new):
            new[number] = _copy(each, memo)
    return new


# --- Requests, threads and loops ------------------------------------------------------------------


def begin(scope: Mapping[str, Any]) -> Begun:
    """Begin the request of `scope` (ASGI's), which has no values yet; return it for `end()`."""
    return _held.set(_Held(_NOTHING, None)), served.set(scope)


def end(begun: Begun) -> None:
    """End a request, and restore the values of the code around it, if there is any."""
    with suppress(ValueError):  # the request's coroutine is closed in another context
        _held.reset(begun[0])
        served.reset(begun[1])


@contextmanager
def whole_stack() -> Iterator[None]:
    """Serve a request in this `with` whose sync code, too, runs in place: see whole_stack.py."""
    token = _whole_stack.set(True)
    try:
        yield
    finally:
        with suppress(ValueError):  # the request's coroutine is closed in another context
            _whole_stack.reset(token)


#: Whether the running code belongs to a request whose sync code runs in place, on the loop.
_whole_stack: ContextVar[bool] = ContextVar("pgbackend.whole_stack", default=False)
is_whole_stack = _whole_stack.get


def follow() -> None:
    """Make `follows()` return True in threads that asgiref starts from the running code."""
    if _held.get() is None:
        _held.set(_Held(_NOTHING, None))


class Lender:
    """A base class, for modules that keep values by thread too; `lend()` calls its methods."""

    def lend(self) -> Values:
        """Return the values of the running thread, by owner."""
        raise NotImplementedError

    def take_back(self, values: Values) -> None:
        """Store `values`, which a coroutine may have changed, in the running thread again."""
        raise NotImplementedError


lenders: list[Lender] = []


@contextmanager
def lend() -> Iterator[None]:
    """Lend the running thread's values to the coroutine that the thread waits for in this `with`.

    Afterwards the thread takes them back, with the coroutine's changes. If `follows()`, the values
    of the context are lent, and not those of the thread.
    """
    held = _held.get()
    if held is not None:
        _held.set(_Held(held.values, None))  # the coroutine's task owns them without a copy
        yield
        return
    lent = {owner: each for lender in lenders for owner, each in lender.lend().items()}
    _held.set(_Held(lent, None))
    try:
        yield
    finally:
        held = _held.get()
        _held.set(None)
        if held is not None and held.values is not lent:
            for lender in lenders:
                lender.take_back(held.values)
