"""Interrupts an operation at every point where it waits.

`sweep()` runs an operation again and again, and interrupts it at the first wait, at the second, and
so on, until it ends uninterrupted. After each run the same facts must hold; they are checked in one
place. The modes are ways of interrupting: four ways to cancel the operation's task, and two in
which nobody steps its coroutine any more.
"""

from __future__ import annotations

import asyncio
import gc
import types
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass
from typing import Any

#: Seconds in which an interrupted operation must end.
AT_MOST = 1.5

#: Called at each wait, with its number, the awaited future and the task. It returns "close" or
#: "drop" to have the coroutine closed, or forgotten, at this wait.
Interrupt = Callable[[int, Any, "asyncio.Task[Any]"], str | None]
Mode = Callable[[int], Interrupt]

ABANDONED = object()


def early(at: int) -> Interrupt:
    """Cancel as the task begins its wait number `at`."""

    def interrupt(number: int, waits_for: Any, task: asyncio.Task[Any]) -> None:
        if number == at:
            task.cancel()

    return interrupt


def late(at: int) -> Interrupt:
    """Cancel after the awaited future is done, in the same turn of the loop."""

    def interrupt(number: int, waits_for: Any, task: asyncio.Task[Any]) -> None:
        if number != at:
            return
        if waits_for is None:
            asyncio.get_running_loop().call_soon(task.cancel)
        else:  # comes before the task's own callback, which wakes it
            waits_for.add_done_callback(lambda _: task.cancel())

    return interrupt


def twice(at: int) -> Interrupt:
    """Cancel as the wait begins, and again at the next one, which is in the clean-up."""

    def interrupt(number: int, waits_for: Any, task: asyncio.Task[Any]) -> None:
        if number in (at, at + 1):
            task.cancel()

    return interrupt


def stubbornly(at: int) -> Interrupt:
    """Cancel as the wait begins, and at every wait after it."""

    def interrupt(number: int, waits_for: Any, task: asyncio.Task[Any]) -> None:
        if number >= at:
            task.cancel()

    return interrupt


def close(at: int) -> Interrupt:
    """Close the coroutine in its wait, as a generator is closed that nobody iterates any more."""
    return lambda number, waits_for, task: "close" if number == at else None


def drop(at: int) -> Interrupt:
    """Forget the coroutine in its wait, so that the garbage collector finds it."""
    return lambda number, waits_for, task: "drop" if number == at else None


CANCELLING: list[Mode] = [early, late, twice, stubbornly]
ABANDONING: list[Mode] = [close, drop]


@types.coroutine
def observed(
    coro: Coroutine[Any, Any, Any], interrupt: Interrupt, waits: list[Any]
) -> Generator[Any, Any, Any]:
    """Await `coro`, and call `interrupt` at each wait."""
    value: Any = None
    thrown: BaseException | None = None
    while True:
        try:
            waits_for = coro.send(value) if thrown is None else coro.throw(thrown)
        except StopIteration as stop:
            return stop.value
        finally:
            thrown = None  # its traceback refers to this frame
        task = asyncio.current_task()
        assert task is not None
        verdict = interrupt(len(waits), waits_for, task)
        del task  # will refer to this frame, by the traceback of its cancellation
        waits.append(waits_for)
        if verdict is not None:
            if verdict == "close":
                coro.close()
            del coro, waits_for
            waits[-1] = None
            gc.collect()
            return ABANDONED
        value = None
        try:
            value = yield waits_for
        except BaseException as exc:
            thrown = exc


async def as_coroutine(awaitable: Any) -> Any:
    return await awaitable


@dataclass
class Outcome:
    """Tells how one run of an operation ended."""

    at: int
    task: asyncio.Task[Any]

    @property
    def cancelled(self) -> bool:
        return self.task.cancelled()

    @property
    def interrupted(self) -> bool:
        return self.task.cancelled() or self.task.result() is ABANDONED


async def sweep(
    operation: Callable[[], Coroutine[Any, Any, Any]],
    mode: Mode,
    check: Callable[[Outcome], Coroutine[Any, Any, None]],
    at_most: float = AT_MOST,
) -> int:
    """Interrupt `operation` at each of its waits in turn; return how many there were."""
    for at in range(300):
        waits: list[Any] = []
        task = asyncio.create_task(as_coroutine(observed(operation(), mode(at), waits)))
        _, pending = await asyncio.wait([task], timeout=at_most)
        assert not pending, f"not ended {at_most} s after its interruption at wait {at}"
        if not task.cancelled() and task.exception() is not None:
            task.result()
        outcome = Outcome(at, task)
        # A late cancellation may find the task done: other tasks' turns come between.
        assert outcome.interrupted or not task.cancelling(), f"swallowed at wait {at}"
        await check(outcome)
        if len(waits) <= at:
            await task
            return at
        waits.clear()
    raise AssertionError("the operation never ends uninterrupted")
