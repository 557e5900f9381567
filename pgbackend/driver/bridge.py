"""The bridge between greenlets and the event loop; the only module that knows greenlet.

A *portal* is a greenlet that a task of the event loop drives. Code inside it is *green*: when it
must wait, it switches to the task, which waits for it, and is switched back to with the result. So
a synchronous function can wait for the database while the loop serves other tasks.

`run()` calls a synchronous function in a portal, `portal()` drives a coroutine in one (so that the
synchronous code below it is green), and `await_()` waits, in a portal, for an awaitable. What
travels through a switch is what a coroutine yields to its task: a future, or None for "later".
Model: `awaitlet/base.py` and SQLAlchemy's `util/concurrency.py`.

Note [Two kinds of end]
A portal ends well when its function returns or raises. It is *closed* when its task's coroutine is
closed or collected: then its code unwinds with GeneratorExit, and `suspend()` refuses to wait,
because nobody would ever switch back. Clean-up code must then manage with synchronous means only.

Note [Finalizers]
The garbage collector keeps lists of objects on the C stack, which a switch would move away under
its hands: the interpreter crashes. So `suspend()` refuses to wait there too, and what a finalizer
can do to a connection is what it can do to one whose portal is closed. A portal whose coroutine the
collector closes is unwound when the collection is over.

Note [Greenlets end]
The garbage collector cannot look into a greenlet that waits: what that refers to, be it itself,
lives as long as it does. So each is ended by a switch into it. A portal that has done its work is
kept for the next, up to a number, or ended. One that waits for ever is unwound, as if its coroutine
had been closed, when the thread begins with another loop after its own was closed, and when the
thread ends. Only its own thread can switch to a greenlet: what another one drops is unwound there.

Note [Whose step]
An eager task (Python 3.12) takes its first step where it is made: if green code makes it, inside
the portal of another task. If it waited there, that one would wait in its place, and the loop would
stop. So what begins to be green there takes a portal of its own, inside the other; and what wants
to wait there without one is refused. A task's step has a context of its own entered, so the context
tells, which is cheaper to ask for than the task.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import gc
import sys
import threading
import types
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from types import FrameType
from typing import Any, ParamSpec, TypeVar

from greenlet import GreenletExit, getcurrent, greenlet

from .errors import NotGreen, PortalClosed
from .forks import after_fork
from .shortcuts import switches

P = ParamSpec("P")
T = TypeVar("T")

#: What unwinds code from outside, as opposed to an error of its own.
INTERRUPTIONS = (asyncio.CancelledError, GeneratorExit, GreenletExit, KeyboardInterrupt, SystemExit)


class Portal(greenlet):
    """A greenlet that a task drives. Its attributes are for the code that runs in it."""

    # fmt: off
    __slots__ = (
        "closing", "context", "dropped", "found", "holding", "loop", "on_wait",
        "pending", "postponing", "raised", "returned", "thrown", "working",
    )
    # fmt: on

    def __init__(self) -> None:
        super().__init__(_serve)
        _mine.made.add(self)
        #: Where to put it for its thread to unwind; see Note [Greenlets end].
        self.dropped = _mine.dropped
        #: The context of the task that began with it, see Note [Whose step]; and the loop of that.
        self.context: Any = None
        self.loop: asyncio.AbstractEventLoop | None = None
        #: Whether there is a function in it, and what the last one returned, or raised.
        self.working = False
        self.returned: Any = None
        self.raised: BaseException | None = None
        self.closing = False
        #: What its task throws into it: an argument of the switch, as it were. greenlet's `throw()`
        #: raises an exception of C++, too, which takes much longer than a switch.
        self.thrown: BaseException | None = None
        #: A cancellation that arrived while it had to be held back; see `hold_cancellation`.
        self.pending: asyncio.CancelledError | None = None
        self.holding = 0
        self.postponing = 0
        #: What `state` has found for the code in it; until the next step, which may be another
        #: task's.
        self.found: Any = None
        #: Called before the code in it waits for an awaitable: for what is not a database's socket
        #: or a turn.
        self.on_wait: Callable[[], None] | None = None

    def is_own(self) -> bool:
        """Whether the code that runs in it is that of the task which steps it.

        See Note [Whose step]. That code may have entered another context for a while.
        """
        if self.gr_context is self.context or self.closing or not _HAS_EAGER_TASKS:
            return True
        if (task := current_task()) is None:
            return True
        outer: Any = self.parent  # its context is that of the step
        return outer.gr_context is task.get_context()  # type: ignore[attr-defined]  # since 3.12

    def suspend(self, yielded: Any) -> Any:
        """Give `yielded` to the task and wait until the task is stepped again."""
        if self.closing or _collecting is not None or self.gr_context is not self.context:
            self._check_may_wait()
        value = self.parent.switch(yielded)  # type: ignore[union-attr]  # who runs in it has one
        if self.thrown is not None:
            self._raise_thrown()
        return value

    def wait_for(self, future: asyncio.Future[T]) -> T:
        """Wait for `future`, with nothing between it and the task.

        Not by `suspend()`: greenlet makes an object for each frame that a switch leaves behind.
        """
        if not future.done():
            if self.closing or _collecting is not None or self.gr_context is not self.context:
                self._check_may_wait()
            # What `Future.__await__` does before it yields itself: the task checks for it.
            future._asyncio_future_blocking = True  # noqa: SLF001 - asyncio's protocol for futures
            self.parent.switch(future)  # type: ignore[union-attr]  # as above
            if self.thrown is not None:
                self._raise_thrown()
        return future.result()

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

#: The thread in which the garbage collector runs; see Note [Finalizers].
_collecting: int | None = None
#: The portals, of that thread, whose coroutines it has closed; usually empty.
_collected: list[Portal] = []


def _note_collection(phase: str, info: object) -> None:
    global _collecting  # noqa: PLW0603 - a process collects in one thread at a time
    if phase == "start":
        _collecting = threading.get_ident()
    else:
        _collecting = None
        while _collected:
            _unwind(_collected.pop())


gc.callbacks.append(_note_collection)


def is_collecting() -> bool:
    """Whether the caller is a finalizer that the garbage collector runs."""
    return _collecting == threading.get_ident()


def check_not_collecting() -> None:
    """Raise `PortalClosed` in a finalizer that the garbage collector runs."""
    if _collecting is not None and is_collecting():
        raise PortalClosed(
            "a finalizer that the garbage collector runs cannot wait for the database: close the "
            "generator, or leave the block, before the last reference is dropped"
        )


def let_step_end() -> None:
    """Let the loop begin another step of the running task, if the caller is green and may wait."""
    here = getcurrent()
    if type(here) is Portal and not (here.closing or here.holding) and not is_collecting():
        here.suspend(None)


def check_may_wait(here: Portal) -> None:
    """Raise what a wait in `here` would, but for who is being closed: before anything is sent."""
    if _collecting is not None or here.gr_context is not here.context:
        _check_place(here)
    if here.pending is not None and not here.closing:
        deliver_cancellation()


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
    """What a portal is in a forked child, where its task and its loop are not."""

    __slots__ = ()


@after_fork
def _forget_portals() -> None:
    """Be synchronous from here on in a child that green code has forked: its loop is the parent's.

    What waits in portals is left as it is.
    """
    here = getcurrent()
    if type(here) is Portal:
        here.__class__ = _Orphan
    for portal in list(_mine.made):
        if portal.working:
            _mine.made.discard(portal)  # what it holds is the parent's


#: The running greenlet, of whatever kind; for who asks so often that a call counts. It looks by
#: itself whether that is a `Portal`, as `current()` does, and whether a loop runs, as `green()`.
running = getcurrent


def current() -> Portal | None:
    """Return the portal that the caller runs in, or None.

    No loop runs in one that is unwound after its loop has ended: see `green()`.
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
    here: Any = getcurrent()
    while isinstance(here, Portal):
        here = here.parent
        if here is not None and here.gr_frame is not None:
            yield here.gr_frame


