"""The bridge between greenlets and the event loop; the only module that imports greenlet.

A *portal* is a greenlet that a task of the event loop drives. Code inside a portal is *green*: when
it must wait, it switches to the task, which waits in its place and switches back with the result.
So a synchronous function can wait for the database while the loop serves other tasks.

`run()` calls a synchronous function in a portal. `portal()` drives a coroutine in a portal, so that
the synchronous functions that it calls are green. `await_()` lets code in a portal wait for an
awaitable. A switch to the task passes on what a coroutine would yield: a future to wait for, or
None to go on in the loop's next round. The design follows `awaitlet/base.py` and SQLAlchemy's
`util/concurrency.py`.

Note [Two kinds of end]
A portal ends well when its function returns or raises. A portal is *closed* when the coroutine of
its task is closed or garbage-collected: then GeneratorExit is raised in the portal's code, and
`suspend()` refuses to wait, because nobody would ever switch back. So clean-up code in a closed
portal must do without waiting. The same holds for finalizers that the garbage collector runs: see
Note [Finalizers] in finalizers.py.

Note [Greenlets end]
The garbage collector cannot look into a suspended greenlet: it never frees what only the frames of
that greenlet refer to, which may include the greenlet. So each portal is ended by a switch into it.
A portal whose function has ended is kept for another function, or ended if enough are kept. A
portal whose loop was closed would wait for ever: it is unwound, as if its coroutine had been
closed, when its thread first runs green code on another loop, or when the thread ends. Only the
thread of a greenlet can switch to it: if another thread closes the coroutine of a portal, the
portal is unwound later, in its own thread.

Note [Whose step]
An eager task (since Python 3.12) takes its first step where it is made: if green code makes it, in
the portal of the task that makes it. If the new task waited in that portal, the other task would
wait instead, and the loop would stop. So `run()` and `portal()` give the new task a portal of its
own, inside the other one, and its code gets `NotGreen` if it wants to wait without one. Each step
of a task enters the task's context (contextvars). So a comparison of contexts tells whose step it
is, and costs less than to ask asyncio for the running task.
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
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, ParamSpec, TypeVar

from greenlet import GreenletExit, getcurrent, greenlet

from .coroutines import GreenCoroutine, as_coroutine, exception_to_throw
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

#: The exceptions that interrupt code from outside, as opposed to errors of the code itself.
INTERRUPTIONS = (asyncio.CancelledError, GeneratorExit, GreenletExit, KeyboardInterrupt, SystemExit)


class Portal(greenlet):
    """A greenlet that a task drives; its attributes hold the state of the code that runs in it."""

    # fmt: off
    __slots__ = (
        "closing", "context", "dropped", "found", "holding", "loop", "on_wait",
        "pending", "postponing", "raised", "returned", "thrown", "working",
    )
    # fmt: on

    def __init__(self) -> None:
        super().__init__(_serve)
        _mine.made.add(self)
        #: The portals of this thread whose coroutines were closed in other threads; see Note
        #: [Greenlets end].
        self.dropped = _mine.dropped
        #: The context (contextvars) of the task that drives this portal, see Note [Whose step]; and
        #: the loop of that task.
        self.context: Any = None
        self.loop: asyncio.AbstractEventLoop | None = None
        #: Whether a function runs in this portal; what the last one returned, or raised.
        self.working = False
        self.returned: object = None
        self.raised: BaseException | None = None
        self.closing = False
        #: The exception that the code in this portal raises after the next switch to it. greenlet's
        #: own `throw()` takes much longer, because it raises an exception in C++ too.
        self.thrown: BaseException | None = None
        #: A cancellation that is held back; how many `with hold_cancellation()` and
        #: `with postpone_delivery()` statements the code is in; see cancellation.py.
        self.pending: asyncio.CancelledError | None = None
        self.holding = 0
        self.postponing = 0
        #: The result of `state.find()` for the code in this portal: it is kept until the next step,
        #: which another task may take.
        self.found: Any = None
        #: Called before each wait of `await_()` in this portal; not before waits for a socket or a
        #: lock.
        self.on_wait: Callable[[], None] | None = None

    def is_own(self) -> bool:
        """Return whether the running task is the one that drives this portal.

        False: an eager task takes its first step in this portal, and must not wait in it: Note
        [Whose step]. If the code's context is not the portal's, asyncio is asked for the task.
        """
        if self.gr_context is self.context or self.closing or not _HAS_EAGER_TASKS:
            return True
        if (task := current_task()) is None:
            return True
        outer: Any = self.parent  # in it, the driving task takes its step
        return outer.gr_context is task.get_context()  # type: ignore[attr-defined]  # since 3.12

    def suspend(self, yielded: object) -> object:
        """Switch to the task, which yields `yielded`; return what the task's next step sends.

        Raises what that step throws instead, or `PortalClosed` or `NotGreen` if the code may not
        wait.
        """
        if self.closing or collecting or self.gr_context is not self.context:
            self._check_may_wait()
        value = self.parent.switch(yielded)  # type: ignore[union-attr]  # a running portal has it
        if self.thrown is not None:
            self._raise_thrown()
        return value

    def wait_for(self, future: asyncio.Future[T]) -> T:
        """Let the task wait for `future`; return the result of `future`, or raise its exception."""
        # As `suspend()` does: greenlet makes an object for each frame that a switch leaves behind.
        if not future.done():
            if self.closing or collecting or self.gr_context is not self.context:
                self._check_may_wait()
            # `Future.__await__` sets this flag before it yields the future: the task checks it.
            future._asyncio_future_blocking = True  # noqa: SLF001 - asyncio's protocol for futures
            self.parent.switch(future)  # type: ignore[union-attr]  # as above
            if self.thrown is not None:
                self._raise_thrown()
        return future.result()

    def deliver_cancellation(self) -> None:
        """Raise the cancellation that was held back, if any; not while one is held or postponed."""
        if self.pending is None or self.holding or self.postponing:
            return
        pending, self.pending = self.pending, None
        try:
            raise pending
        finally:
            del pending  # its traceback refers to this frame

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
            del thrown  # its traceback refers to this frame


_HAS_EAGER_TASKS = sys.version_info >= (3, 12)
_DROPPED = "the task was dropped: nothing can be waited for any more"


def let_step_end() -> None:
    """End the running task's step and go on in the next one, as ``await asyncio.sleep(0)`` does.

    Does nothing if the caller is not green, or must not wait now.
    """
    here = getcurrent()
    if type(here) is Portal and not (here.closing or here.holding) and not is_collecting():
        here.suspend(None)


def check_may_wait(here: Portal) -> None:
    """Raise an error if the code in the portal `here` may not wait; to be called before sending.

    Also raises a cancellation that was held back. In a closed portal only the wait itself raises,
    since code that turns out not to wait may go on.
    """
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
    """The class that a forked child gives the portal whose code has forked: nothing drives it."""

    __slots__ = ()


@after_fork
def _forget_portals() -> None:
    """Make the running code synchronous in a forked child; leave other portals suspended."""
    here = getcurrent()
    if type(here) is Portal:
        here.__class__ = _Orphan
    for portal in list(_mine.made):
        if portal.working:
            _mine.made.discard(portal)  # never unwound: it may hold what is the parent's


#: Returns the running greenlet, which need not be a `Portal`. It is for code that runs so often
#: that a call of `current()` or `green()` would cost too much: such code repeats their checks.
running = getcurrent


def current() -> Portal | None:
    """Return the portal that the caller runs in; None outside of portals.

    Unlike `green()`, this also returns a portal that is unwound after the end of its loop.
    """
    here = getcurrent()
    return here if type(here) is Portal else None


def green() -> Portal | None:
    """Return the portal that the caller runs in; None outside of portals, or if no loop runs."""
    here = getcurrent()
    return here if type(here) is Portal and asyncio._get_running_loop() is not None else None


def current_task() -> asyncio.Task[Any] | None:
    """Return the running task; None if no loop, or no task, runs in this thread."""
    return None if asyncio._get_running_loop() is None else asyncio.current_task()


def _serve(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Call `fn`, then each next function that the portal is given; a portal's greenlet runs this.

    While it waits for the next one, its frame must refer to no greenlet: Note [Greenlets end].
    """
    here: Any
    while True:
        try:
            getcurrent().returned = fn(*args, **kwargs)  # type: ignore[attr-defined]  # a portal
        except GreenletExit:  # asks for the end of this greenlet
            raise
        except BaseException as exc:
            getcurrent().raised = exc  # type: ignore[attr-defined]
        del fn, args, kwargs  # keep none of them alive until the next call
        here = getcurrent()
        here.working = False
        here = here.parent
        fn, args, kwargs = here.switch()


