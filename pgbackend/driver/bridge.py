"""The bridge between greenlets and the event loop; the only module that imports greenlet.

A *portal* is a greenlet that a task of the event loop drives. Code inside a portal is *green*: when
it must wait, it switches to the task, the task waits in its place, and switches back with the
result. So a synchronous function can wait for the database while the loop serves other tasks.

`run()` calls a synchronous function in a portal, `portal()` drives a coroutine in one (so that the
synchronous code below it is green), and `await_()` waits, in a portal, for an awaitable. A switch
carries what a coroutine yields to its task: a future, or None for "later". The design follows
`awaitlet/base.py` and SQLAlchemy's `util/concurrency.py`.

Note [Two kinds of end]
A portal ends well when its function returns or raises. It is *closed* when its task's coroutine is
closed or collected: then its code unwinds with GeneratorExit, and `suspend()` refuses to wait,
because nobody would ever switch back. Clean-up code must then manage with synchronous means only.
In a finalizer that the garbage collector runs it is the same: see Note [Finalizers] in
finalizers.py.

Note [Greenlets end]
The garbage collector cannot look into a greenlet that waits: all that such a greenlet refers to
lives as long as it does, itself included. So each one is ended by a switch into it. A portal whose
function has ended is kept for the next function, up to a number of portals, or ended. A portal that
would wait for ever is unwound, as if its coroutine had been closed, when its thread begins with
another loop after the portal's was closed, and when the thread ends. Only its own thread can switch
to a greenlet: a portal whose coroutine another thread closes is unwound in its own.

Note [Whose step]
An eager task (Python 3.12) takes its first step where it is made: if green code makes it, inside
the portal of another task. If it waited there, that other task would wait in its place, and the
loop would stop. So code that becomes green in such a step takes a portal of its own, inside the
other; and code that wants to wait there without one is refused. The step of a task enters the
task's context, so the context tells the two apart, and costs less to ask for than the task.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import sys
import threading
import types
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from types import FrameType
from typing import Any, ParamSpec, TypeVar

from greenlet import GreenletExit, getcurrent, greenlet

from .coroutines import GreenCoroutine, Resumed, as_coroutine, exception_to_throw
from .errors import NotGreen, PortalClosed
from .finalizers import (
    RaisesWhenFreed,
    after_collection,
    check_not_collecting,
    collecting,
    is_collecting,
)
from .forks import after_fork
from .shortcuts import switches

P = ParamSpec("P")
T = TypeVar("T")

#: The exceptions that unwind code from outside, as opposed to its own errors.
INTERRUPTIONS = (asyncio.CancelledError, GeneratorExit, GreenletExit, KeyboardInterrupt, SystemExit)


class Portal(greenlet):
    """A greenlet that a task drives; its attributes are for the code that runs in it."""

    # fmt: off
    __slots__ = (
        "closing", "context", "dropped", "found", "holding", "loop", "on_wait",
        "pending", "postponing", "raised", "returned", "thrown", "working",
    )
    # fmt: on

    def __init__(self) -> None:
        super().__init__(_serve)
        _mine.made.add(self)
        #: The queue of portals that its thread is to unwind; see Note [Greenlets end].
        self.dropped = _mine.dropped
        #: The context of the task that took it, see Note [Whose step]; and the loop of that task.
        self.context: Any = None
        self.loop: asyncio.AbstractEventLoop | None = None
        #: Whether a function runs in it, and what the last one returned, or raised.
        self.working = False
        self.returned: object = None
        self.raised: BaseException | None = None
        self.closing = False
        #: The exception that its task throws into it, like an argument of the switch: greenlet's
        #: `throw()` raises an exception of C++ too, which takes much longer than a switch.
        self.thrown: BaseException | None = None
        #: A cancellation that arrived while it had to be held back, and how many blocks hold one
        #: back, or postpone its delivery; see cancellation.py.
        self.pending: asyncio.CancelledError | None = None
        self.holding = 0
        self.postponing = 0
        #: The session that `state` has found for the code in it; until the next step, which may
        #: be another task's.
        self.found: Any = None
        #: Called before the code in it waits for an awaitable that is neither the socket of a
        #: database nor a turn.
        self.on_wait: Callable[[], None] | None = None

    def is_own(self) -> bool:
        """Return whether the code in this portal is that of the task that is being stepped.

        See Note [Whose step]. That code may have entered another context for a while.
        """
        if self.gr_context is self.context or self.closing or not _HAS_EAGER_TASKS:
            return True
        if (task := current_task()) is None:
            return True
        outer: Any = self.parent  # the greenlet whose context is that of the step
        return outer.gr_context is task.get_context()  # type: ignore[attr-defined]  # since 3.12

    def suspend(self, yielded: object) -> object:
        """Give `yielded` to the task and wait until the task is stepped again."""
        if self.closing or collecting or self.gr_context is not self.context:
            self._check_may_wait()
        value = self.parent.switch(yielded)  # type: ignore[union-attr]  # a running one has it
        if self.thrown is not None:
            self._raise_thrown()
        return value

    def wait_for(self, future: asyncio.Future[T]) -> T:
        """Wait for `future`, with nothing between it and the task.

        Not by `suspend()`: greenlet makes an object for each frame that a switch leaves behind.
        """
        if not future.done():
            if self.closing or collecting or self.gr_context is not self.context:
                self._check_may_wait()
            # What `Future.__await__` does before it yields itself: the task checks for it.
            future._asyncio_future_blocking = True  # noqa: SLF001 - asyncio's protocol for futures
            self.parent.switch(future)  # type: ignore[union-attr]  # as above
            if self.thrown is not None:
                self._raise_thrown()
        return future.result()

    def deliver_cancellation(self) -> None:
        """Raise the cancellation that was held back, unless it must be held back still."""
        if self.pending is None or self.holding or self.postponing:
            return
        pending, self.pending = self.pending, None
        try:
            raise pending
        finally:
            del pending  # which knows this frame by its traceback

    def _check_may_wait(self) -> None:
        if self.closing:
            raise PortalClosed(_DROPPED)
        _check_place(self)

    def _raise_thrown(self) -> None:
        thrown, self.thrown = self.thrown, None
        assert thrown is not None
        try:
            raise thrown
        finally:
            del thrown  # which knows this frame by its traceback


_HAS_EAGER_TASKS = sys.version_info >= (3, 12)
_DROPPED = "the task was dropped: nothing can be waited for any more"


def let_step_end() -> None:
    """Let the loop begin another step of the running task, if the caller is green and may wait."""
    here = getcurrent()
    if type(here) is Portal and not (here.closing or here.holding) and not is_collecting():
        here.suspend(None)


def check_may_wait(here: Portal) -> None:
    """Raise what a wait in `here` would raise, except in a closed portal: before a byte is sent."""
    if collecting or here.gr_context is not here.context:
        _check_place(here)
    if here.pending is not None and not here.closing:
        here.deliver_cancellation()


def _check_place(here: Portal) -> None:
    check_not_collecting()
    if not here.is_own():
        raise NotGreen(
            "cannot wait for the database here: this task was started eagerly, so its first step "
            "is taken in the greenlet of the task that made it. Call the synchronous function with "
            "'await pgbackend.aio.run(fn, *args)', or start the task with 'asyncio.create_task()', "
            "which gives it a greenlet of its own"
        )


class _Orphan(Portal):
    """A portal in a forked child, which has neither its task nor its loop."""

    __slots__ = ()


@after_fork
def _forget_portals() -> None:
    """Make the code of a child that green code has forked synchronous: its loop is the parent's.

    Code that waits in portals is left as it is.
    """
    here = getcurrent()
    if type(here) is Portal:
        here.__class__ = _Orphan
    for portal in list(_mine.made):
        if portal.working:
            _mine.made.discard(portal)  # what it holds is the parent's


#: Returns the running greenlet, of whatever kind; for code that asks so often that a call counts.
#: Such code looks whether that is a `Portal`, as `current()` does, and whether a loop runs, as
#: `green()` does.
running = getcurrent


def current() -> Portal | None:
    """Return the portal that the caller runs in, or None.

    No loop runs in a portal that is unwound after its loop has ended: see `green()`.
    """
    here = getcurrent()
    return here if type(here) is Portal else None


def green() -> Portal | None:
    """Return the portal that the caller runs in, under a running loop; None if it is not green."""
    here = getcurrent()
    return here if type(here) is Portal and asyncio._get_running_loop() is not None else None


def current_task() -> asyncio.Task[Any] | None:
    """Return the running task; None where no loop runs, or no task does."""
    return None if asyncio._get_running_loop() is None else asyncio.current_task()


def frames_below() -> Iterator[FrameType]:
    """Yield, for each portal that the caller is in, the frame that it was switched to from."""
    here: greenlet | None = getcurrent()
    while isinstance(here, Portal):
        here = here.parent
        if here is not None and here.gr_frame is not None:
            yield here.gr_frame


def _serve(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run one function after another: the body of a portal.

    While it waits for a function, its frame refers to no greenlet: see Note [Greenlets end].
    """
    here: Any
    while True:
        try:
            getcurrent().returned = fn(*args, **kwargs)  # type: ignore[attr-defined]  # a portal
        except GreenletExit:  # asks for the end of this greenlet
            raise
        except BaseException as exc:
            getcurrent().raised = exc  # type: ignore[attr-defined]
        del fn, args, kwargs  # nothing of it is kept until the next one comes
        here = getcurrent()
        here.working = False
        here = here.parent
        fn, args, kwargs = here.switch()


