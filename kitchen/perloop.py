"""Keeps one object for each event loop: all requests of a server process share it.

An HTTP client, a listening connection and a running rush belong to the loop they were made on. A
server has one loop, so a process has one object of each kind; tests and scripts may have several.
"""

import asyncio
from weakref import WeakKeyDictionary

_kinds = []


class PerLoop:
    """Makes an object at its first use on a loop; ``close()`` closes it when the server stops."""

    def __init__(self, make):
        self._make = make
        self._made = WeakKeyDictionary()
        _kinds.append(self)

    def get(self):
        loop = asyncio.get_running_loop()
        if loop not in self._made:
            self._made[loop] = self._make()
        return self._made[loop]

    def pop(self):
        return self._made.pop(asyncio.get_running_loop(), None)


async def close():
    """Close everything that was made on the running loop, the youngest kind first."""
    for kind in reversed(_kinds):
        made = kind.pop()
        if made is not None:
            await made.aclose()
