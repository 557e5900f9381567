"""Values that follow a request: kept by context, as context variables are, and not by thread.

Stock Django runs the sync code of one ASGI request in one thread, so people's code keeps what
belongs to a request in a `threading.local`, or in an attribute of `django.db.connection`. Here the
ORM runs on the loop's thread, for all requests. So such values are kept here, by their owner (a
`threading.local`, or an alias) and name: see `thread_locals` and `attributes`.

Note [Contexts of values]
Code on a loop, and in threads that asgiref starts from it, follows a context (`follows()`): asgiref
copies it into the thread, and what is changed there comes back with it. All other code is as in
Django: its values are its thread's, and never come here. Where it calls `async_to_sync`, the thread
lends its values to the coroutine for as long as that runs (`lend()`).

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

_get_running_loop = asyncio._get_running_loop

#: By owner, its values by name. Replaced when a value is set, never changed.
Values: TypeAlias = Mapping[Hashable, Mapping[str, Any]]

_NOTHING: Mapping[Any, Any] = {}


class _Held:
    """The values of one task, and of the threads that it waits for."""

    __slots__ = ("passed_on", "task", "values")

    def __init__(
        self,
        values: Values,
        task: weakref.ref[asyncio.Task[Any]] | None,
        passed_on: Values | None = None,
    ) -> None:
        self.values = values
        #: The task; None until one has looked, which takes them as they are.
        self.task = task
        #: What the task inherits that was made when these were held; None: copies of the values.
        self.passed_on = passed_on


_held: ContextVar[_Held | None] = ContextVar("pgbackend.request", default=None)


def follows() -> bool:
    """Return whether the values of the running code follow its context, and not its thread."""
    return _get_running_loop() is not None or _held.get() is not None


def values_of(owner: Hashable) -> Mapping[str, Any] | None:
    """Return the values of `owner` in this context; None if it has never had one."""
    held = _mine()
    return None if held is None else held.values.get(owner)


def change(owner: Hashable, values: Mapping[str, Any]) -> None:
    """Let `owner` have these `values`, in this context and in those that inherit it from now on."""
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
    """Return what is held for the running task; what it has inherited becomes its own."""
    held = _held.get()
    if held is None or (task := bridge.current_task()) is None:
        return held  # of a thread, whose task waits for it
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
        # Another object for each task: two of them must not find the same copy.
        _held.set(_Held(held.values, held.task, _copied(held.values)))


def _copied(values: Values) -> Values:
    memo: dict[int, Any] = {}
    return {
        owner: {name: _copy(value, memo) for name, value in each.items()}
        for owner, each in values.items()
    }


_CONTAINERS = {list, dict, set, deque, defaultdict, OrderedDict, bytearray}


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    """Return a copy of a container, with those that it contains; anything else as it is."""
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


def begin() -> Token[_Held | None]:
    """Begin a request, which has no values yet; `end()` takes the token."""
    return _held.set(_Held(_NOTHING, None))


def end(token: Token[_Held | None]) -> None:
    """End a request: the code around it, if there is some, has the values that it had before."""
    with suppress(ValueError):  # another context closes its coroutine, and has never begun it
        _held.reset(token)


def follow() -> None:
    """Let the threads that asgiref starts from here follow the context."""
    if _held.get() is None:
        _held.set(_Held(_NOTHING, None))


class Lender:
    """A keeper of values by thread, which lends them to a coroutine."""

    def lend(self) -> Values:
        """Return the values of the running thread, by owner."""
        raise NotImplementedError

    def take_back(self, values: Values) -> None:
        """Let the running thread have `values`, which it has lent, as they are now."""
        raise NotImplementedError


lenders: list[Lender] = []


@contextmanager
def lend() -> Iterator[None]:
    """Lend the values of the running thread to the coroutine that it waits for.

    In a thread that follows a request already, these are the request's.
    """
    held = _held.get()
    if held is not None:
        _held.set(_Held(held.values, None))  # for the coroutine's task, which takes no copy
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