class _Mine(threading.local):
    """The portals of the thread; see Note [Greenlets end]."""

    #: How many idle portals are kept. A new greenlet costs some ten microseconds, most of it for
    #: memory that the interpreter maps for its first frame, and unmaps after the last.
    MOST = 64

    def __init__(self) -> None:
        #: The portals that have not ended.
        self.made: weakref.WeakSet[Portal] = weakref.WeakSet()
        self.farewell = _Farewell(self.made)
        #: The portals that wait for a function.
        self.idle: list[Portal] = []
        #: The portals whose coroutines were closed in other threads.
        self.dropped: deque[Portal] = deque()
        #: Whether the loop has called `first_step()`.
        self.outside_of_tasks = False


class _Farewell:
    """End the portals of a thread when the thread ends and drops its thread-local values."""

    def __init__(self, made: weakref.WeakSet[Portal]) -> None:
        self._made = made
        self._thread = threading.get_ident()

    def say(self) -> None:
        for portal in list(self._made):
            _unwind(portal) if portal.working else _end(portal)

    def __del__(self) -> None:
        # The portals of threads that a fork has left behind are lost, as are those that an
        # interpreter has at its end.
        if self._thread == threading.get_ident() and not sys.is_finalizing():
            self.say()


_mine = _Mine()


