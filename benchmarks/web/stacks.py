"""Lists the stacks: each is one server process with 10 connections at most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: As in psycopg_pool and SQLAlchemy, a request that waits longer than 30 s for a connection fails.
POOL = {"min_size": 1, "max_size": 10, "timeout": 30}
THREADS = 16
_PSYCOPG = "django.db.backends.postgresql"


@dataclass(frozen=True)
class Stack:
    """Describes a stack, with what a reader must know of it."""

    name: str
    title: str
    note: str
    settings: Mapping[str, Any]
    """What differs between the stacks of one application; `apps.given` hands it over."""
    kind: str = "django"
    """``django`` (ASGI), ``wsgi`` or ``starlette``."""
    lacks: Mapping[str, str] = field(default_factory=dict)
    """Endpoints that it cannot serve, with the reason."""
    is_floor: bool = False
    """Whether it queries nothing: what it takes is no database backend's."""

    def can(self, endpoint: str) -> bool:
        return endpoint not in self.lacks


_HOLDS = "holds its connection until the request ends, so ten requests would stop all others"
_THREADS = "has a thread for each request in progress"

_ALL = (
    Stack(
        "stock",
        "Django, a-methods, pool",
        'Django\'s own backend with `OPTIONS["pool"]`; every query runs in a thread, and a request '
        "holds a connection from its first statement on. `insert` is a sync function with "
        "`atomic()` under `sync_to_async`, since Django has no async one.",
        {"engine": _PSYCOPG, "views": "stock", "pool": POOL},
        lacks={"park": _HOLDS},
    ),
    Stack(
        "stock-no-pool",
        "Django, a-methods, no pool",
        "The same without a pool, Django's default: each request opens a connection and closes it, "
        "so there is no bound of 10. What the server refuses is counted as failed.",
        {"engine": _PSYCOPG, "views": "stock"},
        lacks={"park": "has a connection for each request in progress"},
    ),
    Stack(
        "wsgi",
        "Django, WSGI, pool",
        f"Sync views on gunicorn (gthread) with {THREADS} threads, and Django's pool.",
        {"engine": _PSYCOPG, "views": "threads", "pool": POOL},
        kind="wsgi",
        lacks={"park": _THREADS},
    ),
    Stack(
        "wsgi-persistent",
        "Django, WSGI, persistent",
        "The same with `CONN_MAX_AGE=None`: a connection for each thread, "
        f"so {THREADS} and not 10, but nothing of a pool's cost.",
        {"engine": _PSYCOPG, "views": "threads", "max_age": None},
        kind="wsgi",
        lacks={"park": _THREADS},
    ),
    Stack(
        "async-backend",
        "django-async-backend",
        "Its own managers (`async_objects`) and `async_atomic()`, with its pool; a request holds a "
        "connection from its first statement on. It has no "
        "`prefetch_related`: `page` reads the reviews by a second query and hands them out itself.",
        {
            "engine": "django_async_backend.db.backends.postgresql",
            "views": "async_backend",
            "pool": POOL,
            "apps": ["django_async_backend"],
        },
        lacks={"stream": "it has no `aiterator()`", "park": _HOLDS},
    ),
    Stack(
        "pgbackend-a",
        "pgbackend, a-methods",
        "The views of the first stack; only ENGINE is another, and `insert` uses `async with`.",
        {"engine": "pgbackend", "views": "pgbackend_a", "pool": POOL},
    ),
    Stack(
        "pgbackend",
        "pgbackend, QuerySets",
        "Ordinary QuerySets, `atomic()` and a lazy template in async views.",
        {"engine": "pgbackend", "views": "pgbackend_plain", "pool": POOL},
    ),
    Stack(
        "floor",
        "Django, no database",
        "What none of the Django stacks can fall below: the same request, view, objects and answer "
        "on pgbackend's request cycle, but the objects are in memory, and nothing is queried.",
        {"engine": "pgbackend", "views": "memory", "pool": POOL},
        lacks={
            "update": "it writes nothing",
            "insert": "it writes nothing",
            "stream": "it has no cursor",
            "park": "it would hold no connection",
        },
        is_floor=True,
    ),
    Stack(
        "sqlalchemy-asyncpg",
        "SQLAlchemy on asyncpg",
        "The async ORM on Starlette, a session for each request, which holds a connection from its "
        "first statement on. In autocommit, as Django is: less work than its default, which has a "
        "transaction for a single query, too.",
        {"answers": "on_sqlalchemy", "driver": "asyncpg", "pool": POOL},
        kind="starlette",
        lacks={"park": _HOLDS},
    ),
    Stack(
        "sqlalchemy-psycopg",
        "SQLAlchemy on psycopg",
        "The same on psycopg 3.",
        {"answers": "on_sqlalchemy", "driver": "psycopg", "pool": POOL},
        kind="starlette",
        lacks={"park": _HOLDS},
    ),
    Stack(
        "tortoise",
        "Tortoise on asyncpg",
        "On Starlette. It takes a connection for each statement, and asyncpg's pool asks the "
        "server to reset the session each time that one comes back, which is its default.",
        {"answers": "on_tortoise", "pool": POOL},
        kind="starlette",
        lacks={"stream": "its `async for` reads all rows at once"},
    ),
    Stack(
        "asyncpg",
        "asyncpg, no ORM",
        "SQL by hand on Starlette: what is left if there is no ORM at all. Its pool resets "
        "sessions, as above.",
        {"answers": "on_asyncpg", "pool": POOL},
        kind="starlette",
    ),
)
STACKS = {stack.name: stack for stack in _ALL}
#: The stack to which all others are compared.
REFERENCE = "stock"
OURS = ("pgbackend-a", "pgbackend")
