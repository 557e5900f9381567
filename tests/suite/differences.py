"""Lists the tests of Django's whose outcome is known to differ between pgbackend and stock.

Each difference has its reason. One that no longer occurs is reported too, and must be removed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .results import WHOLE

ALL = ("5.2", "6.0", "6.1")


@dataclass(frozen=True)
class Difference:
    """Describes tests whose outcome is expected to differ."""

    test: str
    """The test's id, or a pattern for several."""
    outcome: str
    """What the outcome is: one of `results.OUTCOMES`."""
    reason: str
    contexts: tuple[str, ...] = ("green",)
    django: tuple[str, ...] = ALL

    def matches(self, test: str) -> bool:
        return fnmatchcase(test, self.test)


_NO_REFUSAL = (
    "asserts that a query in an async test is refused; green it is made (contract C1), and meets "
    "SimpleTestCase's own refusal instead"
)
_HEALTH = (
    "looks at the identity of `connection.connection` between statements; green nothing is held "
    "there, and health is the pool's to check. Stock skips it too, once it has a pool"
)
_LENT = (
    "expects a SimpleTestCase to forbid queries on the connection of the waiting thread only, and "
    "the loop to have another; async code is lent that of the thread (contract C13), and is told "
    "that queries are forbidden"
)
_USABLE = (
    "expects is_usable() to be false after `_close()`; green no connection is held there, and the "
    "database, which is asked, can be reached (contract C1)"
)
_SIGNAL = (
    "expects close() to make the next statement connect anew; green it gives the connection back "
    "to the pool, and connection_created is sent once for each physical connection"
)
_RECEIVERS = (
    "expects a request's sync signal receivers in a thread other than the loop's; they run in "
    "place (contract C11), or in the request's thread once it has one"
)
_ATOMIC_VIEWS = "expects ATOMIC_REQUESTS to refuse async views, which it now serves (contract C5)"
_HOPS = (
    "expects sync_to_async() to run a middleware's method in the thread that waits for it; green, "
    "that is the loop's, and users' functions run in another (contract C11)"
)
_IN_PLACE = (
    "expects a sync view in a thread, beside which the handler hears a client that goes; the whole "
    "stack runs it on the loop (contract C19), and this one has answered before it waits"
)
_BARRIER = (
    "has two sync views wait for each other by a barrier of threads; the whole stack runs both on "
    "the loop (contract C19), where nothing may block"
)
_ENVIRON = (
    "expects `environ` in request_started, as in WSGI; the application sends `scope`, as Django's "
    "ASGI handler does"
)
_STREAMED = (
    "expects the test client to read a stream after the request; here it was sent before that, as "
    "by a server"
)
_REMOTE_USER = (
    "before Django 6.1 the name of the header depends on whether RemoteUserMiddleware stands in a "
    "sync or an async chain; the whole stack is a sync one (contract C19)"
)
_ONE_CHAIN = (
    "expects the log of how Django's async handler adapts sync middleware; the whole stack is one "
    "sync chain (contract C19)"
)
_BY_NAME = (
    "asks what OGR can connect to by the name of the ENGINE, and knows Django's names only; skips"
)

DIFFERENCES: tuple[Difference, ...] = (
    Difference(
        "async.tests.DatabaseConnectionTest.test_get_async_connection", "failed", _NO_REFUSAL
    ),
    Difference(
        "backends.base.test_base.ConnectionHealthChecksTests.test_health_checks_enabled",
        "failed",
        _HEALTH,
    ),
    Difference(
        "backends.base.test_base.ConnectionHealthChecksTests"
        ".test_set_autocommit_health_checks_enabled",
        "failed",
        _HEALTH,
    ),
    Difference("backends.tests.ConnectionCreatedSignalTest.test_signal", "error", _SIGNAL),
    Difference(
        "backends.tests.BackendTestCase.test_is_usable_after_database_disconnects",
        "failed",
        _USABLE,
    ),
    Difference(
        "async.tests.DatabaseConnectionTest.test_get_async_connection",
        "failed",
        _LENT,
        ("sync",),
    ),
    *(
        Difference(f"asgi.tests.ASGITest.{name}", "failed", _RECEIVERS, ("sync", "green", WHOLE))
        for name in (
            "test_asyncio_cancel_error",
            "test_asyncio_streaming_cancel_error",
            "test_request_too_big_request_error",
        )
    ),
    Difference(
        "asgi.tests.ASGITest.test_request_lifecycle_signals_dispatched_with_thread_sensitive",
        "failed",
        _RECEIVERS,
        ("sync", "green"),
    ),
    Difference(
        "handlers.tests.TransactionsPerRequestTests.test_auto_transaction_async_view",
        "failed",
        _ATOMIC_VIEWS,
        ("sync", "green", WHOLE),
    ),
    Difference(
        "deprecation.test_middleware_mixin.MiddlewareMixinTests"
        ".test_sync_to_async_uses_base_thread_and_connection",
        "failed",
        _HOPS,
    ),
    *(
        Difference(f"asgi.tests.ASGITest.{name}", "failed", _IN_PLACE, (WHOLE,))
        for name in (
            "test_assert_in_listen_for_disconnect",
            "test_delayed_disconnect_with_body",
            "test_disconnect_with_body",
        )
    ),
    Difference(
        "asgi.tests.ASGITest.test_concurrent_async_uses_multiple_thread_pools",
        "failed",
        _BARRIER,
        (WHOLE,),
    ),
    *(
        Difference(
            f"auth_tests.test_remote_user.{name}", outcome, _REMOTE_USER, (WHOLE,), ("5.2", "6.0")
        )
        for name, outcome in (
            ("*.test_last_login_async", "error"),
            ("*_async", "failed"),
            ("CustomProcessRequestMiddlewareTest.test_async_*", "failed"),
        )
    ),
    Difference("handlers.tests.SignalsTests.test_request_signals", "failed", _ENVIRON, (WHOLE,)),
    Difference(
        "handlers.tests.SignalsTests.test_request_signals_streaming_response",
        "failed",
        _STREAMED,
        (WHOLE,),
    ),
    *(
        Difference(f"middleware_exceptions.tests.{name}", "failed", _ONE_CHAIN, (WHOLE,))
        for name in (
            "MiddlewareNotUsedTests.test_async_and_sync_middleware_chain_async_call",
            "MiddlewareSyncAsyncTests.test_sync_middleware_async",
        )
    ),
    Difference(
        "gis_tests.inspectapp.tests.OGRInspectTest.test_time_field",
        "skipped",
        _BY_NAME,
        ("sync", "green"),
    ),
)


#: Beside those, the differences of a run through a pooler (``--pooler``).
BEHIND_A_POOLER: tuple[Difference, ...] = (
    Difference(
        "postgres_tests.test_unaccent.*.test_unaccent_with_conforming_strings_off",
        "error",
        "sets standard_conforming_strings by SET; OPTIONS['pooler'] refuses what acts on a session",
        contexts=("sync", "green"),
    ),
)


def expected(
    context: str, django: str, differences: Iterable[Difference] = DIFFERENCES
) -> Iterator[Difference]:
    """Yield the differences of `context` with this version of Django."""
    release = ".".join(django.split(".")[:2])
    for difference in differences:
        if context in difference.contexts and release in difference.django:
            yield difference