#: The portals of each thread, by its identity; for stacks.py, which looks at those of all threads.
made_in: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


class _Mine(threading.local):
    """Thread-local values: the portals of the running thread; see Note [Greenlets end]."""

    #: How many idle portals are kept. A new greenlet takes some ten microseconds, mostly because
    #: the interpreter maps memory for its first frame, and unmaps it after the last.
    MOST = 64

    def __init__(self) -> None:
        #: The portals that have not ended.
        self.made: weakref.WeakSet[Portal] = weakref.WeakSet()
        made_in[threading.get_ident()] = self.made
        self.farewell = _Farewell(self.made)
        #: The portals that wait for a function.
        self.idle: list[Portal] = []
        #: The portals whose coroutines were closed in other threads.
        self.dropped: deque[Portal] = deque()
        #: Whether `first_step()` runs, that is a callback of the loop and no task.
        self.outside_of_tasks = False


class _Farewell:
    """A thread-local value whose finalizer, at the end of the thread, ends the thread's portals."""

    def __init__(self, made: weakref.WeakSet[Portal]) -> None:
        self._made = made
        self._thread = threading.get_ident()

    def say(self) -> None:
        for portal in list(self._made):
            _unwind(portal) if portal.working else _end(portal)

    def __del__(self) -> None:
        # Portals cannot be ended in a forked child that lacks their thread, nor while the
        # interpreter ends.
        if self._thread == threading.get_ident() and not sys.is_finalizing():
            self.say()


