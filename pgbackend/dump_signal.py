"""Prints `pgbackend.dump()` to standard error when the process gets a signal, if a setting says so.

`PGBACKEND_DUMP_SIGNAL` names the signal. Python calls the handler in the main thread, at any point
of the program, where it may hold locks of its own. So the handler only wakes a thread, which makes
the text and prints it. Code that holds up the event loop does not hold up that thread.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import threading
import traceback
from types import FrameType
from typing import Any

from . import conf
from .driver import dump
from .driver.forks import after_fork

#: What the handler puts here wakes the thread. This kind of queue is made for signal handlers.
_asked: queue.SimpleQueue[None] = queue.SimpleQueue()
#: The handler that the program had before for the signal; it is called, too.
_before: Any = None
_installed = False


def install() -> None:
    """Install the handler, if the setting names a signal and the caller is in the main thread."""
    global _before, _installed  # noqa: PLW0603 - a process has one handler of a signal
    wanted = conf.dump_signal()
    if wanted is None or _installed or threading.current_thread() is not threading.main_thread():
        return
    _before = signal.signal(wanted, _handle)
    _installed = True
    _start()


def _handle(number: int, frame: FrameType | None) -> None:
    _asked.put(None)
    if callable(_before):
        _before(number, frame)


def _start() -> None:
    threading.Thread(target=_print, name="pgbackend.dump", daemon=True).start()


def _print() -> None:
    while True:
        _asked.get()
        _print_once()


def _print_once() -> None:
    """Print the dump; if it cannot be made or printed, the thread lives on for the next signal."""
    try:
        text = dump.text()
    except Exception:
        text = f"pgbackend could not make the dump: {traceback.format_exc()}"
    rest = text.encode(errors="backslashreplace")
    with contextlib.suppress(OSError):  # standard error may be closed
        while rest:  # without Python's own buffers, whose locks a hanging thread may hold
            rest = rest[os.write(2, rest) :]


@after_fork
def _start_again() -> None:
    """Start the thread in a forked child, which has the handler only."""
    global _asked  # noqa: PLW0603 - the parent's queue may be locked
    if _installed:
        _asked = queue.SimpleQueue()
        _start()
