"""Finds deadlocks: tasks that hold connections and wait for each other's.

A task in the queue of a full pool waits for any of the tasks that hold connections of that pool.
Such a holder may be in a queue itself, or await tasks that are. If all tasks that can be reached in
this way wait, and the task that enters the queue is one of them, no connection will ever become
free for that task.

Only a certain deadlock counts: a holder that waits for anything else, or is about to run, may give
its connection back. So the search, which is made when a task enters a queue, ends with the result
"none" at the first such holder.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

Task: TypeAlias = "asyncio.Task[Any]"

#: Returns the tasks that hold the connections of the pool in whose queue a task is (an unknown
#: holder is None); returns None if the task is in no queue.
Queued: TypeAlias = Callable[[Task], "Iterable[Task | None] | None"]


def find(asking: Task, holders: Iterable[Task | None], queued: Queued) -> set[Task] | None:
    """Return the tasks that are in a deadlock once `asking` waits for `holders`; else None.

    `holders` hold the connections of the pool that `asking` wants one of.
    """
    found: set[Task] = set()
    todo = list(holders)
    while todo:
        task = todo.pop()
        if task is asking or task in found:
            found.add(task)
            continue
        blockers = _blockers(task, queued)
        if task is None or not blockers:
            return None
        found.add(task)
        todo += blockers
    return found if asking in found else None


def waits_for(task: Task | None, future: asyncio.Future[Any] | None) -> bool:
    """Return whether `future` is the one that `task` awaits right now."""
    return future is not None and getattr(task, "_fut_waiter", None) is future


def _blockers(task: Task | None, queued: Queued) -> list[Task | None]:
    """Return the tasks that `task` waits for: until one of them goes on, `task` cannot.

    The list is empty if `task` is in no certain deadlock: it is unknown, is about to run, or waits
    for anything but other tasks or a connection of a pool.
    """
    future: asyncio.Future[Any] | None = getattr(task, "_fut_waiter", None)
    if task is None or future is None or future.done():
        return []
    holders = queued(task)
    if holders is not None:
        return list(holders)
    if isinstance(future, asyncio.Task):
        return [future]
    # gather() and TaskGroup end early if a task of theirs fails: so each of these can end the wait.
    awaited = getattr(future, "_children", None) or _group_of(task)
    return [one for one in awaited if not one.done()]


def _group_of(task: Task) -> Iterable[Task]:
    """Return the tasks of the `TaskGroup` whose end `task` waits for; else an empty tuple."""
    coro: Any = task.get_coro()
    while hasattr(inner := getattr(coro, "cr_await", None), "cr_frame"):
        coro = inner
    frame = getattr(coro, "cr_frame", None)
    if frame is None or frame.f_globals.get("__name__") != "asyncio.taskgroups":
        return ()
    tasks: Iterable[Task] = frame.f_locals["self"]._tasks  # noqa: SLF001
    return tasks
