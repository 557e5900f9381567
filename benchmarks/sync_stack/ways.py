"""Defines the ways to serve a project: the engine, and the server with its options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

STOCK = "stock, uvicorn"
_STOCK = "django.db.backends.postgresql"
#: Threads of gunicorn's worker: as many as clients at the middle step.
THREADS = 16
GUNICORN = f"stock, gunicorn with {THREADS} threads"
WHOLE = "the whole stack green, uvicorn"
#: More connections than there are threads that ask at once in the usual run: none waits.
_POOL = {"pool": {"min_size": 4, "max_size": 20, "timeout": 30}}
_UVICORN = (
    *("-m", "uvicorn", "--log-level", "warning", "--no-access-log"),
    *("--host", "127.0.0.1", "--port", "{port}"),
    "benchmarks.sync_stack.applications:asgi",
)
_GUNICORN = (
    *("-m", "gunicorn", "--log-level", "warning", "--bind", "127.0.0.1:{port}"),
    *("--worker-class", "gthread", "--workers", "1", "--threads", str(THREADS)),
    *("--keep-alive", "60", "benchmarks.sync_stack.applications:wsgi"),
)


@dataclass(frozen=True)
class Way:
    """A way to serve a project, in one process that answers."""

    name: str
    engine: str = "pgbackend"
    options: dict[str, Any] = field(default_factory=dict)
    """The `OPTIONS` of the database."""
    max_age: int = 0
    """`CONN_MAX_AGE`."""
    whole: bool = False
    command: tuple[str, ...] = _UVICORN


#: Django advises against `CONN_MAX_AGE` under ASGI: there, a pool keeps connections.
WAYS = (
    Way(STOCK, _STOCK),
    Way("stock with its pool, uvicorn", _STOCK, options=_POOL),
    Way(GUNICORN, _STOCK, max_age=600, command=_GUNICORN),
    Way("`ENGINE` alone, uvicorn"),
    Way("`ENGINE` alone with the pool, uvicorn", options=_POOL),
    Way(WHOLE, whole=True),
)
