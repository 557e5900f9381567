"""Halts a thread at any one line of a package, so that another thread may go on meanwhile.

A sweep halts at the first line, at the second, and so on, until the code ends without a halt: it
meets every moment at which a thread may lose the processor to another.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any
from unittest import mock

from pgbackend.driver.parking import Waiter

#: Seconds that a halt lasts if the other thread cannot go on before it is over.
AT_MOST = 0.1


class Halt:
    """Halts the thread that executes a block, at line number `at` of what is traced."""

    def __init__(self, at: int, package: str = "pgbackend") -> None:
        self.at = at
        self._package = package
        #: How many lines of the package the block has executed.
        self.lines = 0
        self._go_on = threading.Event()
        self._reached = threading.Event()
        #: Set when the thread that was halted waits for the other one, or has done its thing.
        self._at_rest = threading.Event()
        self._thread: int | None = None
        #: The function and line in which the thread was halted; None if the block had fewer lines.
        self.place: str | None = None

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Halt in this block, or not at all."""
        self._thread = threading.get_ident()
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            yield
        finally:
            sys.settrace(before)
            self._reached.set()
            self._at_rest.set()

    def wait(self) -> None:
        """Wait until the other thread is halted, or will not be."""
        assert self._reached.wait(10)

    def is_reached(self) -> bool:
        """Return whether the other thread is halted, or will not be."""
        return self._reached.is_set()

    def end(self) -> None:
        """Let the thread go on, if it is halted."""
        if self._reached.is_set():
            self._go_on.set()

    def is_at_rest(self) -> bool:
        """Return whether the thread that was halted waits for the other one, or has ended."""
        return self._at_rest.is_set()

    @contextmanager
    def ends_with_waits(self) -> Iterator[None]:
        """End in this block when the other thread waits for a turn, or for a connection's lock."""
        wait = Waiter.wait

        def note_and_wait(waiter: Waiter, timeout: float | None = None) -> bool:
            if threading.get_ident() == self._thread:
                if self._reached.is_set():
                    self._at_rest.set()
            else:
                self.end()
            return wait(waiter, timeout)

        with mock.patch.object(Waiter, "wait", note_and_wait):
            yield

    def _trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        if frame.f_globals.get("__name__", "").partition(".")[0] != self._package:
            return None
        if event == "line" and not self._reached.is_set():
            if self.lines == self.at:
                self.place = f"{frame.f_code.co_qualname} in line {frame.f_lineno}"
                self._reached.set()
                self._go_on.wait(AT_MOST)
            self.lines += 1
        return self._trace
