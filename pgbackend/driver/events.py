"""Defines the events of a pool, as frozen records, and the protocol of their listeners.

Data only. A hook is called on the event loop's thread and must not block; what it returns is
ignored, and an exception in it is logged and does not reach the code that uses the connection.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol, TypeAlias

logger = logging.getLogger("pgbackend.driver")


@dataclass(frozen=True, slots=True)
class Leased:
    """A task took a connection out of the pool."""

    pool: str
    """The pool's name: the alias of the database."""
    backend_pid: int
    """The process id of the server's session."""
    waited: float
    """How long the task waited for the connection, in seconds."""


@dataclass(frozen=True, slots=True)
class Released:
    """A connection went back to the pool."""

    pool: str
    backend_pid: int
    held: float
    """How long the lease lasted, in seconds."""
    discarded: bool
    """Whether the connection was closed because it could not be used again."""


Event: TypeAlias = Leased | Released


class Hook(Protocol):
    """A listener for the events of all pools of the process."""

    def __call__(self, event: Event, /) -> object: ...


hooks: list[Hook] = []


def emit(event: Event) -> None:
    """Tell `event` to every hook; an exception in one is logged."""
    for hook in tuple(hooks):
        try:
            hook(event)
        except Exception:
            logger.exception("error ignored in the pool hook %r", hook)
