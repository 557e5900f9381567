"""Runs code on Django's own engine, to compare results."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from django.db import connections
from django.db.backends.postgresql.base import DatabaseWrapper


def djangos_wrapper(**changes: Any) -> DatabaseWrapper:
    """Make a wrapper of Django's engine for the tests' database, with the settings of ours."""
    given = {**connections.settings["default"], **changes}
    ours = ("pool", "session_reset")
    options = {name: value for name, value in given["OPTIONS"].items() if name not in ours}
    return DatabaseWrapper({**given, "OPTIONS": options}, "default")


def on_djangos(fn: Callable[..., Any], *args: Any, **changes: Any) -> Any:
    """Call `fn` in a thread of its own, where Django's wrapper replaces ours."""

    def call() -> Any:
        connections["default"] = wrapper = djangos_wrapper(**changes)
        try:
            return fn(*args)
        finally:
            wrapper.close()

    return in_thread(call)


def in_thread(fn: Callable[..., Any], *args: Any) -> Any:
    """Call `fn` in a thread of its own, whose connections are closed afterwards."""

    def call() -> Any:
        assert threading.current_thread() is not threading.main_thread()
        try:
            return fn(*args)
        finally:
            connections.close_all()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call).result()
