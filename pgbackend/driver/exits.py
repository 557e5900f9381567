"""Lets the event loops of daemon threads stand still before the interpreter ends.

Before Python 3.14, a daemon thread that needs the interpreter while the interpreter ends is ended
on the spot by ``pthread_exit()``, which unwinds the thread's C stack. If green code runs in the
thread, its stack has C++ frames of greenlet, whose destructors call the interpreter: the process
crashes. So each loop is made to sleep in a callback, where no green code is on the stack. (From
3.14 on, such a thread waits for ever, and nothing needs to be done.)
"""

from __future__ import annotations

import asyncio
import atexit
import sys
import threading
import weakref
from time import monotonic

from .forks import after_fork

#: Seconds for which the end of the interpreter waits for all loops to stand still.
WAIT = 1.0

#: Seconds for which a loop stands still. The process should end within them; a loop goes on if it
#: does not, because an exit handler that is called later takes longer, or waits for the loop.
STANDSTILL = 1.0

_loops: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()
after_fork(_loops.clear)  # a child lacks the threads of these loops, and would wait for them


def stand_still_at_exit(loop: asyncio.AbstractEventLoop) -> None:
    """Register `loop`, which runs green code, to stand still when the interpreter begins to end."""
    _loops.add(loop)


def _stand_still() -> None:
    """Make each running loop sleep in a callback; return when all do, or after `WAIT` seconds."""
    here = asyncio._get_running_loop()
    standing = [_ask(loop) for loop in list(_loops) if loop.is_running() and loop is not here]
    deadline = monotonic() + WAIT
    for each in standing:
        each.wait(max(0.0, deadline - monotonic()))


def _ask(loop: asyncio.AbstractEventLoop) -> threading.Event:
    stands = threading.Event()
    try:
        loop.call_soon_threadsafe(_stand, stands)
    except RuntimeError:  # it was closed meanwhile
        stands.set()
    return stands


def _stand(stands: threading.Event) -> None:
    stands.set()
    threading.Event().wait(STANDSTILL)


if sys.version_info < (3, 14):
    atexit.register(_stand_still)
