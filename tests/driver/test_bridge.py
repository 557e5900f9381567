"""Tests the bridge: synchronous code waits in a greenlet, while the event loop goes on."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import gc
import itertools
import os
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest

from pgbackend.driver import bridge
from pgbackend.driver.bridge import await_, portal
from pgbackend.driver.bridge import run as green
from pgbackend.driver.cancellation import (
    deliver_cancellation,
    finish,
    hold_cancellation,
    postpone_delivery,
)
from pgbackend.driver.coroutines import GreenCoroutine
from pgbackend.driver.errors import NotGreen, PortalClosed
from pgbackend.driver.finalizers import is_collecting
from pgbackend.driver.parking import ParkingLock, Waiter
from tests.conftest import Runner, all_portals

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
kept: contextvars.ContextVar[Any] = contextvars.ContextVar("kept", default=None)


def pause() -> None:
    """Let the loop take one turn."""
    await_(asyncio.sleep(0))


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


# --- run, await_, portal --------------------------------------------------------------------------


def test_run_returns_what_the_function_returns(run: Runner) -> None:
    def fn(one: int, *, two: int) -> tuple[int, int, bool]:
        pause()
        return one, two, bridge.green() is not None

    assert run(green(fn, 1, two=2)) == (1, 2, True)


def test_run_raises_what_the_function_raises(run: Runner) -> None:
    def fn() -> None:
        pause()
        raise KeyError("key")

    with pytest.raises(KeyError, match="key"):
        run(green(fn))


def test_a_nested_run_calls_the_function_directly(run_once: Runner) -> None:
    """The function runs in the caller's portal: there is no second greenlet."""

    async def main() -> None:
        def inner() -> Any:
            return bridge.current()

        async def middle() -> Any:
            return await green(inner)

        def outer() -> None:
            assert await_(middle()) is bridge.current()

        await green(outer)

    run_once(main())


def test_other_tasks_run_while_green_code_waits(run: Runner) -> None:
    async def main() -> list[str]:
        order: list[str] = []
        ready = asyncio.Event()

        def fn() -> None:
            order.append("waits")
            await_(ready.wait())
            order.append("goes on")

        waiting = asyncio.create_task(green(fn))
        await turns()
        order.append("other")
        ready.set()
        await waiting
        return order

    assert run(main()) == ["waits", "other", "goes on"]


def test_any_awaitable_can_be_awaited(run: Runner) -> None:
    async def main() -> None:
        async def value(of: Any) -> Any:
            await asyncio.sleep(0)
            return of

        class Awaitable:
            def __await__(self) -> Any:
                return value("object").__await__()

        def fn() -> None:
            future = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_soon(future.set_result, "future")
            assert await_(value("coroutine")) == "coroutine"
            assert await_(future) == "future"
            assert await_(Awaitable()) == "object"
            assert await_(asyncio.gather(value(1), value(2))) == [1, 2]

        await green(fn)

    run(main())


def test_an_error_of_the_awaitable_is_raised_where_it_is_awaited(run: Runner) -> None:
    async def fail() -> None:
        await asyncio.sleep(0)
        raise ZeroDivisionError

    def fn() -> str:
        try:
            await_(fail())
        except ZeroDivisionError:
            return "caught"
        return "missed"

    assert run(green(fn)) == "caught"


def test_await_outside_of_a_portal_is_refused_and_closes_the_coroutine() -> None:
    """The error names the cure, and no warning "never awaited" comes on top."""

    async def never() -> None: ...

    coro = never()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(NotGreen, match=r"await pgbackend\.aio\.run"):
            await_(coro)
        assert coro.cr_frame is None
        del coro
        gc.collect()


def test_await_on_the_loop_but_outside_of_a_portal_is_refused(run_once: Runner) -> None:
    async def main() -> None:
        with pytest.raises(NotGreen):
            await_(asyncio.sleep(0))

    run_once(main())


def test_portal_makes_synchronous_code_below_a_coroutine_green(run: Runner) -> None:
    def sync() -> bool:
        pause()
        return bridge.green() is not None

    async def deep() -> bool:
        await asyncio.sleep(0)
        return sync()

    async def main() -> None:
        assert bridge.green() is None
        assert await portal(deep())
        assert bridge.green() is None

    run(main())


def test_code_that_is_unwound_after_its_loop_is_in_a_portal_and_not_green() -> None:
    seen: list[Any] = []

    def wait() -> None:
        seen.append((bridge.current(), bridge.green()))
        try:
            await_(asyncio.Event().wait())
        finally:
            seen.append((bridge.current(), bridge.green()))

    async def begin(coro: Any) -> None:
        coro.send(None)

    coro = bridge.run(wait)
    asyncio.run(begin(coro))
    coro.close()
    here = seen[0][0]
    assert here is not None
    assert seen == [(here, here), (here, None)]


def test_a_portal_in_a_portal_is_the_same_portal(run_once: Runner) -> None:
    async def inner() -> Any:
        return bridge.current()

    async def outer() -> None:
        assert await portal(inner()) is bridge.current()

    run_once(portal(outer()))


def test_deep_recursion_through_portals_works(run_once: Runner) -> None:
    """Sync code awaits a coroutine that calls sync code, a hundred times."""

    def sync(depth: int) -> int:
        return 0 if not depth else 1 + await_(coro(depth))

    async def coro(depth: int) -> int:
        await asyncio.sleep(0)
        return sync(depth - 1)

    assert run_once.green(sync, 100) == 100


# --- Portals are used again -----------------------------------------------------------------------


class Thing:
    """Lets tests see, by weak references, when an object is freed."""


def here() -> Any:
    return bridge.current()


