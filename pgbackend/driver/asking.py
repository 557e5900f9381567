"""Arguments of connections, and how functions that return them are called.

A pool asks for the arguments of each new connection. A function that may block is called in a
thread of its own, while the event loop goes on. The threads are daemons: a function that never
returns does not keep the process from ending. Nor does it take ever more threads: while
`MOST_OVERDUE` calls have not returned although nobody waits for them any more, no other is made.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any, TypeVar

from .errors import OptionFailed
from .forks import after_fork

T = TypeVar("T")

#: How many calls of one function may be running although the tasks that waited have given up.
MOST_OVERDUE = 2


class ConnectArguments(dict[str, Any]):
    """A dict of arguments of `connect()`; its repr, which tracebacks may show, omits the values."""

    def __repr__(self) -> str:
        return f"<arguments {', '.join(self)}>"

    def copy(self) -> ConnectArguments:
        """Return a copy of the same class; psycopg_pool makes one."""
        return ConnectArguments(self)


class _Home(threading.local):
    """The event loop for which the running thread calls a function; None in other threads."""

    loop: asyncio.AbstractEventLoop | None = None


_home = _Home()


def loop_of_thread() -> asyncio.AbstractEventLoop | None:
    """Return the event loop for which the running thread calls a function, or None."""
    return _home.loop


class _Call:
    """A call of a function in a thread of its own."""

    def __init__(self, where: str, function: Callable[[], Any]) -> None:
        self.where = where
        self.began = monotonic()
        #: Whether the task that waited for the result has given up.
        self.given_up = False
        self._function = function
        self._loop = asyncio.get_running_loop()
        self.result: asyncio.Future[Any] = self._loop.create_future()

    def start(self) -> None:
        """Call the function in a new thread; raise `RuntimeError` if no thread can be started."""
        _running.add(self)
        try:
            name = f"pgbackend asks {self.where}"
            threading.Thread(target=self._run, name=name, daemon=True).start()
        except BaseException:
            _running.discard(self)  # it would count as a call that never returns
            raise

    def _run(self) -> None:
        """Call the function, and tell the loop its result."""
        _home.loop = self._loop
        value = raised = None
        try:
            value = self._function()
        except BaseException as exc:
            raised = exc
        _running.discard(self)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._settle, value, raised)
        del value, raised, self._function

    def _settle(self, value: Any, raised: BaseException | None) -> None:
        if self.result.done():
            return
        if raised is None:
            self.result.set_result(value)
        elif isinstance(raised, Exception) and not isinstance(raised, StopIteration):
            self.result.set_exception(raised)
        else:  # a future takes no StopIteration, and a SystemExit would end the loop
            error = RuntimeError(f"it raised {type(raised).__name__}")
            error.__cause__ = raised
            self.result.set_exception(error)


#: The calls whose function has not returned.
_running: set[_Call] = set()


@after_fork
def _forget_calls() -> None:
    _running.clear()  # the threads are the parent's


async def call_in_thread(where: str, function: Callable[[], T]) -> T:
    """Call `function` in a new thread, and return its result; `where` names it in messages.

    Raises the exception of the function. Raises `OptionFailed`, and calls nothing, while
    `MOST_OVERDUE` earlier calls have not returned.
    """
    overdue = [call for call in list(_running) if call.where == where and call.given_up]
    if len(overdue) >= MOST_OVERDUE:
        oldest = monotonic() - min(call.began for call in overdue)
        raise OptionFailed(
            f"the function {where} is not called again: {len(overdue)} earlier calls have not "
            f"returned, the oldest for {oldest:.0f} s. Let it end by a timeout of its own"
        )
    call = _Call(where, function)
    try:
        call.start()
        result: T = await call.result
        return result
    finally:
        call.given_up = True
        del call  # else a cycle: an exception, its traceback, this frame, the future
