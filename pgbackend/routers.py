"""`ReplicaRouter`: a database router that sends reads to replicas which have the request's writes.

One setting switches it on, ``DATABASE_ROUTERS = ["pgbackend.routers.ReplicaRouter"]``; replicas are
aliases whose ``OPTIONS["replica_of"]`` names their primary. docs/replicas.md has the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS
from django.db import router as djangos_router
from django.http import HttpRequest, HttpResponse

from . import conf, replica_settings
from .driver import bridge
from .replicas import monitors, tokens, writes
from .replicas.families import Family
from .replicas.on_primary import on_primary

__all__ = [
    "ReadYourWritesMiddleware",
    "ReplicaRouter",
    "ReplicaState",
    "on_primary",
    "replica_states",
    "stop_monitors",
    "token",
    "use_token",
]

#: For how many seconds a token counts: a replica that is so far behind is left out anyway.
MAX_AGE = 60


class ReplicaRouter:
    """Send reads to replicas, in turn, and everything else to the primary.

    A read goes to the primary if it is made in a transaction, in a block of `on_primary()`, or by
    an object that was read from there; and if no replica is up, less than `max_lag` seconds behind,
    and has all that the request has written.

    For models whose primary is not `default`, override `primary_for()`, or put a router that knows
    them before this one.
    """

    #: By how many seconds a replica may be behind.
    max_lag: float = 10.0

    def __init__(self, *, max_lag: float | None = None) -> None:
        """Read `DATABASES`; raise `ImproperlyConfigured` if a replica names no primary there."""
        replica_settings.check()
        self.max_lag = self.max_lag if max_lag is None else max_lag
        if isinstance(self.max_lag, bool) or not isinstance(self.max_lag, int | float):
            raise _no_lag(self.max_lag)
        if not self.max_lag > 0:
            raise _no_lag(self.max_lag)
        found = replica_settings.families()
        self._families = {name: Family(name, found[name], self.max_lag) for name in found}
        self._primary_of = {alias: name for name, aliases in found.items() for alias in aliases}
        if found:
            writes.primaries.update(found)
            writes.install()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {', '.join(map(repr, self._families.values()))}>"

    def primary_for(self, model: Any, **hints: Any) -> str | None:
        """Return the alias of the primary of `model`; None if another router knows it.

        By default, that is where the object of the hint `instance` came from, or its primary; else
        `default`.
        """
        alias = _alias_of(hints.get("instance"))
        return DEFAULT_DB_ALIAS if alias is None else self._primary_of.get(alias, alias)

    # --- Django's four methods ---

    def db_for_read(self, model: Any, **hints: Any) -> str | None:
        """Return the alias to read from; None if the next router, or Django, shall say."""
        primary = self._primary(model, hints)
        family = self._families.get(primary or "")
        if family is None:
            return primary
        return family.alias_for_read(_alias_of(hints.get("instance")))

    def db_for_write(self, model: Any, **hints: Any) -> str | None:
        """Return the alias of the primary; None if the next router, or Django, shall say."""
        return self._primary(model, hints)

    def _primary(self, model: Any, hints: dict[str, Any]) -> str | None:
        """Return what `primary_for()` does, but None if that says no more than Django knows."""
        primary = self.primary_for(model, **hints)
        if primary in self._families:
            return primary
        known = _alias_of(hints.get("instance")) or DEFAULT_DB_ALIAS
        return None if primary == known else primary

    def allow_relation(self, obj1: Any, obj2: Any, **hints: Any) -> bool | None:
        """Return True if both objects came from one primary or its replicas; else None."""
        first, second = (_alias_of(each) or DEFAULT_DB_ALIAS for each in (obj1, obj2))
        primary = self._primary_of.get(first, first)
        is_same = primary == self._primary_of.get(second, second)
        return True if is_same and primary in self._families else None

    def allow_migrate(self, db: str, app_label: str, **hints: Any) -> bool | None:
        """Return False for a replica, which has its tables from its primary; else None."""
        return False if db in self._primary_of else None

    # --- For `replica_states()` ---

    def states(self) -> list[ReplicaState]:
        """Return what is known of each replica."""
        return [
            ReplicaState(alias, family.primary, family.why_not(alias))
            for family in self._families.values()
            for alias in family.replicas
        ]


def _alias_of(instance: Any) -> str | None:
    state = getattr(instance, "_state", None)
    return None if state is None else state.db


def _no_lag(value: object) -> ImproperlyConfigured:
    return ImproperlyConfigured(
        f"max_lag of a ReplicaRouter is {value!r}. Set it to a number of seconds above 0."
    )


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """The state of a replica, as a process sees it at present."""

    alias: str
    primary: str
    why_not: str | None
    """Why it is not read from at present; None if it is."""


def replica_states() -> list[ReplicaState]:
    """Return what this process knows of each replica: for a health page, or a shell.

    A process asks the servers only while it reads: see docs/replicas.md.
    """
    routers = [each for each in djangos_router.routers if isinstance(each, ReplicaRouter)]
    return [state for each in routers for state in each.states()]


# --- Tokens ---------------------------------------------------------------------------------------


def token() -> str | None:
    """Return a signed text that stands for the writes of this request; None if it has none.

    Give it to whoever reads next in another request or process (a client of an API, a Celery task),
    to be passed to `use_token()`. It asks the primaries that were written to for their position.
    Raises `TransactionManagementError` inside of an atomic block, whose writes it could not stand
    for.
    """
    return tokens.made(writes.current())


@contextmanager
def use_token(token: str | None = None, *, max_age: int = MAX_AGE) -> Iterator[None]:
    """Let the reads in this ``with`` see the writes that `token` stands for, and their own.

    No other writes count: so with None, the ``with`` is a unit of work of its own, such as a task
    of a worker. A token that is older than `max_age` seconds is ignored. One that cannot be read
    (it was cut off, or signed with another SECRET_KEY) stands for all that is committed by now.
    """
    record = writes.Record(writes.current())
    tokens.read(token, max_age, record)
    with writes.recording(record):
        yield


class ReadYourWritesMiddleware:
    """Let a client's next requests see what it has written, by a signed cookie.

    Put it high in `MIDDLEWARE`, above whatever writes. The cookie is set by responses to requests
    that wrote, and counts for `max_age` seconds. Sync and async chains are served alike.
    """

    sync_capable = async_capable = True
    cookie_name = "pgbackend_writes"
    max_age: int = MAX_AGE

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        self.get_response = get_response
        djangos_router.routers  # noqa: B018 - makes the router, which has writes noted from now on
        self._is_async = iscoroutinefunction(get_response)
        if self._is_async:
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> Any:
        if self._is_async:
            return self._serve(request)
        record = self._begin(request)
        with writes.recording(record):
            response = self.get_response(request)
            self._finish(response, record)
        return response

    async def _serve(self, request: HttpRequest) -> Any:
        record = self._begin(request)
        with writes.recording(record):
            response = await self.get_response(request)
            if record.count:
                await bridge.run(self._finish, response, record)
        return response

    def _begin(self, request: HttpRequest) -> writes.Record:
        record = writes.Record(writes.current())
        tokens.read(request.COOKIES.get(self.cookie_name), self.max_age, record)
        return record

    def _finish(self, response: HttpResponse, record: writes.Record) -> None:
        """Set the cookie if the request wrote."""
        if record.count and (made := tokens.made(record)) is not None:
            response.set_cookie(
                self.cookie_name,
                made,
                max_age=self.max_age,
                path=conf.of_project("SESSION_COOKIE_PATH"),
                domain=conf.of_project("SESSION_COOKIE_DOMAIN"),
                secure=conf.of_project("SESSION_COOKIE_SECURE"),
                httponly=True,
                samesite="Lax",
            )


def stop_monitors() -> None:
    """End the threads that ask the servers, and forget their answers: for tests.

    The next read starts them again.
    """
    monitors.stop_all()