@pytest.mark.shortcut("portals")
def test_a_portal_serves_one_function_after_the_other(run: Runner) -> None:
    def fails() -> Any:
        pause()
        raise KeyError(bridge.current())

    async def main() -> None:
        first = await green(here)
        with pytest.raises(KeyError) as raised:
            await green(fails)
        assert raised.value.args[0] is first, "an error does not end it"
        assert await green(here) is first
        task = asyncio.create_task(green(lambda: (here(), await_(asyncio.sleep(60)))))
        await turns()
        other = await green(here)
        assert other is not first, "that one is in use"
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await green(here) is first, "the last that became free"
        assert {await green(here), await portal(_here())} == {first}

    run(main())


async def _here() -> Any:
    return bridge.current()


def test_a_portal_that_waits_for_its_next_function_keeps_nothing_of_the_last(run: Runner) -> None:
    refs: list[weakref.ref[Thing]] = []

    def remembers(thing: Thing, *, fails: bool) -> Thing:
        in_context = Thing()
        kept.set(in_context)
        refs.extend(map(weakref.ref, (thing, in_context)))
        pause()
        if fails:
            raise KeyError(thing)
        return thing

    async def main() -> None:
        for fails in (False, True):
            with suppress(KeyError):
                await asyncio.create_task(green(remembers, Thing(), fails=fails))

    run(main())
    gc.collect()
    assert len(refs) == 4 and not any(ref() for ref in refs)


@pytest.mark.shortcut("portals")
def test_each_function_has_the_context_of_its_own_task(run: Runner) -> None:
    async def main() -> None:
        async def named(name: str) -> tuple[Any, str, str]:
            variable.set(name)
            at, seen = await green(lambda: (here(), variable.get()))
            await green(variable.set, f"{name}, changed")
            return at, seen, variable.get()

        one = await asyncio.create_task(named("one"))
        two = await asyncio.create_task(named("two"))
        assert one[0] is two[0]
        assert one[1:] == ("one", "one, changed") and two[1:] == ("two", "two, changed")
        assert await green(variable.get) == "unset"

    run(main())


def test_a_portal_that_was_closed_or_left_in_disorder_is_not_used_again(run: Runner) -> None:
    def leaves(name: str) -> Any:
        setattr(here(), name, 1)
        return here()

    def swallows() -> None:
        try:
            await_(asyncio.sleep(60))
        except GeneratorExit:
            closed.append(here())

    closed: list[Any] = []

    async def main() -> None:
        for name in ("holding", "postponing"):
            assert await green(leaves, name) is not await green(here)
        coro = green(swallows)
        coro.send(None)
        coro.close()
        assert await green(here) is not closed.pop()
        assert not bridge.unwinding

    run(main())


# --- Portals end ----------------------------------------------------------------------------------


def alive() -> int:
    """Return how many portals of this process could still run."""
    return sum(not portal.dead for portal in all_portals())


def alive_here() -> int:
    """Return how many of them are this thread's: the others live as long as their threads."""
    mine = bridge._mine.dropped
    return sum(not portal.dead and portal.dropped is mine for portal in all_portals())


def finished() -> None:
    pause()


def fails() -> None:
    pause()
    raise KeyError


def fails_at_once() -> None:
    raise KeyError


def leaves_disorder() -> None:
    pause()
    here().holding += 1


def ends_its_greenlet() -> None:
    pause()
    raise bridge.GreenletExit


MANNERS = [finished, fails, fails_at_once, leaves_disorder, ends_its_greenlet]


@pytest.mark.parametrize("calls", [300, 1000])
@pytest.mark.parametrize("fn", MANNERS, ids=lambda fn: fn.__name__)
def test_after_a_burst_of_calls_a_bounded_number_of_portals_is_left(
    run: Runner, fn: Callable[[], None], calls: int
) -> None:
    async def main() -> None:
        for start in (lambda: green(fn), lambda: portal(_call(fn))):
            await asyncio.gather(*(start() for _ in range(calls)), return_exceptions=True)
            assert alive_here() <= bridge._Mine.MOST + 1

    run(main())


def test_a_portal_that_nobody_refers_to_ends(run_once: Runner) -> None:
    """The portal does not refer to itself, even if an interrupt has lost it on the way."""

    async def main() -> None:
        taken = bridge._take_portal()
        taken.switch(lambda: None, (), {})
        lost = weakref.ref(taken)
        del taken
        assert lost() is None

    run_once(main())


@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize("end", ["cancel", "close", "throw", "drop"])
def test_portals_of_tasks_that_are_ended_at_any_step_end(run: Runner, end: str, turn: int) -> None:
    def fn() -> None:
        pause()
        pause()

    async def cancelled(coro: Any) -> None:
        task = asyncio.create_task(coro)
        await turns(turn)
        task.cancel()
        await asyncio.wait([task])

    def stopped(coro: Any) -> None:
        for _ in range(min(turn, 2)):
            coro.send(None)
        if end == "close":
            coro.close()
        elif end == "throw":
            with suppress(KeyError):
                coro.throw(KeyError)

    async def main() -> None:
        for start in (lambda: green(fn), lambda: portal(_call(fn))):
            for _ in range(100):
                await cancelled(start()) if end == "cancel" else stopped(start())
        assert alive_here() <= bridge._Mine.MOST

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine .* was never awaited")
        run(main())
        gc.collect()


def test_the_portals_of_a_thread_end_with_it() -> None:
    def busy() -> None:
        asyncio.run(_gathered())

    async def _gathered() -> None:
        await asyncio.gather(*(green(pause) for _ in range(100)))

    before = alive()
    for _ in range(5):
        thread = threading.Thread(target=busy)
        thread.start()
        thread.join()
    assert alive() == before