@atexit.register
def _say_farewell() -> None:
    """End the portals of the main thread, which ends after the interpreter does."""
    _mine.farewell.say()


def _take_portal() -> Portal:
    if _mine.outside_of_tasks:
        raise NotGreen("cannot wait for the database in a callback of the event loop: use a task")
    idle = _mine.idle
    portal = idle.pop() if idle else Portal()
    here = getcurrent()
    # Without this, code in the portal would see none of the task's context variables, nor the task
    # the values that this code sets.
    portal.gr_context = portal.context = here.gr_context
    portal.loop = asyncio._get_running_loop()
    if portal.parent is not here:
        portal.parent = here
    portal.working = True
    return portal


def _keep_portal(portal: Portal) -> None:
    """Put `portal` away for the next function, unless the last one has left something in it."""
    portal.returned = portal.raised = portal.pending = portal.found = portal.gr_context = None
    portal.on_wait = portal.loop = portal.context = None
    idle = _mine.idle
    as_new = not (portal.closing or portal.holding or portal.postponing)
    if as_new and switches.portals and len(idle) < _Mine.MOST:
        idle.append(portal)
    else:
        _end(portal)


def _end(portal: Portal) -> None:
    """Let the greenlet of `portal`, in which no function runs, go to its end."""
    _mine.made.discard(portal)
    here = getcurrent()
    if portal.parent is not here:
        portal.parent = here
    portal.switch(_leave, (), {})


