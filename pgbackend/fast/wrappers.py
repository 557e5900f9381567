"""The shortcut ``wrappers``: lend the `DatabaseWrapper` of an ended request to the next one.

Django makes one for each request that uses a database: some forty attributes, and six helpers that
refer to it and so leave it to the garbage collector. Since a wrapper holds nothing of a running
query (see state.py), it can serve the next request as well, if nobody has changed it meanwhile. (A
task that a request has left running shares the object with the next, and nothing else.) A wrapper
of a derived class is left alone: it may keep what belongs to a request.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from operator import attrgetter
from typing import Any

from django.core.signals import setting_changed
from django.db import connections
from django.db.utils import ConnectionHandler
from django.utils.functional import cached_property

from pgbackend import asgi, state


def install() -> None:
    """Let green code be given the wrapper of a request that has ended, if there is one."""
    asgi.new_wrapper = _take_or_make
    setting_changed.connect(forget)


def _take_or_make(create: Callable[..., Any], handler: ConnectionHandler, alias: str) -> Any:
    wrapper = take(alias)
    if wrapper is None:
        wrapper = create(handler, alias)
        lend(wrapper)
    return wrapper


#: The names that a wrapper sets on itself, beside those of its making and of Django's caches.
_NOTES = {"_asking_others", "_noted", "_own_blocks", "_published", "_sharing"}


class _Idle(threading.local):
    """The wrappers of this thread that wait for a request, by alias; no other may use them."""

    MOST = 64

    def __init__(self) -> None:
        self.by_alias: dict[str, list[Any]] = {}
        self.generation = _generation


#: Counts the changes that tests make to settings: wrappers remember some.
_generation = 0
_idle = _Idle()
#: By class: the names that a wrapper has which is as new.
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
    """Note that the running task is to give `wrapper` back, which is as new."""
    cls = type(wrapper)
    if cls.__module__ in ("pgbackend.base", "pgbackend.gis.base"):
        if cls not in _names:
            _names[cls] = frozenset(vars(wrapper)) | _NOTES | _remembered_by(cls)
        state.task_sessions().wrappers.append(wrapper)


def lent() -> int:
    """Return how many wrappers the running task has."""
    return len(state.wrappers_of_task() or ())


def give_back(all_but: int) -> None:
    """Keep the wrappers of the running task for the next request.

    `all_but` is how many it had before the request: these stay its own.
    """
    found = state.wrappers_of_task()
    if not found:
        return
    for wrapper in found[all_but:]:
        kept = _idle.by_alias.setdefault(wrapper.alias, [])
        if len(kept) < _Idle.MOST and _is_as_new(wrapper):
            kept.append(wrapper)
    del found[all_but:]


def forget(**kwargs: Any) -> None:
    """Drop the kept wrappers of all threads: a setting was changed, and they remember some."""
    global _generation  # noqa: PLW0603 - a process has one set of settings
    _generation += 1


#: The attributes in which code may have left something on a wrapper; and their values in a new one.
_left = attrgetter(
    *("_own.connection", "_own.transaction", "_own.in_atomic_block", "_own.run_on_commit"),
    *("_own_scope.execute_wrappers", "_own_scope.force_debug_cursor", "_own_scope.log"),
    "allow_thread_sharing",
)
_NOTHING: tuple[Any, ...] = (None, None, False, [], [], False, None, False)


def _is_as_new(wrapper: Any) -> bool:
    return _left(wrapper) == _NOTHING and vars(wrapper).keys() <= _names[type(wrapper)]


def _remembered_by(cls: type[Any]) -> set[str]:
    """Return the names under which objects of `cls` keep what they have found out."""
    members = {name: member for each in cls.__mro__ for name, member in vars(each).items()}
    return {name for name, member in members.items() if isinstance(member, cached_property)}
