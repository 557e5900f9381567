"""Provides the cases: tasks are sent in sync and green code, and from async code."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from django.db import transaction

from tests.packages.project import green
from tests.packages.workers.models import Done
from tests.packages.workers.queues import Queue, await_for, wait_for


class UndoError(Exception):
    pass


def new_name() -> str:
    return uuid4().hex


def tasks_are_done(queue: Queue) -> None:
    """Send the sync task and the async one, ten of each at once."""
    sent = [queue.send(task, new_name()) for task in [queue.save, queue.asave] * 10]
    assert [wait_for(lambda each=each: queue.result(each)) for each in sent] == [1] * 20


def a_task_fails_and_its_block_is_undone(queue: Queue) -> None:
    name = new_name()
    sent = queue.send(queue.fail, name)
    assert wait_for(lambda: queue.result(sent)) == "failed"
    assert not Done.objects.filter(name=name).exists()


def a_task_is_sent_when_the_block_is_committed(queue: Queue) -> None:
    """Its row is there when the task asks for it."""
    sent: list[Any] = []
    name = new_name()
    with transaction.atomic():
        Done.objects.create(name=f"{name} first", pid=0, session=0)
        transaction.on_commit(lambda: sent.append(queue.send(queue.save, name)))
        assert not sent
    assert wait_for(lambda: queue.result(sent[0])) == 1


def a_block_that_is_undone_sends_nothing(queue: Queue) -> None:
    """Queues in the database need no `on_commit()` for that."""
    name, other = new_name(), new_name()
    try:
        with transaction.atomic():
            if queue.package == "celery":
                transaction.on_commit(lambda: queue.send(queue.save, name))
            else:
                queue.send(queue.save, name)
            raise UndoError
    except UndoError:
        pass
    sent = queue.send(queue.save, other)
    assert wait_for(lambda: queue.result(sent)) == 1
    assert not Done.objects.filter(name=name).exists()


CASES = [
    tasks_are_done,
    a_task_fails_and_its_block_is_undone,
    a_task_is_sent_when_the_block_is_committed,
    a_block_that_is_undone_sends_nothing,
]


async def asend(queue: Queue, task: Any, name: str) -> Any:
    if queue.asend is None:
        return await green(queue.send, task, name)
    return await queue.asend(task, name)


async def tasks_are_sent_and_awaited(queue: Queue) -> None:
    sent = [await asend(queue, task, new_name()) for task in [queue.save, queue.asave] * 5]
    for each in sent:
        assert await await_for(lambda each=each: green(queue.result, each)) == 1


async def an_async_block_that_is_undone_sends_nothing(queue: Queue) -> None:
    name, other, hooked = new_name(), new_name(), new_name()
    try:
        async with transaction.atomic():
            if queue.package != "celery":
                await asend(queue, queue.save, name)
            transaction.on_commit(lambda: queue.send(queue.save, name))
            raise UndoError
    except UndoError:
        pass
    sent: list[Any] = []
    async with transaction.atomic():
        transaction.on_commit(lambda: sent.append(queue.send(queue.save, hooked)))
    sent.append(await asend(queue, queue.save, other))
    for each in sent:
        assert await await_for(lambda each=each: green(queue.result, each)) == 1
    assert not await Done.objects.filter(name=name).aexists()


ASYNC_CASES = [tasks_are_sent_and_awaited]
ASYNC_CASES_HERE = [an_async_block_that_is_undone_sends_nothing]
