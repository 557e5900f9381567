"""Uses the `DatabaseWrapper` of an ended request for the next one: the shortcut `wrappers`.

Django makes a wrapper for each request that uses a database: some forty attributes, and six helpers
that refer to it, so that only the garbage collector can free it. Since a wrapper has no state of a
running query (see state.py), it can serve the next request as well, if no code has changed it or
one of its helpers. Their cached properties are computed anew, since code may assign to them. (A
task that a request has left running then shares the object with the next request, but no state.) A
wrapper of a derived class is not used again: it may keep values of its request.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from operator import attrgetter, is_
from typing import Any

from django.core.signals import setting_changed
from django.db import connections
from django.db.utils import ConnectionHandler
from django.utils.functional import cached_property

from pgbackend import asgi, state


def install() -> None:
    """Plug `_take_or_make()` into the seam `asgi.new_wrapper`."""
    asgi.new_wrapper = _take_or_make
    setting_changed.connect(forget)


def _take_or_make(create: Callable[..., Any], handler: ConnectionHandler, alias: str) -> Any:
    wrapper = take(alias)
    if wrapper is None:
        wrapper = create(handler, alias)
        lend(wrapper)
    return wrapper


#: Attributes that a wrapper sets on itself later, besides Django's cached properties.
_NOTES = frozenset({"_asking_others", "_made", "_noted", "_own_blocks", "_published", "_pool_use"})
#: The helpers that Django makes for each wrapper.
_HELPERS = ("client", "creation", "features", "introspection", "ops", "validation")


class _Idle(threading.local):
    """The kept wrappers of this thread, by alias; a wrapper belongs to the thread that made it."""

    MOST = 64

    def __init__(self) -> None:
        self.by_alias: dict[str, list[Any]] = {}
        self.generation = _generation


#: Counts changes of settings, which tests make: a wrapper may have cached the old value.
_generation = 0
_idle = _Idle()


def take(alias: str) -> Any:
    """Return a kept wrapper for `alias`, and lend it to the running task; None if there is none."""
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
    """Record that the new `wrapper` is lent to the running task; not if its class is derived.

    Does nothing if that is recorded already: `create_connection()` may be replaced twice, by tests.
    """
    is_recorded = "_made" in vars(wrapper)
    if type(wrapper).__module__ in ("pgbackend.base", "pgbackend.gis.base") and not is_recorded:
        wrapper.ops.compiler("SQLCompiler")  # sets an attribute at the first call
        # Not by `setattr()`, which would set the attribute for this request: see `attributes`.
        vars(wrapper)["_made"] = [
            (each, type(each), vars(each), [*vars(each).values()])
            for each in (wrapper, *(getattr(wrapper, name) for name in _HELPERS))
        ]
        state.task_sessions().wrappers.append(wrapper)


def lent() -> int:
    """Return how many wrappers are lent to the running task."""
    return len(state.wrappers_of_task() or ())


def give_back(all_but: int) -> None:
    """Keep the wrappers of the running task for the next request, if no code has changed them.

    The first `all_but` of them were lent before the request: these stay lent.
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
    """Make each thread drop its kept wrappers at its next `take()`: a setting has changed."""
    global _generation  # noqa: PLW0603 - a process has one set of settings
    _generation += 1


#: Returns attributes of a wrapper that code may have changed; and their values in a new wrapper.
_left = attrgetter(
    *("_own.connection", "_own.transaction", "_own.in_atomic_block", "_own.run_on_commit"),
    *("_own_scope.execute_wrappers", "_own_scope.force_debug_cursor", "_own_scope.log"),
    "allow_thread_sharing",
)
_NOTHING: tuple[Any, ...] = (None, None, False, [], [], False, None, False)


def _is_as_new(wrapper: Any) -> bool:
    """Return whether no code has changed `wrapper` or its helpers; empty their caches if so."""
    if _left(wrapper) != _NOTHING:
        return False
    for each, cls, attributes, values in wrapper.__dict__["_made"]:
        if len(attributes) != len(values) and not _drop_cached(cls, attributes, len(values)):
            return False
        # The dictionary has kept the order: the first attributes are those that were made.
        if type(each) is not cls or not all(map(is_, attributes.values(), values)):
            return False
    return True


def _drop_cached(cls: type[object], attributes: dict[str, Any], made: int) -> bool:
    """Delete the values of cached properties; return whether no other attribute is new or missing.

    Code may have assigned to a cached property: its value cannot be told from a computed one. The
    first `made` attributes are those of a new object.
    """
    if len(attributes) < made:
        return False
    cached = _cached_by(cls)  # type: ignore[arg-type]  # classes have a hash
    for name in [*attributes][made:]:
        if name in cached:
            del attributes[name]
        elif name not in _NOTES:
            return False
    return True


@cache
def _cached_by(cls: type[object]) -> frozenset[str]:
    """Return the names of the cached properties of `cls`."""
    members = {name: member for each in cls.__mro__ for name, member in vars(each).items()}
    return frozenset(
        name for name, member in members.items() if isinstance(member, cached_property)
    )
