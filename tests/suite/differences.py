"""Where pgbackend's outcome of a test of Django's is known to differ from the stock backend's.

Each has its reason. One that does not occur any more is reported too, and must be removed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

ALL = ("5.2", "6.0", "6.1")


@dataclass(frozen=True)
class Difference:
    """Tests whose outcome is expected to differ."""

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
_LOOP_IN_LOOP = "the test itself calls asyncio.run(), which no code on an event loop can do"
_HEALTH = (
    "looks at the identity of `connection.connection` between statements; green nothing is held "
    "there, and health is the pool's to check. Stock skips it too, once it has a pool"
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
_BETWEEN = (
    "passes `connection.connection` to a server's thread and looks at its identity; green nothing "
    "is held between statements, so there is nothing to pass or to see closed"
)

DIFFERENCES: tuple[Difference, ...] = (
    Difference(
        "async.tests.DatabaseConnectionTest.test_get_async_connection", "failed", _NO_REFUSAL
    ),
    Difference(
        "async.tests.ViewTests.test_http_method_not_allowed_responds_correctly",
        "error",
        _LOOP_IN_LOOP,
    ),
    Difference(
        "async.tests.ViewTests.test_options_handler_responds_correctly", "error", _LOOP_IN_LOOP
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
    *(
        Difference(f"asgi.tests.ASGITest.{name}", "failed", _RECEIVERS, ("sync", "green"))
        for name in (
            "test_asyncio_cancel_error",
            "test_asyncio_streaming_cancel_error",
            "test_request_lifecycle_signals_dispatched_with_thread_sensitive",
            "test_request_too_big_request_error",
        )
    ),
    Difference(
        "handlers.tests.TransactionsPerRequestTests.test_auto_transaction_async_view",
        "failed",
        _ATOMIC_VIEWS,
        ("sync", "green"),
    ),
    Difference(
        "servers.test_liveserverthread.LiveServerThreadTest.test_closes_connections",
        "failed",
        _BETWEEN,
    ),
    Difference(
        "servers.tests.LiveServerTestCloseConnectionTest.test_closes_connections",
        "failed",
        _BETWEEN,
    ),
)


def expected(context: str, django: str) -> Iterator[Difference]:
    """The differences of `context` with this version of Django."""
    release = ".".join(django.split(".")[:2])
    for difference in DIFFERENCES:
        if context in difference.contexts and release in difference.django:
            yield difference
