"""Cancellations of green code: held back while a transaction ends, and raised afterwards.

Note [Held cancellation]
A cancellation must not interrupt COMMIT or ROLLBACK. So a CancelledError that arrives inside of
`with hold_cancellation()` is kept in `Portal.pending`. `deliver_cancellation()` raises it later,
where the state of the connection is consistent again.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Coroutine, Generator
from typing import Any, TypeVar

from .bridge import current

T = TypeVar("T")


class hold_cancellation:  # noqa: N801 - reads as a statement
    """Hold back a cancellation that arrives in the `with` statement."""

    __slots__ = ("_portal",)

    def __enter__(self) -> None:
        self._portal = current()
        if self._portal is not None:
            self._portal.holding += 1

    def __exit__(self, *exc_info: object) -> None:
        if self._portal is not None:
            self._portal.holding -= 1


class hold_when_closed:  # noqa: N801 - reads as a statement
    """Hold a cancellation back while a generator that is closed leaves its context managers.

    Enter this before the other context managers. Its value is a context manager, too; enter that
    after the others, so that it sees first that the generator is being closed. Code that closes a
    generator by dropping the last reference to it cannot get an exception. So a cancellation is
    delivered later, at the end of the portal at the latest.
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
    """Postpone the delivery of a held-back cancellation to the end of the `with` statement.

    If `deliver` is False, the cancellation is delivered by a later `deliver_cancellation()`, or at
    the end of the portal.
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
    """Raise the cancellation that was held back, if there is one and it may be raised now."""
    here = current()
    if here is not None and here.pending is not None:
        here.deliver_cancellation()


def finish(coro: Coroutine[Any, Any, T], budget: float) -> T | None:
    """Run `coro` to its end in a new task, even if the caller's task is cancelled meanwhile.

    For clean-up that must not be interrupted. A cancellation of the caller's task is held back
    (Note [Held cancellation]). If `budget` seconds were not enough, the new task is cancelled; this
    returns None when that has ended it.
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