_mine = _Mine()


@atexit.register
def _say_farewell() -> None:
    """End the portals of the main thread at exit: its thread-local values are freed too late."""
    _mine.farewell.say()


def _take_portal() -> Portal:
    if _mine.outside_of_tasks:
        raise NotGreen("cannot wait for the database in a callback of the event loop: use a task")
    idle = _mine.idle
    portal = idle.pop() if idle else Portal()
    here = getcurrent()
    # The portal shares the task's context (contextvars): each sees what the other sets.
    portal.gr_context = portal.context = here.gr_context
    portal.loop = asyncio._get_running_loop()
    if portal.parent is not here:
        portal.parent = here
    portal.working = True
    return portal


def _keep_portal(portal: Portal) -> None:
    """Keep `portal`, whose function has ended, for another one; end it if it cannot be kept."""
    portal.returned = portal.raised = portal.pending = portal.found = portal.gr_context = None
    portal.on_wait = portal.loop = portal.context = None
    idle = _mine.idle
    # Its `__dict__` has what the function has set on the greenlet: the next one must not see that.
    as_new = not (portal.closing or portal.holding or portal.postponing or portal.__dict__)
    if as_new and switches.portals and len(idle) < _Mine.MOST:
        idle.append(portal)
    else:
        _end(portal)


def _end(portal: Portal) -> None:
    """End the greenlet of `portal`, in which no function runs."""
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
    """Call `fn` in a portal, and return its result; each step of this generator continues `fn`."""
    portal = _take_portal()
    yielded = portal.switch(fn, args, kwargs)
    while portal.working and not portal.dead:
        try:
            value = yield yielded
        except BaseException as exc:  # raised in the portal, whose code may catch it
            if isinstance(exc, GeneratorExit) and not _may_close(portal):
                raise
            _adopt(portal)
            yielded = _throw(portal, exc)
        else:
            _adopt(portal)
            yielded = portal.switch(value)
    if portal.dead:
        if portal.closing:  # at the end of its thread, or of its loop
            raise PortalClosed(_DROPPED)
        return yielded  # the GreenletExit that has ended it
    # A cancellation that was held back, and not delivered until now, must not get lost.
    returned, raised = portal.returned, portal.raised or portal.pending
    _keep_portal(portal)
    if raised is None:
        return returned
    try:
        raise raised
    finally:
        del raised  # its traceback refers to this frame


