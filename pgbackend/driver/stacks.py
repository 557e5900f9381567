"""Finds the frames of tasks and portals, also from another thread than theirs.

The frames of green code that waits are on the stack of a suspended greenlet, where neither
`asyncio.Task.print_stack()` nor `faulthandler` sees them. The stack of a task is put together from
parts: the coroutines that it awaits; at a portal, the frames of its greenlet; and where green code
waits for a coroutine, the frames of that.

Nothing here waits, takes a lock, or needs the event loop to run. Frames are not kept: of each, a
`Place` is made at once.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import types
from collections.abc import Iterable, Iterator
from contextvars import Context
from types import FrameType
from typing import Any, NamedTuple, TypeVar

from . import bridge
from .bridge import Portal

T = TypeVar("T")

#: The code of the frames in which a portal is found, and the coroutine that a portal waits for.
_DRIVING, _AWAITING = bridge._drive.__code__, bridge.await_.__code__  # noqa: SLF001

#: Packages whose frames are skipped in the search for the user's own code.
NOT_THE_USERS = frozenset(("asgiref", "asyncio", "contextlib", "django", "greenlet", "pgbackend"))
NOT_THE_USERS |= frozenset(("psycopg", "psycopg_pool", "threading"))


class Place(NamedTuple):
    """A frame, as far as messages tell it."""

    file: str
    line: int
    function: str
    module: str
    started: float | None = None
    """When the frame's call began, by `time.monotonic()`, if it asks for a connection."""

    def is_the_users(self) -> bool:
        """Return whether this is the user's own code."""
        return self.module.partition(".")[0] not in NOT_THE_USERS


class Stack:
    """The frames of one task, outermost first, and the portals among them."""

    def __init__(self) -> None:
        self.places: list[Place] = []
        self.portals: list[Portal] = []

    def context(self) -> Context | None:
        """Return the context of the task, if that is known from a portal."""
        return self.portals[0].context if self.portals else None

    def place(self) -> str | None:
        """Return the ``file:line`` of the innermost frame of the user's own code, or None."""
        for place in reversed(self.places):
            if place.is_the_users():
                return f"{place.file}:{place.line}"
        return None

    def asked_at(self) -> float | None:
        """Return when the code asked for the connection that it waits for; None if it does not."""
        for place in reversed(self.places):
            if place.started is not None:
                return place.started
        return None


def frames_below() -> Iterator[FrameType]:
    """Yield the frames that have switched to the portals around the caller, innermost first."""
    here: Any = bridge.running()
    while isinstance(here, Portal):
        here = here.parent
        if here is not None and here.gr_frame is not None:
            yield here.gr_frame


def of_task(task: asyncio.Task[Any], thread: int) -> Stack:
    """Return the stack of `task`, whose loop runs in `thread`."""
    if asyncio.current_task(task.get_loop()) is task:
        return of_thread(thread)
    stack = Stack()
    _add_awaited(stack, task.get_coro())
    return stack


def of_thread(thread: int) -> Stack:
    """Return the stack of the code that runs in `thread`, across the portals that it is in."""
    stack = Stack()
    running = [portal for portal in working_portals(thread) if portal.gr_frame is None]
    frame = sys._current_frames().get(thread)  # noqa: SLF001 - documented
    portal: Any = _innermost(running)
    while frame is not None:
        stack.places[:0] = _places(frame)
        if isinstance(portal, Portal):
            stack.portals.insert(0, portal)
        portal = getattr(portal, "parent", None)
        frame = getattr(portal, "gr_frame", None)
    return stack


def of_portal(portal: Portal) -> Stack:
    """Return the stack of the code in `portal`, from its first function on."""
    stack = Stack()
    _add_portal(stack, portal)
    return stack


def working_portals(thread: int) -> list[Portal]:
    """Return the portals of `thread` in which code runs or waits."""
    made = _snapshot(bridge.made_in.get(thread, ()))
    return [each for each in made if getattr(each, "working", False)]  # one may be half made


def threads_of_portals() -> list[int]:
    """Return the identities of the threads that have portals."""
    return _snapshot(bridge.made_in)


def _snapshot(things: Iterable[T]) -> list[T]:
    """Return a list of `things`, a collection that other threads may change meanwhile.

    Nothing but trying again helps, as in `asyncio.all_tasks()`; each try takes microseconds.
    """
    for _ in range(1000):
        try:
            return list(things)
        except RuntimeError:
            continue
    return []


def _innermost(portals: list[Portal]) -> Portal | None:
    """Return the one of `portals`, which all seem to run, that is no other one's parent."""
    parents = {id(portal.parent) for portal in portals}
    return next((portal for portal in portals if id(portal) not in parents), None)


def _add_awaited(stack: Stack, coro: Any) -> None:
    """Add the frames of `coro`, and of what it awaits."""
    while coro is not None:
        if hasattr(coro, "inner_coroutine"):  # `GreenCoroutine`, and what wraps one
            coro = coro.inner_coroutine()
        elif isinstance(coro, types.CoroutineType):
            _add_frame(stack, coro.cr_frame)
            coro = coro.cr_await
        elif isinstance(coro, types.AsyncGeneratorType):
            _add_frame(stack, coro.ag_frame)
            coro = coro.ag_await
        elif isinstance(coro, types.GeneratorType):
            frame = coro.gi_frame
            _add_frame(stack, frame)
            if frame is not None and frame.f_code is _DRIVING:
                _add_portal(stack, frame.f_locals["portal"])
                return
            coro = coro.gi_yieldfrom or _stepped(frame)
        else:
            coro = _wrapped(coro)


def _add_portal(stack: Stack, portal: Portal) -> None:
    """Add the frames of the code in `portal`, and of the coroutine that it waits for."""
    stack.portals.append(portal)
    frame = portal.gr_frame
    awaited = None
    if frame is not None:
        stack.places += _places(frame)
        for each in _outwards(frame):
            if each.f_code is _AWAITING:
                awaited = each.f_locals.get("coro")
                break
    if awaited is not None:
        _add_awaited(stack, awaited)


def _stepped(frame: FrameType | None) -> object:
    """Return the coroutine that a generator steps itself, as some `__await__()` methods do."""
    if frame is None or frame.f_code.co_name != "__await__":
        return None
    found = frame.f_locals
    return found.get("coro") or getattr(found.get("self"), "coro", None)


def _wrapped(awaitable: object) -> object:
    """Return the coroutine or async generator that an object of the interpreter steps, or None."""
    if type(awaitable).__name__ not in _WRAPPERS:
        return None
    kinds = (types.CoroutineType, types.AsyncGeneratorType)
    return next((each for each in gc.get_referents(awaitable) if isinstance(each, kinds)), None)


#: What `async for` awaits, and what `__await__()` of a coroutine returns.
_WRAPPERS = frozenset(("async_generator_asend", "async_generator_athrow", "coroutine_wrapper"))


def _add_frame(stack: Stack, frame: FrameType | None) -> None:
    if frame is not None:
        stack.places.append(_place_of(frame))


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _places(frame: FrameType) -> list[Place]:
    """Return the places of `frame` and its callers, outermost first."""
    return [_place_of(each) for each in _outwards(frame)][::-1]


def _place_of(frame: FrameType) -> Place:
    code, module = frame.f_code, frame.f_globals.get("__name__", "")
    started = None
    if code.co_name == "lease" and module == _POOL:
        started = frame.f_locals.get("started")
    return Place(code.co_filename, frame.f_lineno, code.co_name, module, started)


_POOL = f"{__package__}.pool"
