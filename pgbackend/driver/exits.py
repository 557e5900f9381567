"""Lets the event loops of daemon threads stand still before the interpreter ends.

Before Python 3.14, a daemon thread that needs the interpreter while that ends is ended where it
stands, by ``pthread_exit()``. This unwinds its C stack; and if green code runs in the thread, there
are C++ frames of greenlet on it, whose destructors call the interpreter: the process crashes. (From
3.14 on, such a thread waits for ever.)
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

#: Seconds for which a loop stands still. By then the process has ended, unless something that is
#: called at exit later takes longer, or waits for the loop.
STANDSTILL = 1.0

_loops: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()
after_fork(_loops.clear)  # their threads are not in the child, and would be waited for


def stand_still_at_exit(loop: asyncio.AbstractEventLoop) -> None:
    """Let `loop`, on which green code runs, stand still outside of it when the interpreter ends."""
    _loops.add(loop)


def _stand_still() -> None:
    """Wait until each loop that runs has come to where no green code is on its thread's stack."""
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