def _leave() -> None:
    raise GreenletExit


@types.coroutine
def _drive(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Generator[Any, Any, Any]:
    """Call `fn` in a portal, and step that for as long as the task steps this generator."""
    portal = _take_portal()
    yielded = portal.switch(fn, args, kwargs)
    while portal.working and not portal.dead:
        try:
            value = yield yielded
        except BaseException as exc:  # thrown into the portal: its code decides
            if isinstance(exc, GeneratorExit) and not _may_close(portal):
                raise
            _adopt(portal)
            yielded = _throw(portal, exc)
        else:
            _adopt(portal)
            yielded = portal.switch(value)
    if portal.dead:
        if portal.closing:  # in the end of its thread, or of its loop
            raise PortalClosed(_DROPPED)
        return yielded  # the GreenletExit that has ended it
    # A cancellation that was held back and delivered nowhere is never swallowed.
    returned, raised = portal.returned, portal.raised or portal.pending
    _keep_portal(portal)
    if raised is None:
        return returned
    try:
        raise raised
    finally:
        del raised  # which knows this frame by its traceback


def _may_close(portal: Portal) -> bool:
    """Return whether the code in `portal` can be unwound now.

    If not, it is left to its own thread, or to the end of the garbage collection.
    """
    if portal.dead:
        return False
    portal.closing = True  # Note [Two kinds of end]
    if portal.dropped is not _mine.dropped:
        portal.dropped.append(portal)
        try:
            assert portal.loop is not None
            portal.loop.call_soon_threadsafe(_unwind_dropped)
        except RuntimeError:  # closed: the portal is unwound with the others of this loop
            pass
        return False
    if is_collecting():
        after_collection.append(functools.partial(_unwind, portal))
        return False
    return True


def _unwind_dropped() -> None:
    dropped = _mine.dropped
    while dropped:
        _unwind(dropped.popleft())


def _unwind_left() -> None:
    """Unwind the portals of this thread that wait for loops that were closed."""
    for portal in list(_mine.made):
        if portal.working and portal.loop is not None and portal.loop.is_closed():
            _unwind(portal)


def _unwind(portal: Portal) -> None:
    """Unwind the code in `portal`, as the end of its coroutine would, without that coroutine."""
    _mine.made.discard(portal)
    if portal.dead or not portal.working:
        return
    portal.closing = True
    _adopt(portal)
    _throw(portal, GeneratorExit())
    raised = portal.raised
    if raised is not None and not isinstance(raised, GeneratorExit):
        RaisesWhenFreed(raised)
    portal.raised = raised = None
    if not portal.dead:
        _keep_portal(portal)


#: An item for each portal that is being unwound where no loop runs; usually empty.
unwinding: list[Portal] = []


def _throw(portal: Portal, exc: BaseException) -> object:
    portal.thrown = exc
    if asyncio._get_running_loop() is not None:
        return portal.switch()
    unwinding.append(portal)
    try:
        return portal.switch()
    finally:
        unwinding.remove(portal)


def _adopt(portal: Portal) -> None:
    """Make the caller the greenlet that `portal` switches back to.

    It is nearly always so already: a coroutine that was started eagerly inside another portal,
    and one that is finished by another task, are the exceptions.
    """
    portal.found = None
    here = getcurrent()
    if portal.parent is not here:
        if portal.dropped is not _mine.dropped:
            raise PortalClosed(
                "a task cannot go on in another thread than it waits in: a loop that has begun to "
                "run in one must go on there, and the task be cancelled before that thread ends"
            )
        portal.parent = here


async def run(fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call the synchronous function `fn` green, and return what it returns.

    Waits below `fn` suspend the awaiting task; no thread is used. Where the caller is green
    already, `fn` is simply called.
    """
    here = getcurrent()
    if type(here) is Portal and here.is_own():
        found = fn(*args, **kwargs)
        if here.pending is not None:
            here.deliver_cancellation()
        return found
    make_child_tasks_green(asyncio.get_running_loop())
    result: T = await _drive(fn, args, kwargs)
    return result


def await_(awaitable: Awaitable[T]) -> T:
    """Wait for `awaitable` from green synchronous code, and return its result.

    A coroutine is driven inside the caller's portal, so synchronous code below it is green too.
    Raises `NotGreen` outside a portal, after closing a coroutine that would never be awaited.
    """
    here = getcurrent()
    if type(here) is not Portal or not here.is_own():
        if isinstance(awaitable, Coroutine):
            awaitable.close()
        if type(here) is Portal:
            _check_place(here)
        raise NotGreen(
            "cannot wait for an awaitable here: no greenlet of pgbackend is running. Call the "
            "synchronous function with 'await pgbackend.aio.run(fn, *args)'"
        )
    coro = awaitable if isinstance(awaitable, Coroutine) else as_coroutine(awaitable)
    try:
        yielded = coro.send(None)
        while True:
            if here.on_wait is not None:
                here.on_wait()
            try:
                value = here.suspend(yielded)
            except BaseException as exc:  # the coroutine decides
                yielded = coro.throw(exception_to_throw(exc))
            else:
                yielded = coro.send(value)
    except StopIteration as stop:
        result: T = stop.value
        return result


def drive(coro: Coroutine[Any, Any, T]) -> Awaitable[T]:
    """Return `coro` with the synchronous code below it green, to be awaited at once.

    This makes no coroutine of its own, through which each step would have to go.
    """
    here = getcurrent()
    if type(here) is Portal and here.is_own():
        return coro
    make_child_tasks_green(asyncio.get_running_loop())
    return _drive(await_, (coro,), {})


def portal(coro: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
    """Return a coroutine that runs `coro` with the synchronous code below it green."""
    return coro if type(coro) is GreenCoroutine else GreenCoroutine(coro, drive)


def first_step(
    coro: Coroutine[asyncio.Future[Any] | None, Any, Any],
) -> asyncio.Future[Any] | None:
    """Take the first step of `coro` in a callback of the loop; return what it waits for.

    A task must go on with it: see `resume()`. Raises what `coro` raises; that is `NotGreen` where
    it uses the database, since only a task can hold a connection.
    """
    _mine.outside_of_tasks = True
    try:
        return coro.send(None)
    finally:
        _mine.outside_of_tasks = False


async def resume(coro: Coroutine[Any, Any, T], waits_for: asyncio.Future[Any] | None) -> T:
    """Go on with a coroutine whose first step was taken elsewhere."""
    result: T = await Resumed(coro, waits_for)
    return result


def name_of(task: asyncio.Task[Any]) -> str:
    """Return the name of `task` for messages; the name of its function if it was given none."""
    name = task.get_name()
    if name == "None":  # the name that some releases of Python 3.13 give to tasks of a factory
        name = getattr(task.get_coro(), "__qualname__", name)
    return name


#: Functions to call before a task is made, which inherits the caller's context; usually empty.
before_task: list[Callable[[], None]] = []


def make_child_tasks_green(loop: asyncio.AbstractEventLoop) -> None:
    """Make the tasks that green code starts on `loop` green too.

    Wraps the loop's task factory, once; a factory that the loop has already still makes the tasks.
    """
    make_task = loop.get_task_factory()
    if getattr(make_task, "_makes_green_tasks", False):
        return

    def factory(
        loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **kwargs: Any
    ) -> asyncio.Future[Any]:
        for call in before_task:
            call()
        if type(getcurrent()) is Portal:
            coro = portal(coro)
        if make_task is None:
            return asyncio.Task(coro, loop=loop, **kwargs)
        return make_task(loop, coro, **kwargs)

    factory._makes_green_tasks = True  # type: ignore[attr-defined]
    loop.set_task_factory(factory)  # type: ignore[arg-type]  # it takes more than asked
    _unwind_left()
