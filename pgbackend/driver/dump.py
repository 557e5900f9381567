"""A text of what this process does with its databases: pools, leases, queues, and portals.

`text()` may be called in any thread, also while the code of a loop hangs: it waits for nothing,
takes no lock, and sends nothing. It contains no SQL, no values of variables and no settings.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from time import monotonic
from typing import Any

from . import holding, loops, naming, snapshots, stacks
from .coroutines import name_of
from .pool import Pool
from .snapshots import thread_name


def text() -> str:
    """Return a description of the pools, their leases and queues, and each portal's stack."""
    pools = loops.open_pools()
    now = datetime.now(UTC).astimezone().isoformat(" ", "seconds")
    lines = [f"pgbackend in process {os.getpid()}, {now}"]
    for pool in pools:
        lines += ["", *_of_pool(pool)]
    for hub in loops.open_hubs():
        of_thread = f"Listening on {hub.name!r} in thread {thread_name(hub.thread)}"
        lines += ["", f"{of_thread}: {hub.described()}"]
    for thread in sorted({*stacks.threads_of_portals(), *(pool.thread for pool in pools)}):
        lines += _of_thread(thread, pools)
    return "\n".join(lines) + "\n"


def _of_pool(pool: Pool) -> Iterator[str]:
    s = pool.statistics()
    yield (
        f"Pool {pool.name!r} in thread {thread_name(pool.thread)}: {s.leased}{s.of_most()} leased, "
        f"{s.idle} free, {s.size} open or being opened, {s.waiting} waiting"
    )
    if late := pool.pulse.overdue():
        yield f"  Its event loop has been blocked for {late:.2f} s"
    for said in pool.connecting():
        yield f"  Connecting: {said}"
    for hold in snapshots.holds(pool):
        yield f"  Leased, server process {hold.server_process}: {hold}"
    for wait in snapshots.waits(pool):
        yield f"  Waiting: {wait}"


def _named(task: asyncio.Task[Any], stack: stacks.Stack) -> str:
    return naming.task_and_request(task, stack.context())


def _of_thread(thread: int, pools: list[Pool]) -> Iterator[str]:
    """Describe the portals of `thread`, and the tasks that hold leases or wait without one."""
    portals = stacks.working_portals(thread)
    pools = [pool for pool in pools if pool.thread == thread]
    on = {pool.loop for pool in pools} | {each.loop for each in portals if each.loop is not None}
    concerned = {lease.task for pool in pools for lease in pool.held()}
    concerned |= {task for pool in pools for task in pool.queued()}
    told: set[int] = set()
    for loop in on:
        tasks = [] if loop.is_closed() else asyncio.all_tasks(loop)
        for task in sorted(tasks, key=lambda task: task.get_name()):
            stack = stacks.of_task(task, thread)
            if not stack.portals and task not in concerned:
                continue
            told.update(map(id, stack.portals))
            kind = "Portal" if stack.portals else "Task"
            yield ""
            yield (
                f"{kind} of {_named(task, stack)} in thread {thread_name(thread)}: "
                + _state(task, pools)
            )
            yield from _lines(stack)
    for portal in portals:
        if id(portal) not in told:
            yield ""
            yield f"Portal of an unknown task in thread {thread_name(thread)}"
            yield from _lines(stacks.of_portal(portal))


def _state(task: asyncio.Task[Any], pools: list[Pool]) -> str:
    """Return what `task` waits for."""
    if asyncio.current_task(task.get_loop()) is task:
        return "runs"
    future = getattr(task, "_fut_waiter", None)
    if future is None or future.done():
        return "is about to run"
    for pool in pools:
        if task in pool.queued():
            return f"waits for a connection of {pool.name!r}"
        for lease in pool.held():
            if lease.physical.watch.future is future:
                age = monotonic() - holding.since(lease)
                pid = lease.physical.pid()
                return f"waits for the server's reply for {age:.2f} s (process {pid})"
    return _awaited(future)


def _awaited(future: asyncio.Future[Any]) -> str:
    """Return what `future` stands for, for a task that waits for it."""
    if isinstance(future, asyncio.Task):
        return f"waits for the task {naming.task_and_request(future)}"
    if children := [each for each in getattr(future, "_children", ()) if not each.done()]:
        named = (name_of(each) for each in children if isinstance(each, asyncio.Task))
        return f"waits for {len(children)} at once: {', '.join(map(repr, named))}"
    return f"waits for a {type(future).__name__}"


def _lines(stack: stacks.Stack) -> Iterator[str]:
    for place in stack.places:
        yield f'  File "{place.file}", line {place.line}, in {place.function}'
