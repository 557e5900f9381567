"""The time zone of a connection, as a parameter that it begins with.

Through a transaction pooler no ``SET TIME ZONE`` may be sent (through_pooler.py). libpq sends the
time zone that the environment variable PGTZ names, but has no option for it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from psycopg.abc import PQGenConn

RV = TypeVar("RV")

#: The time zone of the connection that the running code opens; None to leave it to the server.
_zone: ContextVar[str | None] = ContextVar("zone", default=None)
_changing = threading.Lock()
_VARIABLE = "PGTZ"
#: The value that libpq takes for no value.
_NO_ZONE = "default"


@contextmanager
def start_with(zone: str | None) -> Iterator[None]:
    """Let connections that are opened inside this `with` begin in the time zone `zone`.

    libpq has no option for that, but an environment variable, which it reads when it sends the
    parameters of a connection. The variable has its value only during the steps in which libpq may
    read it (`steps_of()`). Otherwise it says "default", which is no value to libpq; it is not
    removed, since that would move the variables that other threads may be reading.
    """
    if zone is not None and _VARIABLE not in os.environ:
        os.environ[_VARIABLE] = _NO_ZONE
    token = _zone.set(zone)
    try:
        yield
    finally:
        _zone.reset(token)


def steps_of(gen: PQGenConn[RV]) -> PQGenConn[RV]:
    """Run `gen`, which opens a connection, with the time zone of `start_with()`."""
    zone = _zone.get()
    if zone is None:
        return gen
    return _steps_in(zone, gen)


def _steps_in(zone: str, gen: PQGenConn[RV]) -> Generator[tuple[int, Any], Any, RV]:
    ready: Any = None
    try:
        while True:
            with _changing:
                before = os.environ.get(_VARIABLE, _NO_ZONE)
                os.environ[_VARIABLE] = zone
                try:
                    state = gen.send(ready)
                finally:
                    os.environ[_VARIABLE] = before
            ready = yield state
    except StopIteration as stop:
        result: RV = stop.value
        return result
    finally:
        gen.close()


#: Names of the time zone without an offset.
_UTC = frozenset(
    ("utc", "etc/utc", "gmt", "etc/gmt", "uct", "etc/uct", "zulu", "etc/zulu", "universal")
)


def are_same(zone: str, other: str | None) -> bool:
    """Return whether two names name the same time zone, as far as that is plain."""
    names = {zone.lower(), (other or "").lower()}
    return len(names) == 1 or names <= _UTC
