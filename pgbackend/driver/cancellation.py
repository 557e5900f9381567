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
    """A context manager that holds back a cancellation which arrives inside; see the Note above."""

    __slots__ = ("_portal",)

    def __enter__(self) -> None:
        self._portal = current()
        if self._portal is not None:
            self._portal.holding += 1

    def __exit__(self, *exc_info: object) -> None:
        if self._portal is not None:
            self._portal.holding -= 1


class hold_when_closed:  # noqa: N801 - reads as a statement
    """Hold back a cancellation while a generator that is closed leaves its context managers.

    It is entered before the others, and its value, a second context manager, after them::

        with hold_when_closed() as closed, others(), closed:
            yield

    `closed` is left first, and sees if the generator is being closed. From then on, until the
    others are left, a cancellation is held back. It is delivered later, at the end of the portal at
    the latest: code that closes a generator by dropping the last reference to it cannot get an
    exception.
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
    """A context manager: `deliver_cancellation()` does nothing inside, but is called at the end.

    If `deliver` is False, it is not called: a cancellation that was held back is then raised by a
    later `deliver_cancellation()`, or at the end of the portal.
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
    """Raise the cancellation that was held back in the caller's portal, if there is one.

    Does nothing inside `with hold_cancellation()` or `with postpone_delivery()`.
    """
    here = current()
    if here is not None and here.pending is not None:
        here.deliver_cancellation()


def finish(coro: Coroutine[Any, Any, T], budget: float) -> T | None:
    """Run `coro` in a new task and wait for its end, even if the caller's task is cancelled.

    For clean-up that must not be interrupted. A cancellation of the caller's task is held back
    (Note [Held cancellation]). If `coro` takes longer than `budget` seconds, its task is cancelled;
    once that has ended, this returns None.
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
