"""The `DatabaseWrapper` objects of requests that have ended, for those that come.

Django makes one for each request that uses a database: some forty attributes, and six helpers that
know it and so leave it to the garbage collector. Since a wrapper holds nothing of a running query
(see state.py), it can serve the next request as well, if nobody has changed it meanwhile. (A task
that a request has left running shares the object with the next, and nothing else.) One whose class
somebody has derived is left alone: it may keep what belongs to a request.
"""

from __future__ import annotations

import threading
from operator import attrgetter
from typing import Any

from django.db import connections
from django.utils.functional import cached_property

from . import state

#: What a wrapper notes on itself, beside what it was made with and what Django remembers.
_NOTES = {"_asking_others", "_noted", "_own_blocks", "_published", "_sharing"}


class _Idle(threading.local):
    """Those of this thread, by alias: a wrapper is for one thread only."""

    MOST = 64

    def __init__(self) -> None:
        self.by_alias: dict[str, list[Any]] = {}
        self.generation = _generation


#: Which of the settings, that wrappers remember some of, tests may change.
_generation = 0
_idle = _Idle()
#: By class: the names that one has which is as new.
_names: dict[type[Any], frozenset[str]] = {}


def take(alias: str) -> Any:
    """Return a wrapper for `alias` that is as new, lent to the running task; or None."""
    if _idle.generation != _generation:
        _idle.by_alias.clear()
        _idle.generation = _generation
    kept = _idle.by_alias.get(alias)
    while kept:
        wrapper = kept.pop()
        if wrapper.settings_dict is connections.settings.get(alias):
            state.task_sessions().wrappers.append(wrapper)
            return wrapper
    return None


def lend(wrapper: Any) -> None:
    """Note that `wrapper`, which is as new, is the running task's, to be given back."""
    cls = type(wrapper)
    if cls.__module__ in ("pgbackend.base", "pgbackend.gis.base"):
        if cls not in _names:
            _names[cls] = frozenset(vars(wrapper)) | _NOTES | _remembered_by(cls)
        state.task_sessions().wrappers.append(wrapper)


def lent() -> int:
    """How many the running task has."""
    return len(state.wrappers_of_task() or ())


def give_back(all_but: int) -> None:
    """Keep those of the running task, but for the first, which it had before the request."""
    found = state.wrappers_of_task()
    if not found:
        return
    for wrapper in found[all_but:]:
        kept = _idle.by_alias.setdefault(wrapper.alias, [])
        if len(kept) < _Idle.MOST and _is_as_new(wrapper):
            kept.append(wrapper)
    del found[all_but:]


def forget(**kwargs: Any) -> None:
    """Drop those of all threads: a setting was changed, and they remember some."""
    global _generation  # noqa: PLW0603 - a process has one set of settings
    _generation += 1


#: What code may have left on a wrapper itself; and what a new one has there.
_left = attrgetter(
    *("_own.connection", "_own.transaction", "_own.in_atomic_block", "_own.run_on_commit"),
    *("_own_scope.execute_wrappers", "_own_scope.force_debug_cursor", "_own_scope.log"),
    "allow_thread_sharing",
)
_NOTHING: tuple[Any, ...] = (None, None, False, [], [], False, None, False)


def _is_as_new(wrapper: Any) -> bool:
    return _left(wrapper) == _NOTHING and vars(wrapper).keys() <= _names[type(wrapper)]


def _remembered_by(cls: type[Any]) -> set[str]:
    """The names under which objects of `cls` keep what they have found out."""
    members = {name: member for each in cls.__mro__ for name, member in vars(each).items()}
    return {name for name, member in members.items() if isinstance(member, cached_property)}
