"""Calls functions on the event loop of an object, from any thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class AtHome:
    """A base of objects that belong to an event loop, and may be told something elsewhere."""

    loop: asyncio.AbstractEventLoop

    def call_at_home(self, func: Callable[[], None]) -> bool:
        """Make the object's loop call `func` soon; return False if the loop is closed."""
        try:
            self.loop.call_soon_threadsafe(func)
        except RuntimeError:
            return False
        return True