class Parked:
    """Waits for ever as a green function, in a frame that refers to its own task."""

    def __init__(self, *, swallows: bool = False) -> None:
        self.seen: list[Any] = []
        self.swallows = swallows

    def __call__(self) -> None:
        task, portal = asyncio.current_task(), bridge.current()
        assert task is not None and portal is not None
        try:
            await_(asyncio.Event().wait())
        except GeneratorExit:
            self.seen.append("unwinds")
            if not self.swallows:
                raise
        finally:
            with suppress(PortalClosed):
                pause()
                self.seen.append("waited")
            self.seen += [threading.get_ident(), is_collecting()]


def leave(run: Runner, *fns: Callable[[], Any], closed: bool) -> list[asyncio.Task[Any]]:
    """Start tasks on a loop that stops without waiting for them."""
    loop = run.factory()
    loop.set_exception_handler(lambda loop, context: None)  # "destroyed, but it is pending"
    starts = [start for fn in fns for start in (green(fn), portal(_call(fn)))]
    tasks = [loop.create_task(start) for start in starts]
    loop.run_until_complete(turns())
    if closed:
        loop.close()
    else:
        tasks.append(loop)  # type: ignore[arg-type]  # keep it open
    return tasks


@pytest.mark.parametrize("swallows", [False, True])
def test_portals_that_wait_for_a_closed_loop_end_when_the_thread_goes_on_with_another(
    run: Runner, swallows: bool
) -> None:
    parked = Parked(swallows=swallows)
    before = alive()
    tasks = leave(run, parked, closed=True)
    coros: list[Any] = [task.get_coro() for task in tasks]
    run.green(pause)
    assert parked.seen == ["unwinds", threading.get_ident(), False] * 2
    assert alive() <= before + 1
    # Their coroutines have no greenlet any more.
    with pytest.raises(PortalClosed):
        coros[0].send(None)
    coros[1].close()


@pytest.mark.parametrize("closed", [True, False])
def test_portals_that_wait_for_ever_end_with_their_thread(run: Runner, closed: bool) -> None:
    parked = Parked()
    before = alive()
    kept: list[Any] = []

    def other() -> None:
        kept.append(threading.get_ident())
        kept.extend(leave(run, parked, closed=closed))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert parked.seen == ["unwinds", kept[0], False] * 2
    assert alive() == before
    # Their coroutines have no greenlet any more.
    with pytest.raises(PortalClosed):
        kept[1].get_coro().send(None)
    with pytest.raises(PortalClosed):
        kept[2].get_coro().throw(asyncio.CancelledError)
    if not closed:
        kept[-1].close()
    kept.clear()


def test_a_coroutine_that_the_collector_closes_is_unwound_when_it_is_done(run: Runner) -> None:
    """During the collection, a switch to the coroutine's greenlet would crash the interpreter."""
    parked = Dropped()
    collecting: list[bool] = []
    before = alive()

    def fn() -> None:
        try:
            parked()
        finally:
            collecting.append(is_collecting())

    async def main() -> None:
        for start in (lambda: green(fn), lambda: portal(_call(fn))):
            cycle: list[Any] = [start()]
            cycle[0].send(None)
            cycle.append(cycle)
            del cycle
            assert not collecting
            gc.collect()
            assert parked.seen == ["unwinds", "cannot wait"] and collecting == [False]
            assert not parked.lock.locked()
            parked.seen.clear()
            collecting.clear()

    run(main())
    assert alive() <= before + 1


