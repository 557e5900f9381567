"""Warns of code that holds the event loop: tells the request, and the stack while it blocks.

Each request that asgi.py serves is watched, if the setting `PGBACKEND_SLOW_STEP` is on, or if the
loop is in asyncio's debug mode. A watched request notes when each of its steps begins and ends, and
so do the tasks that it starts. A thread, the watchdog, looks several times within the bound; if a
step has lasted too long, it logs the stack of the loop's thread to the logger `pgbackend.blocking`.
asyncio's own debug mode tells only afterwards, and without a stack, that a step was slow.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator
from types import FrameType
from typing import Any, Self

from . import conf
from .driver import coroutines, pulse
from .driver.forks import after_fork

_logger = logging.getLogger("pgbackend.blocking")

#: `PGBACKEND_SLOW_STEP`, as it was when a handler last loaded its middleware.
_bound: float | None = None


def read_setting() -> None:
    """Read the setting `PGBACKEND_SLOW_STEP`."""
    global _bound  # noqa: PLW0603 - a process has one set of settings
    _bound = conf.slow_step()


def bound() -> float | None:
    """Return how many seconds a step may last before a warning; None: the request is not watched.

    In asyncio's debug mode that is the loop's `slow_callback_duration`, if no setting says more.
    """
    if _bound is not None:
        return _bound or None
    loop = asyncio.get_running_loop()
    return loop.slow_callback_duration if loop.get_debug() else None


class _Step:
    """A step of a request: the loop runs nothing else until it ends."""

    __slots__ = ("bound", "since", "told", "what")

    def __init__(self, what: str, bound: float) -> None:
        self.what = what
        self.bound = bound
        self.since = time.monotonic()
        self.told = False


#: The running step of each loop's thread, by the thread's identifier.
_steps: dict[int, _Step] = {}


#: When a step was last warned of, by `time.monotonic()`, and its request, by the loop's thread.
_last_told: dict[int, tuple[float, str]] = {}


class Watched:
    """An awaitable that runs `coro`, code of the request `what`, and notes its steps.

    `coro` drives a portal: its steps end where green code waits.
    """

    def __init__(self, coro: Any, what: str, bound: float) -> None:
        self._coro = coro
        self._what = what
        self._bound = bound
        _watchdog.start(bound)

    def send(self, value: object) -> object:
        return self._step(self._coro.send, value)

    def throw(self, *args: Any) -> object:
        try:
            return self._step(self._coro.throw, *args)
        finally:
            del args  # the traceback of the exception refers to this frame

    def close(self) -> None:
        self._coro.close()

    def inner_coroutine(self) -> object:
        """Return what this steps, for the stack of the task."""
        return self._coro

    def __await__(self) -> Generator[Any, Any, Any]:
        return self  # has what `await` needs of a generator

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> object:
        return self._step(self._coro.send, None)

    def _step(self, go_on: Callable[..., object], *args: Any) -> object:
        here = threading.get_ident()
        outer = _steps.get(here)
        _steps[here] = _Step(self._what, self._bound)
        try:
            return go_on(*args)
        finally:
            del args
            if outer is None:
                _steps.pop(here, None)
            else:  # a request inside another one's step
                _steps[here] = outer


def _watch_task(drive: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a `drive()` that watches the steps of a new green task, if a request makes it."""
    step = _steps.get(threading.get_ident())
    if step is None:
        return drive
    what, bound = step.what, step.bound

    def watched(coro: Any) -> Any:
        driven = drive(coro)
        # What is in a portal already is no task of its own, but a part of the task around it.
        return driven if driven is coro else Watched(driven, what, bound)

    return watched


class _Watchdog:
    """The thread that looks at `_steps`; it ends when no request was watched for some seconds."""

    #: How many seconds after the last watched request began the thread ends, if none runs a step.
    IDLE = 5.0
    #: How often it looks within the shortest bound.
    LOOKS = 4

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._bound = 0.0
        self._last = 0.0

    def start(self, bound: float) -> None:
        """Have steps looked at; the longest that may last without a warning is `bound` seconds."""
        self._last = time.monotonic()
        if self._thread is not None and bound >= self._bound:
            return
        with self._lock:
            self._bound = bound if self._thread is None else min(bound, self._bound)
            if self._thread is None:
                coroutines.around_drive = _watch_task
                self._stopping.clear()
                self._thread = threading.Thread(
                    target=self._run, name="pgbackend.blocking", daemon=True
                )
                self._thread.start()

    def stop(self) -> None:
        """End the thread, and wait for its end; the next watched request starts another."""
        with self._lock:
            thread, self._thread = self._thread, None
            coroutines.around_drive = None
            self._stopping.set()
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(self._bound / self.LOOKS):
            for ident, step in list(_steps.items()):
                if not step.told and time.monotonic() - step.since > step.bound:
                    _warn(ident, step)
            with self._lock:
                if not _steps and time.monotonic() - self._last > self.IDLE:
                    self._thread = coroutines.around_drive = None
                    return


_watchdog = _Watchdog()
stop = _watchdog.stop


def _warn(ident: int, step: _Step) -> None:
    frame = sys._current_frames().get(ident)  # noqa: SLF001 - documented
    if frame is None or _steps.get(ident) is not step:
        return  # it has ended meanwhile: the stack would be of other code
    lasts = time.monotonic() - step.since
    step.told = True
    _last_told[ident] = time.monotonic(), step.what
    _logger.warning(
        "%s has held the event loop for %.2f s, and still does: no other request is served "
        "meanwhile. Code that blocks belongs in a thread: in an async function 'await "
        "asyncio.to_thread(f, ...)', in a sync one 'async_to_sync(asyncio.to_thread)(f, ...)'. It "
        "is here:\n%s",
        step.what,
        lasts,
        _stack(frame),
    )


def blocker(since: float) -> str | None:
    """Return the request that was last warned of in this thread after `since`, or None."""
    told_at, what = _last_told.get(threading.get_ident(), (0.0, ""))
    return what if told_at >= since and what else None


pulse.blocker = blocker  # for the error of those who wait for a connection meanwhile


def _stack(frame: FrameType) -> str:
    return "".join(traceback.format_stack(frame)).rstrip()


@after_fork
def _forget_watchdog() -> None:
    """Forget, in a forked child, the thread, which the child does not have."""
    _steps.clear()
    _last_told.clear()
    _watchdog.__init__()  # type: ignore[misc]
