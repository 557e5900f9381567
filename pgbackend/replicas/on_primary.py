"""`on_primary()`: blocks whose reads a `ReplicaRouter` sends to the primary."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Self

from django.db import connections
from django.utils.connection import ConnectionDoesNotExist

from pgbackend.decorating import Decorating


class on_primary(Decorating):  # noqa: N801 - reads as a statement
    """Read from the primary inside ``with pgbackend.on_primary():``, never from a replica.

    ``async with`` does the same; decorated with ``@pgbackend.on_primary()``, so does each call of a
    function, coroutine function or generator function. Tasks and threads that are started inside
    inherit it. `using` is the alias of a primary; None stands for all primaries. Without a
    `pgbackend.routers.ReplicaRouter`, it changes nothing.

    Raises `django.db.ConnectionDoesNotExist` for an unknown alias.
    """

    called = "pgbackend.on_primary"

    def __init__(self, using: str | None = None) -> None:
        if callable(using):
            raise TypeError(f"write @pgbackend.on_primary(), with parentheses, before {using!r}")
        if using is not None and using not in connections.settings:
            raise ConnectionDoesNotExist(f"The connection {using!r} doesn't exist.")
        self.using = using

    def __enter__(self) -> Self:
        self.begin_call()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.end_call(None)

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(self, *exc_info: object) -> None:
        self.__exit__()

    def begin_call(self) -> None:
        _blocks.set((*_blocks.get(), self))

    def end_call(self, begun: None) -> None:
        blocks = [*_blocks.get()]
        for place in range(len(blocks) - 1, -1, -1):
            if blocks[place] is self:
                del blocks[place]
                _blocks.set(tuple(blocks))
                return
        # The block ends in another context than it began in, such as that of a finalizer.


#: The blocks that the running code is in, the innermost last.
_blocks: ContextVar[tuple[on_primary, ...]] = ContextVar("pgbackend.on_primary", default=())


def is_on_primary(alias: str) -> bool:
    """Return whether the running code is in a block of `on_primary()` for the primary `alias`."""
    return any(block.using in (None, alias) for block in _blocks.get())