def test_an_error_of_what_the_collector_closes_is_told(
    run_once: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Any hook can report it: CPython's own accepts only records that the interpreter has made."""
    told: list[Any] = []

    def hook(unraisable: Any) -> None:
        told.append(unraisable.exc_type)
        sys.__unraisablehook__(unraisable)

    monkeypatch.setattr(sys, "unraisablehook", hook)

    def fn() -> None:
        try:
            await_(asyncio.Event().wait())
        finally:
            raise KeyError("of green code")

    async def main() -> None:
        cycle: list[Any] = [green(fn)]
        cycle[0].send(None)
        cycle.append(cycle)
        del cycle
        gc.collect()

    run_once(main())
    assert told == [KeyError]
    assert "KeyError: 'of green code'" in capsys.readouterr().err


@pytest.mark.parametrize("end", ["close", "collect"])
def test_what_another_thread_drops_is_unwound_in_its_own(run: Runner, end: str) -> None:
    """Only the thread of a greenlet can switch to it."""
    parked = Parked()
    before = alive()

    def drop(held: list[Any]) -> None:
        if end == "close":
            held.pop().close()
        else:
            cycle = [held.pop()]
            cycle.append(cycle)
            del cycle
            gc.collect()

    async def main() -> None:
        for start in (lambda: green(waits), lambda: portal(_call(waits))):
            held: list[Any] = [start()]
            held[0].send(None)
            await asyncio.to_thread(drop, held)
            await turns()
            assert parked.seen == ["unwinds", threading.get_ident(), False]
            parked.seen.clear()

    def waits() -> None:  # in frames that the collector need not visit
        try:
            await_(asyncio.Event().wait())
        except GeneratorExit:
            parked.seen += ["unwinds", threading.get_ident(), is_collecting()]
            raise

    run(main())
    assert alive() <= before + 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("green_fork", [False, True])
def test_a_forked_child_leaves_what_waits_in_its_parent_alone(
    run: Runner, green_fork: bool
) -> None:
    parked = Parked()
    code: list[int] = []

    def in_child() -> bool:
        """Return whether waiting portals are left as they are, and new ones work."""
        thread = threading.Thread(target=lambda: asyncio.run(green(pause)))
        thread.start()
        thread.join()
        bridge._mine.farewell.say()
        return not parked.seen and not thread.is_alive()

    def fork() -> None:
        if (pid := os.fork()) == 0:
            result = 1
            with suppress(BaseException):
                result = 0 if in_child() else 2
            os._exit(result)
        code.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    async def main() -> None:
        task = asyncio.create_task(green(parked))
        await turns()
        await green(fork) if green_fork else fork()
        assert not parked.seen
        task.cancel()
        await asyncio.wait([task])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads, and fork
        run(main())
    assert code == [0]


LEAVES = """
import asyncio, sys
from pgbackend.driver import bridge

def fn():
    task = asyncio.current_task()
    try:
        bridge.await_(asyncio.Event().wait())
    finally:
        print("unwinds")

async def main():
    await asyncio.gather(*(bridge.run(lambda: bridge.await_(asyncio.sleep(0))) for _ in range(9)))

asyncio.run(main())
loop = asyncio.new_event_loop()
loop.set_exception_handler(lambda loop, context: None)
task = loop.create_task(bridge.run(fn))
loop.run_until_complete(asyncio.sleep(0))
if "closed" in sys.argv:
    loop.close()
"""


@pytest.mark.parametrize("how", ["closed", "open"])
def test_a_process_ends_well_with_portals_that_wait(how: str) -> None:
    command = [sys.executable, "-c", LEAVES, how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    lines = [line for line in done.stderr.splitlines() if "ResourceWarning" not in line]
    assert (done.returncode, done.stdout, lines) == (0, "unwinds\n", [])


@pytest.mark.shortcut("portals")
def test_threads_do_not_share_portals() -> None:
    def one() -> Any:
        return asyncio.run(green(here))

    mine = one()
    with ThreadPoolExecutor(1) as thread:
        theirs = thread.submit(one).result()
        assert thread.submit(one).result() is theirs
    assert one() is mine and theirs is not mine


# --- Child tasks ----------------------------------------------------------------------------------


async def by_create_task(child: Callable[[], Any]) -> Any:
    return await asyncio.create_task(child())


async def by_gather(child: Callable[[], Any]) -> Any:
    return (await asyncio.gather(child(), child()))[1]


async def by_task_group(child: Callable[[], Any]) -> Any:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(child())
    return task.result()


async def by_wait_for(child: Callable[[], Any]) -> Any:
    return await asyncio.wait_for(child(), 5)


async def by_ensure_future(child: Callable[[], Any]) -> Any:
    return await asyncio.ensure_future(child())


WAYS = [by_create_task, by_gather, by_task_group, by_wait_for, by_ensure_future]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_child_tasks_of_green_code_are_green(run: Runner, way: Any) -> None:
    async def child() -> bool:
        await asyncio.sleep(0)
        pause()
        return bridge.green() is not None

    assert run(portal(way(child)))


def test_tasks_of_other_code_are_left_alone(run_once: Runner) -> None:
    async def child() -> bool:
        return bridge.green() is not None

    async def main() -> None:
        await green(pause)
        assert await asyncio.create_task(child()) is False

    run_once(main())


def test_a_custom_task_factory_still_makes_the_tasks(run: Runner) -> None:
    made: list[str] = []

    class Task(asyncio.Task[Any]):
        pass

    def factory(loop: Any, coro: Any, **kwargs: Any) -> Any:
        made.append("task")
        return Task(coro, loop=loop, **kwargs)

    async def child() -> bool:
        pause()
        return bridge.green() is not None and type(asyncio.current_task()) is Task

    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(factory)
        for _ in range(3):
            assert await portal(by_create_task(child))
        assert made == ["task"] * 3

    run(main())


def test_a_task_factory_that_is_set_later_is_kept_too(run_once: Runner) -> None:
    made: list[str] = []

    def factory(loop: Any, coro: Any, **kwargs: Any) -> Any:
        made.append("task")
        return asyncio.Task(coro, loop=loop, **kwargs)

    async def child() -> bool:
        return bridge.green() is not None

    async def main() -> None:
        await green(pause)
        asyncio.get_running_loop().set_task_factory(factory)
        assert await portal(by_create_task(child))
        assert made == ["task"]

    run_once(main())


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_eager_tasks_of_green_code_are_green(run: Runner, way: Any) -> None:
    """The first step of each runs inside the parent's portal, the next ones in the loop's turn."""

    async def at_once() -> bool:
        return bridge.green() is not None

    async def child() -> bool:
        first = bridge.green() is not None, variable.get()
        variable.set("child's")
        pause()
        await asyncio.sleep(0)
        return (
            first == (True, "parent's")
            and bridge.green() is not None
            and variable.get() == "child's"
        )

    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(eager_factory)
        variable.set("parent's")
        assert await portal(way(child))
        assert await portal(way(at_once))
        if way is not by_wait_for:  # which does not make a task any more
            assert variable.get() == "parent's"

    run(main())


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")
def test_an_eager_task_may_outlive_the_portal_that_started_it(run_once: Runner) -> None:
    async def child(ready: asyncio.Event) -> bool:
        await_(ready.wait())
        return bridge.green() is not None

    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(eager_factory)
        ready = asyncio.Event()
        task = await green(lambda: asyncio.get_running_loop().create_task(child(ready)))
        ready.set()
        assert await task

    run_once(main())


def test_a_task_that_is_cancelled_before_its_first_step_leaves_no_warning(run: Runner) -> None:
    """The coroutine is not reported as "never awaited"; pytest makes such a warning an error."""
    stepped: list[str] = []

    async def child() -> None:
        stepped.append("child")

    def fn() -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(child())
        task.cancel()
        return task

    async def main() -> None:
        task = await green(fn)
        await asyncio.wait([task])
        assert task.cancelled() and not stepped

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(main())
        gc.collect()
    assert not caught


def test_green_tasks_can_be_looked_at(run_once: Runner) -> None:
    """Debuggers, loggers and asyncio's debug mode ask a task's coroutine for these attributes."""

    async def a_child_of_this_name() -> None:
        await asyncio.sleep(0)

    async def main() -> None:
        asyncio.get_running_loop().set_debug(True)
        task = await green(lambda: asyncio.get_running_loop().create_task(a_child_of_this_name()))
        assert "a_child_of_this_name" in repr(task)
        assert "a_child_of_this_name" in task.get_coro().__qualname__  # type: ignore[union-attr]
        await asyncio.sleep(0)
        task.get_stack()
        assert asyncio.iscoroutine(task.get_coro())
        await task

    run_once(main())


# --- Eager tasks: Note [Whose step] in bridge.py --------------------------------------------------

eager = pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")


def eager_factory(loop: Any, coro: Any, **kwargs: Any) -> Any:
    """Make a task as `asyncio.eager_task_factory` does, with any argument that uvloop passes."""
    return asyncio.Task(coro, loop=loop, **{**kwargs, "eager_start": True})


def by_hand(coro: Any) -> asyncio.Task[Any]:
    return asyncio.Task(coro, loop=asyncio.get_running_loop(), eager_start=True)  # type: ignore[call-arg]


def by_a_factory_in_the_place_of_ours(coro: Any) -> asyncio.Task[Any]:
    """Replace our task factory, which was set before."""
    asyncio.get_running_loop().set_task_factory(eager_factory)
    return asyncio.create_task(coro)


def by_a_factory_around_ours(coro: Any) -> asyncio.Task[Any]:
    loop = asyncio.get_running_loop()
    ours: Any = loop.get_task_factory()

    def factory(loop: Any, coro: Any, **kwargs: Any) -> Any:
        return ours(loop, coro, **{**kwargs, "eager_start": True})

    loop.set_task_factory(factory)
    return asyncio.create_task(coro)


def by_a_factory_around_ours_that_is_wrapped(coro: Any) -> asyncio.Task[Any]:
    asyncio.get_running_loop().set_task_factory(None)
    bridge.make_child_tasks_green(asyncio.get_running_loop())
    by_a_factory_around_ours(_nothing()).cancel()
    bridge.make_child_tasks_green(asyncio.get_running_loop())
    return asyncio.create_task(coro)


async def _nothing() -> None:
    pass


def by_a_factory_within_ours(coro: Any) -> asyncio.Task[Any]:
    loop = asyncio.get_running_loop()
    loop.set_task_factory(eager_factory)
    bridge.make_child_tasks_green(loop)
    return loop.create_task(coro)


EAGERLY = [
    by_hand,
    by_a_factory_in_the_place_of_ours,
    by_a_factory_around_ours,
    by_a_factory_around_ours_that_is_wrapped,
    by_a_factory_within_ours,
]
if sys.version_info >= (3, 14):
    EAGERLY.append(lambda coro: asyncio.create_task(coro, eager_start=True))


async def _run(fn: Callable[[], Any]) -> Any:
    return await green(fn)


async def _drive(fn: Callable[[], Any]) -> Any:
    return await bridge.drive(_call(fn))


async def _portal(fn: Callable[[], Any]) -> Any:
    return await portal(_call(fn))


async def _run_later(fn: Callable[[], Any]) -> Any:
    await asyncio.sleep(0)
    return await green(fn)


def _portal_made_by_the_parent(fn: Callable[[], Any]) -> Any:
    return portal(_call(fn))


CALLS = [_run, _drive, _portal, _run_later, _portal_made_by_the_parent]


@eager
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
@pytest.mark.parametrize("start", EAGERLY, ids=lambda start: start.__name__)
def test_an_eager_task_waits_in_a_portal_of_its_own(run: Runner, start: Any, call: Any) -> None:
    """The parent and the loop go on while the eager task waits."""

    async def parent() -> list[str]:
        order: list[str] = []
        ready = asyncio.Event()
        me, mine = asyncio.current_task(), bridge.current()
        variable.set("parent's")

        def child() -> str:
            assert asyncio.current_task() is not me
            assert variable.get() == "parent's"
            variable.set("child's")
            assert bridge.current() is not mine and here().is_own()
            order.append("child waits")
            await_(ready.wait())
            assert asyncio.current_task() is task and here().is_own()
            assert variable.get() == "child's"
            order.append("child goes on")
            return "result"

        task = start(call(child))
        order.append("parent goes on")
        assert bridge.current() is mine and asyncio.current_task() is me
        await turns()
        pause()
        ready.set()
        assert await task == "result"
        assert variable.get() == "parent's"
        return order

    def other() -> int:
        for _ in range(20):
            pause()
        return 20

    async def main() -> None:
        order, count = await asyncio.gather(portal(parent()), green(other))
        first = "parent goes on" if call is _run_later else "child waits"
        assert order[0] == first
        assert sorted(order) == ["child goes on", "child waits", "parent goes on"]
        assert count == 20

    run(main())


@eager
@pytest.mark.parametrize("start", EAGERLY[2:], ids=lambda start: start.__name__)
def test_what_an_eager_task_calls_directly_is_green_where_our_factory_made_it(
    run: Runner, start: Any
) -> None:
    async def main() -> None:
        assert await start(_call(lambda: (pause(), here().is_own())[1]))

    run(portal(main()))


def wait_for_an_awaitable() -> None:
    async def never() -> None:
        raise AssertionError("it has begun")

    await_(never())


def wait_for_a_turn() -> None:
    Waiter().wait()


def wait_with_a_timeout() -> None:
    Waiter().wait(0.001)


def wait_for_a_future() -> None:
    here().wait_for(asyncio.get_running_loop().create_future())


def wait_for_later() -> None:
    here().suspend(None)


def wait_for_a_lock() -> None:
    lock = ParkingLock()
    lock.acquire()
    try:
        lock.acquire()
    finally:
        assert not lock._waiters


def wait_for_clean_up() -> None:
    finish(asyncio.sleep(0), 1.0)


WAITS = [
    *(wait_for_an_awaitable, wait_for_a_turn, wait_with_a_timeout, wait_for_a_future),
    *(wait_for_later, wait_for_a_lock, wait_for_clean_up),
]


@eager
@pytest.mark.parametrize("wait", WAITS, ids=lambda wait: wait.__name__)
@pytest.mark.parametrize("start", EAGERLY[:2], ids=lambda start: start.__name__)
def test_an_eager_task_never_waits_in_the_portal_of_another(
    run: Runner, start: Any, wait: Callable[[], None]
) -> None:
    """A task that began without the bridge's knowing is refused, with the cause and the cure."""

    async def parent() -> None:
        async def child() -> None:
            with pytest.raises(NotGreen, match=r"eagerly.*await pgbackend\.aio\.run"):
                wait()
            await asyncio.sleep(0)
            with pytest.raises(NotGreen):  # the task runs in no portal now
                await_(asyncio.sleep(0))
            await green(pause)

        await start(child())
        pause()

    run(portal(parent()))


@eager
@pytest.mark.parametrize("start", EAGERLY, ids=lambda start: start.__name__)
def test_eager_tasks_in_eager_tasks(run: Runner, start: Any) -> None:
    async def child(depth: int) -> list[Any]:
        await green(pause)
        tasks = [start(child(depth - 1)) for _ in range(2 if depth else 0)]
        mine = await green(lambda: (pause(), asyncio.current_task())[1])
        assert mine is asyncio.current_task()
        return [mine, *itertools.chain(*[await task for task in tasks])]

    async def main() -> None:
        assert len(set(await child(4))) == 31

    run(portal(main()))


@eager
@pytest.mark.parametrize("start", EAGERLY, ids=lambda start: start.__name__)
def test_how_eager_tasks_end(run: Runner, start: Any) -> None:
    def cancels_itself() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        pause()

    async def main() -> None:
        done = start(_run(lambda: "at once"))
        assert done.done() and done.result() == "at once"
        failed = start(_run(fails_at_once))
        assert failed.done() and type(failed.exception()) is KeyError
        itself = start(_run(cancels_itself))
        seen: list[str] = []

        def cleans_up() -> None:
            try:
                await_(asyncio.Event().wait())
            except asyncio.CancelledError:
                pause()
                seen.append("cleaned up")
                raise

        cancelled = start(_run(cleans_up))
        late = start(_run(fails))
        cancelled.cancel()
        await asyncio.wait([itself, cancelled, late])
        assert itself.cancelled() and cancelled.cancelled() and seen == ["cleaned up"]
        assert type(late.exception()) is KeyError
        assert here().is_own() and not here().pending
        pause()

    run(portal(main()))


@eager
@pytest.mark.parametrize("first", [True, False])
def test_structured_concurrency_with_eager_tasks(run: Runner, first: bool) -> None:
    """The eager factory is set before `TaskGroup`, `gather()` and `timeout()`, or in between."""

    async def child(number: int) -> int:
        pause()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await green(lambda: await_(asyncio.Event().wait()))
        return number

    async def view() -> None:
        if not first:
            asyncio.get_running_loop().set_task_factory(eager_factory)
            await asyncio.create_task(turns())
            bridge.make_child_tasks_green(asyncio.get_running_loop())
        assert await asyncio.gather(*map(child, range(5))) == list(range(5))
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(child(number)) for number in range(5)]
        assert [task.result() for task in tasks] == list(range(5))
        with pytest.raises(ExceptionGroup):
            async with asyncio.TaskGroup() as group:
                group.create_task(green(lambda: await_(asyncio.Event().wait())))  # type: ignore[arg-type]
                group.create_task(green(fails))  # type: ignore[arg-type]
        pause()

    async def main() -> None:
        if first:
            asyncio.get_running_loop().set_task_factory(eager_factory)
        await portal(view())

    run(main())


def test_a_factory_that_is_taken_away_comes_back_with_the_next_green_code(run: Runner) -> None:
    async def child() -> bool:
        return bridge.green() is not None

    async def main() -> None:
        await green(pause)
        asyncio.get_running_loop().set_task_factory(None)
        assert await portal(by_create_task(child))

    run(main())


def test_a_task_is_given_one_portal_by_factories_that_wrap_each_other(run: Runner) -> None:
    async def child() -> Any:
        pause()
        task = asyncio.current_task()
        assert task is not None
        return task.get_coro()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for _ in range(3):
            bridge.make_child_tasks_green(loop)
            factory: Any = loop.get_task_factory()
            loop.set_task_factory(lambda *args, f=factory, **kwargs: f(*args, **kwargs))
        coro: Any = await portal(by_create_task(child))
        assert type(coro) is GreenCoroutine
        assert type(coro._coro) is not GreenCoroutine

    run(main())


def test_code_in_another_context_of_the_same_task_may_wait(run: Runner) -> None:
    """Another task may go on with a coroutine that one task has begun, too."""

    def fn() -> None:
        for _ in range(3):
            contextvars.copy_context().run(pause)
            pause()

    async def main() -> None:
        await green(fn)
        await portal(_call(fn))
        begun = green(fn)
        assert begun.send(None) is None
        await asyncio.create_task(begun)

    run(main())


# --- Context variables ----------------------------------------------------------------------------


def test_context_variables_are_shared_both_ways(run: Runner) -> None:
    async def main() -> None:
        variable.set("task's")
        token = None

        def fn() -> contextvars.Token[str]:
            assert variable.get() == "task's"
            token = variable.set("greenlet's")
            pause()
            assert variable.get() == "greenlet's"
            return token

        token = await green(fn)
        assert variable.get() == "greenlet's"
        variable.reset(token)  # raises ValueError in any context but the one that set it
        assert variable.get() == "task's"

    run(main())


def test_a_token_of_the_task_can_be_reset_in_the_greenlet(run: Runner) -> None:
    async def main() -> None:
        token = variable.set("task's")

        def fn() -> None:
            pause()
            variable.reset(token)

        await green(fn)
        assert variable.get() == "unset"

    run(main())


def test_context_variables_of_a_thousand_tasks_do_not_mix(run: Runner) -> None:
    async def main() -> None:
        def fn(number: int) -> bool:
            variable.set(str(number))
            for _ in range(3):
                pause()
                if variable.get() != str(number):
                    return False
            return True

        assert all(await asyncio.gather(*(green(fn, number) for number in range(1000))))
        assert variable.get() == "unset"

    run(main())


# --- Cancellation ---------------------------------------------------------------------------------


def test_cancellation_is_raised_where_the_code_waits(run: Runner) -> None:
    async def main() -> None:
        seen: list[str] = []

        def fn() -> None:
            try:
                await_(asyncio.Event().wait())
            except asyncio.CancelledError:
                seen.append("cancelled at the wait")
                raise
            finally:
                pause()
                seen.append("finally could wait")

        task = asyncio.create_task(green(fn))
        await turns()
        task.cancel("enough")
        with pytest.raises(asyncio.CancelledError, match="enough"):
            await task
        assert task.cancelled()
        assert seen == ["cancelled at the wait", "finally could wait"]

    run(main())


def test_asyncio_timeout_works_in_green_code(run: Runner) -> None:
    async def body() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                (lambda: await_(asyncio.Event().wait()))()
        task = asyncio.current_task()
        assert task is not None and not task.cancelling()

    run(portal(body()))


def test_a_cancellation_that_was_held_back_is_never_swallowed(run: Runner) -> None:
    """The cancellation comes even if the function ends right after the block that held it back."""

    async def main() -> None:
        ready = asyncio.Event()

        def fn() -> str:
            here = bridge.current()
            assert here is not None
            with hold_cancellation():
                try:
                    await_(ready.wait())
                except asyncio.CancelledError as exc:
                    here.pending = exc
            return "result"

        for start in (lambda: green(fn), lambda: portal(_call(fn))):
            task = asyncio.create_task(start())
            await turns()
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()

    run(main())


async def _call(fn: Callable[[], Any]) -> Any:
    return fn()


def test_held_cancellation_is_delivered_at_the_end_of_a_postponing_block(run: Runner) -> None:
    async def main() -> None:
        seen: list[str] = []

        def fn() -> None:
            with postpone_delivery():
                finish(asyncio.sleep(0.01), 1.0)
                deliver_cancellation()
                seen.append("not delivered inside")
            seen.append("not reached")

        task = asyncio.create_task(green(fn))
        await turns()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert seen == ["not delivered inside"]

    run(main())


def test_finish_absorbs_repeated_cancellations_and_delivers_one(run: Runner) -> None:
    async def main() -> None:
        seen: list[str] = []
        release = asyncio.Event()

        async def clean_up() -> str:
            await release.wait()
            seen.append("cleaned up")
            return "result"

        def fn() -> None:
            assert finish(clean_up(), 5.0) == "result"
            seen.append("goes on")
            deliver_cancellation()
            seen.append("not reached")

        task = asyncio.create_task(green(fn))
        await turns()
        for _ in range(3):
            task.cancel()
            await turns()
        release.set()
        await asyncio.wait([task])
        assert task.cancelled()
        assert seen == ["cleaned up", "goes on"]

    run(main())


def test_finish_gives_up_when_its_budget_is_spent(run: Runner) -> None:
    async def forever() -> None:
        await asyncio.Event().wait()

    def fn() -> Any:
        return finish(forever(), 0.02)

    assert run(green(fn)) is None


def test_finish_raises_what_its_coroutine_raises(run: Runner) -> None:
    async def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(green(finish, fail(), 1.0))


# --- Closed and collected coroutines --------------------------------------------------------------


class Dropped:
    """Suspends a green function with a lock held, and records how the function ends."""

    def __init__(self) -> None:
        self.lock = ParkingLock()
        self.seen: list[str] = []

    def __call__(self) -> None:
        try:
            with self.lock:
                await_(asyncio.Event().wait())
        except GeneratorExit:
            self.seen.append("unwinds")
            raise
        finally:
            try:
                pause()
            except PortalClosed:
                self.seen.append("cannot wait")


@pytest.fixture(params=["run", "portal"])
def dropped(request: pytest.FixtureRequest) -> tuple[Dropped, Callable[[], Any]]:
    code = Dropped()
    return code, (lambda: green(code)) if request.param == "run" else lambda: portal(_call(code))


@pytest.mark.parametrize("end", ["close", "collect"])
def test_a_dropped_coroutine_unwinds_by_synchronous_means(
    run: Runner, dropped: tuple[Dropped, Callable[[], Any]], end: str
) -> None:
    code, start = dropped

    async def main() -> None:
        coro = start()
        coro.send(None)
        assert code.lock.locked()
        if end == "close":
            coro.close()
        else:
            del coro
            gc.collect()
        assert code.seen == ["unwinds", "cannot wait"]
        assert not code.lock.locked()

    run(main())


def test_a_coroutine_that_is_closed_before_its_first_step_does_nothing(run_once: Runner) -> None:
    async def child() -> None:
        raise AssertionError

    async def main() -> None:
        portal(child()).close()
        green(pause).close()

    run_once(main())


# --- ParkingLock and Waiter -----------------------------------------------------------------------


def test_a_parking_lock_is_fair(run: Runner) -> None:
    async def main() -> None:
        lock, order = ParkingLock(), []

        def fn(number: int) -> None:
            with lock:
                order.append(number)
                pause()
                pause()

        await asyncio.gather(*(green(fn, number) for number in range(20)))
        assert order == list(range(20))
        assert not lock.locked()

    run(main())


def test_a_cancelled_waiter_leaves_the_queue(run: Runner) -> None:
    async def main() -> None:
        lock, order = ParkingLock(), []

        def fn(number: int) -> None:
            with lock:
                order.append(number)

        lock.acquire()
        tasks = [asyncio.create_task(green(fn, number)) for number in range(3)]
        await turns()
        tasks[1].cancel()
        await turns()
        lock.release()
        await asyncio.wait(tasks)
        assert order == [0, 2]
        assert tasks[1].cancelled()
        assert not lock.locked()

    run(main())


def test_a_waiter_that_is_cancelled_after_it_was_served_hands_the_lock_on(run: Runner) -> None:
    """Release and cancellation come in one turn of the loop, in both orders."""

    async def main(cancel_first: bool) -> None:
        lock, order = ParkingLock(), []

        def fn(number: int) -> None:
            with lock:
                order.append(number)

        lock.acquire()
        tasks = [asyncio.create_task(green(fn, number)) for number in range(2)]
        await turns()
        if cancel_first:
            tasks[0].cancel()
            lock.release()
        else:
            lock.release()
            tasks[0].cancel()
        await asyncio.wait(tasks, timeout=5)
        assert order == [1]
        assert tasks[0].cancelled()
        assert not lock.locked()

    run(main(True))
    run(main(False))


@pytest.mark.parametrize("greenlets, threads", [(4, 4), (0, 4), (8, 1)])
def test_a_parking_lock_excludes_threads_and_greenlets_alike(
    run: Runner, greenlets: int, threads: int
) -> None:
    lock = ParkingLock()
    inside = 0
    most = 0
    count = 0

    def critical(wait: Callable[[], None]) -> None:
        nonlocal inside, most, count
        for _ in range(50):
            with lock:
                inside += 1
                most = max(most, inside)
                wait()
                count += 1
                inside -= 1

    async def main() -> None:
        others = [asyncio.to_thread(critical, lambda: None) for _ in range(threads)]
        await asyncio.gather(*others, *(green(critical, pause) for _ in range(greenlets)))

    run(main())
    assert (most, count) == (1, 50 * (greenlets + threads))
    assert not lock.locked()


class Between:
    """Calls `then` right after one method of a lock, as another thread might do."""

    def __init__(self, lock: Any, method: str, then: Callable[[], object]) -> None:
        self.lock, self.method, self.then = lock, method, then

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            result = getattr(self.lock, name)(*args)
            if name == self.method:
                self.method = ""
                self.then()
            return result

        return call


def test_a_lock_that_becomes_free_before_the_waiter_is_seen_is_taken(run: Runner) -> None:
    async def main() -> None:
        lock = ParkingLock()
        lock.acquire()
        lock._lock = Between(lock._lock, "acquire", lock.release)  # type: ignore[assignment]
        async with asyncio.timeout(2):
            await green(lock.acquire)
        assert lock.locked()
        lock.release()
        assert not lock.locked()

    run(main())


def test_a_waiter_that_comes_while_the_lock_is_let_go_is_served(run: Runner) -> None:
    async def main() -> None:
        lock = ParkingLock()
        lock.acquire()
        waiter = Waiter()
        late = functools.partial(lock._waiters.append, waiter)
        lock._lock = Between(lock._lock, "release", late)  # type: ignore[assignment]
        lock.release()
        assert waiter.wait(0) and lock.locked(), "the lock is the waiter's"
        lock.release()
        assert not lock.locked()

    run(main())


def test_a_waiter_times_out(run: Runner) -> None:
    def fn() -> None:
        assert Waiter().wait(0.01) is False

    fn()
    run.green(fn)


def test_code_that_is_closed_waits_for_no_future() -> None:
    refused: list[str] = []

    def wait_and_wait(future: asyncio.Future[None]) -> None:
        here = bridge.current()
        assert here is not None
        try:
            here.wait_for(future)
        except GeneratorExit:
            with pytest.raises(PortalClosed) as caught:
                here.wait_for(future)
            refused.append(str(caught.value))
            raise

    async def main() -> None:
        waiting = green(wait_and_wait, asyncio.get_running_loop().create_future())
        waiting.send(None)
        waiting.close()

    asyncio.run(main())
    assert refused == ["the task was dropped: nothing can be waited for any more"]


def test_a_waiter_that_was_woken_does_not_time_out(run: Runner) -> None:
    """The waiter is woken before it waits, more than once, by the same thread or another."""

    def fn() -> None:
        waiter = Waiter()
        waiter.wake()
        waiter.wake()
        assert waiter.wait(5) is True

    def woken_by_a_thread() -> None:
        waiter = Waiter()
        thread = threading.Thread(target=waiter.wake)
        thread.start()
        assert waiter.wait(5) is True
        thread.join()

    for test in (fn, woken_by_a_thread):
        test()
        run.green(test)


def test_waking_a_waiter_whose_loop_is_closed_does_nothing(run: Runner) -> None:
    waiter = run.green(Waiter)
    waiter.wake()


@pytest.fixture(autouse=True)
def _no_context_leaks() -> Iterator[None]:
    yield
    assert variable.get() == "unset"
