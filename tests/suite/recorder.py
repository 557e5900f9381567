"""Records the outcome of each test as it happens, so that a crash loses only what follows.

A worker appends one JSON object a line; `results.fold` turns them into the outcome of each test.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import json
import sys
import traceback
import unittest
from collections.abc import Callable, Collection
from pathlib import Path
from time import monotonic
from typing import Any

from django.test.runner import DiscoverRunner
from django.test.utils import iter_test_cases

import pgbackend
from pgbackend.driver import bridge

#: Seconds that a pool may take for its own work between two tests.
SETTLE = 5.0


class Journal:
    """Holds the file of a worker, and the name of the running test."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1, encoding="utf-8")
        self.test = "(before the first test)"

    def write(self, event: str, test: str | None = None, **details: Any) -> None:
        record = {"event": event, "test": test or self.test, **details}
        self._file.write(json.dumps(record) + "\n")

    def note_unraisable(self, unraisable: Any) -> None:
        """Record an error that Python can only print, such as an exception in `__del__`."""
        lines = traceback.format_exception_only(unraisable.exc_type, unraisable.exc_value)
        self.write("unraisable", text="".join(lines).strip())
        sys.__unraisablehook__(unraisable)

    def note_complaint(self, loop: Any, context: dict[str, Any]) -> None:
        """Record an error that the event loop would only log."""
        self.write("unraisable", text=f"{context.get('message')}: {context.get('exception')!r}")
        loop.default_exception_handler(context)


class Watchdog:
    """Ends the process when one test takes too long, and says which one, and where it hangs."""

    def __init__(self, journal: Journal, seconds: float) -> None:
        self.journal = journal
        self.seconds = seconds
        self._timer: asyncio.TimerHandle | None = None

    def watch(self) -> None:
        """Start the time limit of the next test."""
        # A thread of C: it works while the interpreter is blocked, and no test can see it.
        faulthandler.dump_traceback_later(self.seconds + 1, exit=True)
        # A parked greenlet is on no thread's stack, but then the loop runs and can print it.
        loop = asyncio._get_running_loop()
        if loop is not None:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = loop.call_later(self.seconds, self._show_greenlets)

    def _show_greenlets(self) -> None:
        print(f"\n{self.journal.test}: no end after {self.seconds:g} s", file=sys.stderr)
        for thing in gc.get_objects():
            if type(thing).__name__ == "Portal" and getattr(thing, "gr_frame", None):
                print(f"\n{thing!r}", file=sys.stderr)
                traceback.print_stack(thing.gr_frame)

    def stop(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._timer is not None:
            self._timer.cancel()


def settle() -> None:
    """Wait, green, until the pools are at rest: no session is being reset, no connection opened.

    Tasks of the pool prepare these sessions, and receivers of `connection_created` run in the
    tasks. Django's own receiver fills a cache of the process, `get_hstore_oids()`. Tests of CREATE
    EXTENSION empty this cache, and count the queries that fill it: a reset that the class before
    them has left to do, or a connection that is opened during the reset, would make one of these
    queries.
    """
    deadline = monotonic() + SETTLE
    while bridge.current() is not None and monotonic() < deadline:
        if all(pool.size == pool.leased + pool.idle for pool in pgbackend.statistics()):
            return
        bridge.await_(asyncio.sleep(0.001))


class Result(unittest.TextTestResult):
    """Reports results as unittest's class does, and writes them to the journal."""

    journal: Journal
    watchdog: Watchdog

    def startTest(self, test: Any) -> None:
        settle()
        self.journal.test = test.id()
        self.journal.write("started")
        self.watchdog.watch()
        self._started = monotonic()
        super().startTest(test)

    def stopTest(self, test: Any) -> None:
        super().stopTest(test)
        self.journal.write("stopped", seconds=round(monotonic() - self._started, 3))
        self.watchdog.watch()

    def _tell(self, outcome: str, test: Any, **details: Any) -> None:
        case = getattr(test, "test_case", test)  # a subtest counts for its test
        self.journal.write("outcome", case.id(), outcome=outcome, **details)

    def addSuccess(self, test: Any) -> None:
        super().addSuccess(test)
        self._tell("passed", test)

    def addFailure(self, test: Any, err: Any) -> None:
        super().addFailure(test, err)
        self._tell("failed", test, text=_format(err))

    def addError(self, test: Any, err: Any) -> None:
        super().addError(test, err)
        self._tell("error", test, text=_format(err))

    def addSkip(self, test: Any, reason: str) -> None:
        super().addSkip(test, reason)
        self._tell("skipped", test, text=str(reason))

    def addExpectedFailure(self, test: Any, err: Any) -> None:
        super().addExpectedFailure(test, err)
        self._tell("expected failure", test)

    def addUnexpectedSuccess(self, test: Any) -> None:
        super().addUnexpectedSuccess(test)
        self._tell("unexpected success", test)

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        super().addSubTest(test, subtest, err)
        if err is not None:
            outcome = "failed" if issubclass(err[0], test.failureException) else "error"
            self._tell(outcome, test, text=f"{subtest}\n{_format(err)}")


def _format(err: Any) -> str:
    return "".join(traceback.format_exception(*err))


def make_runner(
    journal: Journal, watchdog: Watchdog, done: Collection[str]
) -> Callable[..., DiscoverRunner]:
    """Return Django's test runner, with results that are written to `journal`.

    The tests in `done` are left out: a worker that crashed has run them.
    """
    result = type("Result", (Result,), {"journal": journal, "watchdog": watchdog})
    left_out = frozenset(done)

    class Runner(DiscoverRunner):
        def get_resultclass(self) -> Any:
            return result

        def build_suite(self, *args: Any, **kwargs: Any) -> Any:
            suite = super().build_suite(*args, **kwargs)
            if not left_out:
                return suite
            return self.test_suite(
                test for test in iter_test_cases(suite) if test.id() not in left_out
            )

    return Runner