def _may_close(portal: Portal) -> bool:
    """Mark `portal` as closed; return True if the caller is to unwind its code now.

    False: the portal has ended; or it is unwound later, by its own thread, or after the running
    garbage collection.
    """
    if portal.dead:
        return False
    portal.closing = True  # Note [Two kinds of end]
    if portal.dropped is not _mine.dropped:
        portal.dropped.append(portal)
        try:
            assert portal.loop is not None
            portal.loop.call_soon_threadsafe(_unwind_dropped)
        except RuntimeError:  # the loop is closed: `_unwind_left()` finds the portal
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
    """Unwind the portals of this thread whose loops were closed: they would wait for ever."""
    for portal in list(_mine.made):
        if portal.working and portal.loop is not None and portal.loop.is_closed():
            _unwind(portal)


def _unwind(portal: Portal) -> None:
    """Raise GeneratorExit in the code in `portal`, as if its coroutine were closed."""
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


#: The portals that are being unwound where no loop runs; usually empty.
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
    """Make the running greenlet the parent of `portal`: the one that `portal` switches back to.

    It nearly always is that already. It is not if the coroutine was started eagerly inside another
    portal, or if a task steps a coroutine that another task has begun. A portal of another thread
    cannot be adopted: then this raises `PortalClosed`.
    """
    portal.found = None
    here = getcurrent()
    if portal.parent is not here:
        if portal.dropped is not _mine.dropped:
            raise PortalClosed(
                "a task cannot go on in another thread than the one that it waits in: run its "
                "event loop in one thread only, and cancel the task before that thread ends"
            )
        portal.parent = here


async def run(fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call the synchronous function `fn` in a portal, and return its result.

    When code in `fn` waits, it suspends the task that awaits this; no thread is used. If the caller
    is green already, `fn` is simply called, in the caller's portal.
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

    A coroutine is driven inside the caller's portal, so the synchronous functions that it calls are
    green too. Outside of a portal, a coroutine is closed, and `NotGreen` is raised.
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
            except BaseException as exc:  # raised in the coroutine, which may catch it
                if getattr(coro, "cr_frame", coro) is None:  # Python 3.15's collector has closed it
                    raise
                yielded = coro.throw(exception_to_throw(exc))
            else:
                yielded = coro.send(value)
    except StopIteration as stop:
        result: T = stop.value
        return result


def drive(coro: Coroutine[Any, Any, T]) -> Awaitable[T]:
    """Return an awaitable, to be awaited at once, that runs `coro` in a portal.

    If the caller is green already, returns `coro` itself. No ``async def``, because each step would
    have to go through one coroutine more.
    """
    here = getcurrent()
    if type(here) is Portal and here.is_own():
        return coro
    make_child_tasks_green(asyncio.get_running_loop())
    return _drive(await_, (coro,), {})


def portal(coro: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
    """Return a coroutine that runs `coro` in a portal, so that functions it calls are green."""
    return coro if type(coro) is GreenCoroutine else GreenCoroutine(coro, drive)


def first_step(
    coro: Coroutine[asyncio.Future[Any] | None, Any, Any],
) -> asyncio.Future[Any] | None:
    """Take the first step of `coro`, in a callback of the loop; return what that step yields.

    The step yields the future that `coro` waits for, or None; `coroutines.resume()` takes the other
    steps, in a task. Raises StopIteration if `coro` returns, the errors of `coro`, and `NotGreen`
    if it uses the database, since only a task can hold a connection.
    """
    _mine.outside_of_tasks = True
    try:
        return coro.send(None)
    finally:
        _mine.outside_of_tasks = False


#: Functions that the factory of `make_child_tasks_green()` calls before it makes a task, since the
#: task inherits the caller's context (contextvars); usually empty.
before_task: list[Callable[[], None]] = []


def make_child_tasks_green(loop: asyncio.AbstractEventLoop) -> None:
    """Make the tasks that green code starts on `loop` green too.

    Wraps the loop's task factory, once; a factory that the loop had before still makes the tasks.
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
