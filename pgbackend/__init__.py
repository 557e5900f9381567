"""A PostgreSQL backend for Django that runs the ORM on the event loop.

One setting chooses it: ``DATABASES["default"]["ENGINE"] = "pgbackend"``. This module has the public
names, which are loaded at first use: importing it imports neither Django nor psycopg.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .builds import check as _check_build

if TYPE_CHECKING:
    from . import aio as aio
    from . import metrics as metrics
    from .aio import atomic as atomic
    from .aio import detached as detached
    from .aio import pinned as pinned
    from .declared import session as session
    from .draining import drain as drain
    from .driver.commit_ids import Verdict as Verdict
    from .driver.mailboxes import Gap as Gap
    from .driver.mailboxes import Notification as Notification
    from .listening import anotify as anotify
    from .listening import listen as listen
    from .listening import notify as notify
    from .metrics import PoolStatistics as PoolStatistics
    from .metrics import add_hook as add_hook
    from .metrics import dump as dump
    from .metrics import remove_hook as remove_hook
    from .metrics import statistics as statistics
    from .outcomes import OutcomeUnknown as OutcomeUnknown
    from .replicas.on_primary import on_primary as on_primary
    from .whole_stack import get_asgi_application as get_asgi_application

_check_build()

__version__ = "0.1.0"

__all__ = [
    "Gap",
    "Notification",
    "OutcomeUnknown",
    "PoolStatistics",
    "Verdict",
    "add_hook",
    "aio",
    "anotify",
    "atomic",
    "detached",
    "drain",
    "dump",
    "get_asgi_application",
    "listen",
    "metrics",
    "notify",
    "on_primary",
    "pinned",
    "remove_hook",
    "session",
    "statistics",
]

_HOMES = {
    "Gap": "driver.mailboxes",
    "Notification": "driver.mailboxes",
    "OutcomeUnknown": "outcomes",
    "PoolStatistics": "metrics",
    "Verdict": "driver.commit_ids",
    "add_hook": "metrics",
    "anotify": "listening",
    "atomic": "aio",
    "detached": "aio",
    "drain": "draining",
    "dump": "metrics",
    "get_asgi_application": "whole_stack",
    "listen": "listening",
    "notify": "listening",
    "on_primary": "replicas.on_primary",
    "pinned": "aio",
    "remove_hook": "metrics",
    "session": "declared",
    "statistics": "metrics",
}

# Hidden from type checkers, so that they report a name that is not imported above.
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