def _serve(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """What a portal runs: one function after the other.

    While it waits for one it does not keep the greenlet that runs it: see Note [Greenlets end].
    """
    here: Any
    while True:
        try:
            getcurrent().returned = fn(*args, **kwargs)  # type: ignore[attr-defined]  # a portal
        except GreenletExit:  # who throws that wants this greenlet to end
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

    #: How many are kept. A new greenlet costs some ten microseconds, most of it for memory that the
    #: interpreter maps for its first frame, and unmaps after the last.
    MOST = 64

    def __init__(self) -> None:
        #: Those that have not ended.
        self.made: weakref.WeakSet[Portal] = weakref.WeakSet()
        self.farewell = _Farewell(self.made)
        #: Those that wait for a function.
        self.idle: list[Portal] = []
        #: Those whose coroutines were closed in other threads.
        self.dropped: deque[Portal] = deque()
        #: Whether the loop has called `first_step()`.
        self.outside_of_tasks = False


class _Farewell:
    """Ends the portals of a thread that ends: what it keeps for itself goes in its last moment."""

    def __init__(self, made: weakref.WeakSet[Portal]) -> None:
        self._made = made
        self._thread = threading.get_ident()

    def say(self) -> None:
        for portal in list(self._made):
            _unwind(portal) if portal.working else _end(portal)

    def __del__(self) -> None:
        # Those of threads that a fork has left behind, and an interpreter's that ends, are lost.
        if self._thread == threading.get_ident() and not sys.is_finalizing():
            self.say()


_mine = _Mine()


@atexit.register
def _say_farewell() -> None:
    """The main thread ends after the interpreter does."""
    _mine.farewell.say()


def _take_portal() -> Portal:
    if _mine.outside_of_tasks:
        raise NotGreen("cannot wait for the database in a callback of the event loop: use a task")
    idle = _mine.idle
    portal = idle.pop() if idle else Portal()
    here = getcurrent()
    # Without this it would see none of the task's context variables, and what it sets would not be
    # seen by the task.
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
    """Let the greenlet of `portal`, in which no function is, run to its end."""
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
        except BaseException as exc:  # thrown into the portal, which decides
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
    # What was held back and delivered nowhere is never swallowed.
    returned, raised = portal.returned, portal.raised or portal.pending
    _keep_portal(portal)
    if raised is None:
        return returned
    try:
        raise raised
    finally:
        del raised  # which knows this frame by its traceback


def _may_close(portal: Portal) -> bool:
    """Whether the code in `portal` can be unwound now; else it is left to who can."""
    if portal.dead:
        return False
    portal.closing = True  # Note [Two kinds of end]
    if portal.dropped is not _mine.dropped:
        portal.dropped.append(portal)
        try:
            assert portal.loop is not None
            portal.loop.call_soon_threadsafe(_unwind_dropped)
        except RuntimeError:  # closed: it is unwound with what else is left of the loop
            pass
        return False
    if is_collecting():
        _collected.append(portal)
        return False
    return True


def _unwind_dropped() -> None:
    dropped = _mine.dropped
    while dropped:
        _unwind(dropped.popleft())


def _unwind_left() -> None:
    """Unwind what waits in portals of this thread for loops that were closed."""
    for portal in list(_mine.made):
        if portal.working and portal.loop is not None and portal.loop.is_closed():
            _unwind(portal)


def _unwind(portal: Portal) -> None:
    """Do to the code in `portal` what the end of its coroutine does, without that."""
    _mine.made.discard(portal)
    if portal.dead or not portal.working:
        return
    portal.closing = True
    _adopt(portal)
    _throw(portal, GeneratorExit())
    raised = portal.raised
    if raised is not None and not isinstance(raised, GeneratorExit):
        _RaisesWhenFreed(raised)
    portal.raised = raised = None
    if not portal.dead:
        _keep_portal(portal)


class _RaisesWhenFreed:
    """Tells `sys.unraisablehook` of an error that nobody waits for: an error of green code.

    CPython's own hook takes an argument of a type of its own, which only the interpreter can make;
    it makes one for what a finalizer raises.
    """

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __del__(self) -> None:
        try:
            raise self.error
        finally:
            del self  # which this frame, and so the error's traceback, would keep


#: An item for each portal that is being unwound where no loop runs; usually empty.
unwinding: list[Portal] = []


def _throw(portal: Portal, exc: BaseException) -> Any:
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
            deliver_cancellation()
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
    coro = awaitable if isinstance(awaitable, Coroutine) else _as_coroutine(awaitable)
    try:
        yielded = coro.send(None)
        while True:
            if here.on_wait is not None:
                here.on_wait()
            try:
                value = here.suspend(yielded)
            except BaseException as exc:  # the coroutine decides
                yielded = coro.throw(_for_coroutine(exc))
            else:
                yielded = coro.send(value)
    except StopIteration as stop:
        result: T = stop.value
        return result


def _for_coroutine(exc: BaseException) -> Any:
    """What to throw into a coroutine for `exc`.

    What is thrown lives for as long as the call does: until the coroutine waits for an awaitable,
    however many statements that takes. A cancellation which has been caught would keep its frames,
    and the generators in these. So the coroutine is given one that nobody else refers to.
    """
    return asyncio.CancelledError if type(exc) is asyncio.CancelledError and not exc.args else exc


async def _as_coroutine(awaitable: Awaitable[T]) -> T:
    return await awaitable


def drive(coro: Coroutine[Any, Any, T]) -> Awaitable[T]:
    """Return `coro` with the synchronous code below it green: `portal()`, for who awaits at once.

    No coroutine of its own, which each step would have to go through.
    """
    here = getcurrent()
    if type(here) is Portal and here.is_own():
        return coro
    make_child_tasks_green(asyncio.get_running_loop())
    return _drive(await_, (coro,), {})


class GreenCoroutine(Coroutine[Any, Any, T]):
    """A coroutine object that drives another one in a portal; what green tasks are made of.

    In the caller's portal, if it begins in a step of the task whose that is. A class rather than
    an ``async def``, because a task that is cancelled before its first step must close the inner
    coroutine instead of leaving it "never awaited".
    """

    def __init__(self, coro: Coroutine[Any, Any, T]) -> None:
        self._coro = coro
        self._driver: Any = None
        self.__name__ = getattr(coro, "__name__", type(coro).__name__)
        self.__qualname__ = getattr(coro, "__qualname__", type(coro).__qualname__)

    def __repr__(self) -> str:
        return f"<green {self._coro!r}>"

    def send(self, value: Any) -> Any:
        if self._driver is None:
            self._driver = drive(self._coro)
        return self._driver.send(value)

    def throw(self, *args: Any) -> Any:
        try:
            return (self._driver or self._coro).throw(*args)
        finally:
            del args  # the exception, whose traceback knows this frame

    def close(self) -> None:
        (self._driver or self._coro).close()

    def __await__(self) -> Generator[Any, Any, T]:
        return self

    def __iter__(self) -> GreenCoroutine[T]:
        return self

    def __next__(self) -> Any:
        return self.send(None)

    # What asyncio and debuggers look for on a coroutine.
    @property
    def cr_frame(self) -> Any:
        return getattr(self._coro, "cr_frame", None)

    @property
    def cr_running(self) -> bool:
        return bool(getattr(self._coro, "cr_running", False))

    @property
    def cr_code(self) -> Any:
        return getattr(self._coro, "cr_code", None)

    @property
    def cr_await(self) -> Any:
        return getattr(self._coro, "cr_await", None)


def portal(coro: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
    """Return a coroutine that runs `coro` with the synchronous code below it green."""
    return coro if type(coro) is GreenCoroutine else GreenCoroutine(coro)


def first_step(coro: Coroutine[Any, Any, Any]) -> Any:
    """Take the first step of `coro` in a callback of the loop; return what it waits for.

    To go on with it is for a task: see `resume()`. Raises what `coro` does, which is `NotGreen`
    where it uses the database: who holds a connection is a task.
    """
    _mine.outside_of_tasks = True
    try:
        return coro.send(None)
    finally:
        _mine.outside_of_tasks = False


async def resume(coro: Coroutine[Any, Any, Any], waits_for: Any) -> Any:
    """Go on with a coroutine whose first step was taken elsewhere."""
    return await _Resumed(coro, waits_for)


class _Resumed:
    def __init__(self, coro: Coroutine[Any, Any, Any], waits_for: Any) -> None:
        self.coro = coro
        self.waits_for = waits_for

    def __await__(self) -> Any:
        if self.waits_for is not None:
            self.waits_for._asyncio_future_blocking = True  # noqa: SLF001
        waits_for = self.waits_for
        try:
            while True:
                try:
                    value = yield waits_for
                except BaseException as exc:
                    waits_for = self.coro.throw(exc)
                else:
                    waits_for = self.coro.send(value)
        except StopIteration as stop:
            return stop.value


def name_of(task: asyncio.Task[Any]) -> str:
    """The name of `task`, for messages; that of its function where it has been given none."""
    name = task.get_name()
    if name == "None":  # what some releases of Python 3.13 name the tasks of a factory
        name = getattr(task.get_coro(), "__qualname__", name)
    return name


#: Called before a task is made, which inherits the context of the caller; usually empty.
before_task: list[Callable[[], None]] = []


def make_child_tasks_green(loop: asyncio.AbstractEventLoop) -> None:
    """Let tasks that green code starts on `loop` be green too.

    Wraps the loop's task factory, once; a factory that is there already still makes the tasks.
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


# --- Cancellation -------------------------------------------------------------------------------
#
# Note [Held cancellation]
# COMMIT and ROLLBACK are not torn: a CancelledError that arrives while `hold_cancellation` is in
# force is kept in `Portal.pending` and raised by `deliver_cancellation()`, at a place where the
# state of the connection is whole again.


class hold_cancellation:  # noqa: N801 - reads as a statement
    """A context manager: a cancellation that arrives in the block is held back."""

    __slots__ = ("_portal",)

    def __enter__(self) -> None:
        self._portal = current()
        if self._portal is not None:
            self._portal.holding += 1

    def __exit__(self, *exc_info: object) -> None:
        if self._portal is not None:
            self._portal.holding -= 1


class hold_when_closed:  # noqa: N801 - reads as a statement
    """A context manager to put around others: a cancellation is held back while they end.

    That is where a generator is closed that the block is in: whoever drops the last reference to it
    cannot be given an exception. Its value is a context manager to put inside of them, which sees
    that. What was held back is delivered later, at the end of the portal at the latest.
    """

    def __init__(self) -> None:
        self._holding = hold_cancellation()
        self._is_closed = False

    @contextlib.contextmanager
    def _inside(self) -> Generator[None]:
        try:
            yield
        except GeneratorExit:
            self._is_closed = True
            self._holding.__enter__()
            raise

    def __enter__(self) -> contextlib.AbstractContextManager[None]:
        return self._inside()

    def __exit__(self, *exc_info: object) -> None:
        if self._is_closed:
            self._holding.__exit__(*exc_info)


class postpone_delivery:  # noqa: N801 - reads as a statement
    """A context manager: what was held back is not delivered in the block, but at its end.

    Or later still, at the end of the portal at the latest, if `deliver` is False.
    """

    __slots__ = ("_deliver", "_portal")

    def __init__(self, *, deliver: bool = True) -> None:
        self._deliver = deliver

    def __enter__(self) -> None:
        self._portal = current()
        if self._portal is not None:
            self._portal.postponing += 1

    def __exit__(self, *exc_info: object) -> None:
        if self._portal is not None:
            self._portal.postponing -= 1
            if self._deliver and self._portal.pending is not None:
                deliver_cancellation()


def deliver_cancellation() -> None:
    """Raise the cancellation that was held back, if there is one."""
    here = current()
    if here is None or here.pending is None:
        return
    if not here.holding and not here.postponing:
        pending, here.pending = here.pending, None
        try:
            raise pending
        finally:
            del pending  # which knows this frame by its traceback


def finish(coro: Coroutine[Any, Any, T], budget: float) -> T | None:
    """Run `coro` to its end in a task of its own, whatever happens to the caller's.

    For clean-up that must not be torn. A cancellation that arrives meanwhile is held back (Note
    [Held cancellation]). Returns None when `budget` (seconds) was not enough; the task is then
    cancelled, and awaited no longer.
    """
    here = current()
    assert here is not None
    loop = asyncio.get_running_loop()
    task = loop.create_task(coro)
    timer = loop.call_later(budget, task.cancel)
    try:
        while not task.done():
            done = loop.create_future()
            task.add_done_callback(functools.partial(_settle, done))
            try:
                here.wait_for(done)
            except asyncio.CancelledError as exc:
                here.pending = here.pending or exc
    except BaseException:
        task.cancel()
        raise
    finally:
        timer.cancel()
    return None if task.cancelled() else task.result()


def _settle(future: asyncio.Future[None], _: object) -> None:
    if not future.done():
        future.set_result(None)


# --- Parking: waiting for a turn, in a greenlet or in a thread ------------------------------------


class Waiter:
    """One caller that waits until another calls `wake()`; a green caller parks its greenlet.

    `wake()` may be called from any thread, and more than once.
    """

    __slots__ = ("_event", "_future", "_loop", "_portal")

    def __init__(self) -> None:
        self._portal = current()
        if self._portal is None:
            self._event = threading.Event()
        else:
            self._loop = asyncio.get_running_loop()
            self._future: asyncio.Future[None] = self._loop.create_future()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for `wake()`; return False when `timeout` seconds passed first."""
        if self._portal is None:
            return self._event.wait(timeout)
        timer = None if timeout is None else self._loop.call_later(timeout, self._set, False)
        try:
            return bool(self._portal.wait_for(self._future))
        finally:
            if timer is not None:
                timer.cancel()

    def wake(self) -> None:
        if self._portal is None:
            self._event.set()
        elif asyncio._get_running_loop() is self._loop:
            self._set(True)
        else:
            try:
                self._loop.call_soon_threadsafe(self._set, True)
            except RuntimeError:  # the loop was closed, and the waiter with it
                pass

    def _set(self, value: Any) -> None:
        if not self._future.done():
            self._future.set_result(value)


class ParkingLock:
    """A fair lock whose waiters park their greenlet, or block their thread when not green.

    It is handed over in the order of arrival, so a waiter that was served and then interrupted
    hands it on. Free, it costs little more than the `threading.Lock` that it is made of; that one
    is never waited for.
    """

    __slots__ = ("_lock", "_waiters", "on_free", "refuse")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiters: deque[Waiter] = deque()
        #: Called when the lock has become free, until somebody sets it to None; in the thread that
        #: has released it.
        self.on_free: Callable[[], None] | None = None
        #: Raises what those get who come, or wait, while somebody has the lock as the last one.
        self.refuse: Callable[[], None] | None = None

    def acquire(self) -> None:
        if self._waiters or not self._lock.acquire(False):
            self._queue()

    def _queue(self) -> None:
        self._maybe_refuse()
        waiter = Waiter()
        self._waiters.append(waiter)
        if self._lock.acquire(False):  # it became free before the waiter could be seen
            self.release()
        try:
            waiter.wait()
            self._maybe_refuse()
        except BaseException:
            self._withdraw(waiter)
            raise

    def _maybe_refuse(self) -> None:
        if (refuse := self.refuse) is not None:
            refuse()

    def _withdraw(self, waiter: Waiter) -> None:
        try:
            self._waiters.remove(waiter)
        except ValueError:
            self.release()  # served already: the lock is this waiter's to hand on

    def release(self, *exc_info: object) -> None:
        waiters = self._waiters
        while True:
            if not waiters:
                self._lock.release()
                # Who came in between, in another thread, has seen the lock held.
                if not waiters or not self._lock.acquire(False):
                    # Looked at once: another thread may take it back meanwhile.
                    if (on_free := self.on_free) is not None:
                        on_free()
                    return
            try:
                waiter = waiters.popleft()
            except IndexError:  # withdrawn by another thread, just now
                continue
            waiter.wake()
            return

    def locked(self) -> bool:
        return self._lock.locked()

    __enter__ = acquire
    __exit__ = release  # itself, and not a call of it: each statement takes the lock
