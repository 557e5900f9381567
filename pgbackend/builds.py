"""Refuses an interpreter without the global lock (GIL), of which docs/free-threading.md tells."""

from __future__ import annotations

import sys


def check() -> None:
    """Raise `ImportError` if the threads of this interpreter run at the same time."""
    if not has_gil():
        raise ImportError(
            "pgbackend does not support free-threaded Python: its pools and transactions take the "
            "GIL for granted, and psycopg[binary] has no wheel for such builds. Use the usual "
            "build of Python, or start this one with PYTHON_GIL=1 (docs/free-threading.md)"
        )


def has_gil() -> bool:
    """Return whether one thread runs Python at a time: always before 3.13, usually since then."""
    is_enabled = getattr(sys, "_is_gil_enabled", None)
    return is_enabled is None or bool(is_enabled())
