"""A PostgreSQL backend for Django that runs the ORM on the event loop.

Chosen by one setting: ``DATABASES["default"]["ENGINE"] = "pgbackend"``. The public names are here,
loaded when they are first used; importing the package imports neither Django nor psycopg.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import aio as aio
    from . import metrics as metrics
    from .aio import atomic as atomic
    from .aio import detached as detached
    from .aio import pinned as pinned
    from .metrics import PoolStatistics as PoolStatistics
    from .metrics import add_hook as add_hook
    from .metrics import remove_hook as remove_hook
    from .metrics import statistics as statistics

__version__ = "0.1.0"

__all__ = [
    "PoolStatistics",
    "add_hook",
    "aio",
    "atomic",
    "detached",
    "metrics",
    "pinned",
    "remove_hook",
    "statistics",
]

_HOMES = {
    "PoolStatistics": "metrics",
    "add_hook": "metrics",
    "atomic": "aio",
    "detached": "aio",
    "pinned": "aio",
    "remove_hook": "metrics",
    "statistics": "metrics",
}

# Not for type checkers: for them, each name that is not imported above is an error.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name in ("aio", "metrics"):
            return import_module(f".{name}", __name__)
        try:
            home = _HOMES[name]
        except KeyError:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
        return getattr(import_module(f".{home}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
