"""Contexts: the attributes of a wrapper show the state of the running code.

In sync code a wrapper keeps what Django keeps on it. In async code several tasks may share one
wrapper, so each of Django's names (`connection`, `in_atomic_block`, ...) is a descriptor that looks
the value up in `pgbackend.state`. Attributes that packages and projects set have other values in
each request: see `pgbackend.attributes`.

A wrapper that `django.db.connections` does not own (`connection.copy()`, the one that creates test
databases) has a connection of its own everywhere, as in Django; in green code, waiting for that
connection does not block the loop either.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

from django.db import DEFAULT_DB_ALIAS

from pgbackend import conf, request, state
from pgbackend.attributes import follow
from pgbackend.descriptors import rollback_attribute, scope_attribute, state_attribute
from pgbackend.driver.vouching import vouching
from pgbackend.sessions import Key, Scope, Session, State
from pgbackend.transactions import Block

from .guards import Guards

_plain_attribute = object.__getattribute__


class Contexts(Guards):
    """A wrapper that shows each task its own state."""

    for _name in State.NAMES:
        locals()[_name] = state_attribute(_name)
    needs_rollback = rollback_attribute
    for _name in Scope.NAMES:
        locals()[_name] = scope_attribute(_name)
    del _name

    _ready = False
    #: The settings for which `_uses_pool` was computed last, and its value for them.
    _pool_use: tuple[Any, bool] = (None, False)
    _own_blocks: Mapping[Key, Block] | None = None
    #: How many calls of `async_to_sync()` lend it now; see Note [Lent wrappers] in state.py.
    lent = 0

    #: Whether attributes that other code sets have other values in each request (attributes.py);
    #: and the names of the wrapper's own attributes, which have not.
    follows_request = False
    own_names: frozenset[str] = frozenset()
    _attributes: Mapping[str, Any] = {}
    #: Whether `django.db.connections` has this wrapper: then attributes are kept for its alias.
    _published = False
    #: The attributes that a running `_cursor()` has set, by the portal or thread that runs it.
    _noted: Mapping[object, dict[str, Any]] = {}

    def __init__(self, settings_dict: dict[str, Any], alias: str = DEFAULT_DB_ALIAS) -> None:
        if request.follows():
            follow(self)
        self._own = State()
        self._own_scope = Scope(None, self.queries_limit)
        self._in_patches = set()
        super().__init__(settings_dict, alias)
        self._ready = True

    def __copy__(self) -> Self:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._own = self._own.copy()
        other._own_blocks = None
        other._published = False
        other._in_patches = set()
        other._own_scope = copy.copy(self._own_scope)
        return other

    def __getattr__(self, name: str) -> Any:
        if name in self.own_names or type(self).follows_request or not request.follows():
            return _plain_attribute(self, name)  # raises
        follow(self)  # made outside of requests, it is used in one now
        return getattr(self, name)

    @property
    def _key(self) -> Key:
        return id(self.settings_dict)

    @property
    def _uses_pool(self) -> bool:
        """Return whether async code that uses this wrapper takes connections from its alias's pool.

        Return False if it uses the wrapper's own connection instead: if the wrapper is a copy, or
        while threads share that connection (`inc_thread_sharing()`).
        """
        settings_dict, uses_pool = self._pool_use
        if settings_dict is not self.settings_dict:
            for_threads = self._thread_sharing_count > self.lent
            uses_pool = not for_threads and conf.is_shared(self.alias, self.settings_dict)
            self._pool_use = (self.settings_dict, uses_pool)
        return uses_pool

    def lend(self) -> None:
        """Let async code use the wrapper while this thread waits; see Note [Lent wrappers]."""
        super().inc_thread_sharing()
        self.lent += 1

    def take_back(self) -> None:
        """Undo `lend()`."""
        self.lent -= 1
        super().dec_thread_sharing()

    def async_session(self) -> Session | None:
        """Return the session of the running task; None in sync code, or if not `_uses_pool`."""
        return state.async_session(self)

    @contextmanager
    def backend_statement(self, *texts: str) -> Iterator[None]:
        """Vouch, inside the `with`, for the backend's own statements `texts` (see vouching.py)."""
        session = self.async_session()
        if session is None:
            yield
            return
        outer, session.compiled = session.compiled, True
        try:
            with vouching(texts):
                yield
        finally:
            session.compiled = outer
