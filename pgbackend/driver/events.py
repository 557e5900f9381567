"""Defines the events of a pool, as frozen records, and the hooks that are called for them.

A hook is called in the thread of the event loop and must not block. Its result is ignored; an
exception in a hook is logged and does not reach the code that uses the connection.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol, TypeAlias

logger = logging.getLogger("pgbackend.driver")


@dataclass(frozen=True, slots=True)
class Leased:
    """The event that a task took a connection out of the pool."""

    pool: str
    """The pool's name: the alias of the database."""
    backend_pid: int
    """The process id of the server process that serves the connection."""
    waited: float
    """How long the task waited for the connection, in seconds."""


@dataclass(frozen=True, slots=True)
class Released:
    """The event that a connection went back to the pool."""

    pool: str
    backend_pid: int
    held: float
    """How long the lease lasted, in seconds."""
    discarded: bool
    """Whether the connection was closed because it could not be used again."""


Event: TypeAlias = Leased | Released


class Hook(Protocol):
    """The type of a hook: a function that is called for each event of each pool of the process."""

    def __call__(self, event: Event, /) -> object: ...


hooks: list[Hook] = []
#: All who listen: the hooks, and the exporters that want durations (tallies.py). While the list is
#: empty, a lease costs one look at it.
listeners: list[object] = []


def add_hook(hook: Hook) -> None:
    """Call `hook` with each event from now on."""
    hooks.append(hook)
    listeners.append(hook)


def remove_hook(hook: Hook) -> None:
    """Undo one `add_hook(hook)`; raise `ValueError` if there was none."""
    hooks.remove(hook)
    listeners.remove(hook)


def emit(event: Event) -> None:
    """Call every hook with `event`; log the exceptions that hooks raise."""
    for hook in tuple(hooks):
        try:
            hook(event)
        except Exception:
            logger.exception("error ignored in the pool hook %r", hook)
