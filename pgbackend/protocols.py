"""Protocols: types of a wrapper and of Django's `Atomic`, for annotations.

Modules below `base.py` work on a wrapper, but cannot import `DatabaseWrapper`. A class that a
project derives from it is a `Wrapper` too; a wrapper of another engine is not. `Atomic` has a
protocol because Django's stubs leave out attributes that pgbackend needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from datetime import tzinfo
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from .driver.lease import Lease
    from .driver.pool import Pool
    from .options import Problem
    from .sessions import Key, Scope, Session, State
    from .transactions import Block


class Atomic(Protocol):
    """A protocol: Django's `Atomic`, with a list of its open blocks; transactions.py keeps it."""

    using: str | None
    _from_testcase: bool
    _pgbackend_blocks: list[Block]


class Wrapper(Protocol):
    """A protocol: the members of pgbackend's `DatabaseWrapper` that lower modules use."""

    # Attributes and methods of Django's

    alias: str
    own_names: frozenset[str]
    follows_request: bool
    settings_dict: dict[str, Any]
    queries_limit: int
    _thread_ident: int

    @property
    def timezone(self) -> tzinfo | None: ...
    @property
    def wrap_database_errors(self) -> AbstractContextManager[None]: ...
    def rollback(self) -> None: ...
    def close(self) -> None: ...
    def validate_no_broken_transaction(self) -> None: ...
    def validate_thread_sharing(self) -> None: ...

    # The state of the running code, and the wrapper's own: see state.py

    _own: State
    _own_scope: Scope
    _own_blocks: Mapping[Key, Block] | None
    _ready: bool
    lent: int

    @property
    def _key(self) -> Key: ...
    @property
    def _uses_pool(self) -> bool: ...
    def async_session(self) -> Session | None: ...
    def check_context(self, name: str) -> None: ...
    def is_through_pooler(self) -> bool: ...
    def option_problems(self) -> list[Problem]: ...
    def lend(self) -> None: ...
    def take_back(self) -> None: ...

    # Attributes that packages set on the wrapper: see attributes.py

    _attributes: Mapping[str, Any]
    _noted: Mapping[object, dict[str, Any]]
    _published: bool

    # Leases and transactions

    cursor_calls: tuple[Any, ...]
    block_calls: tuple[Any, ...]

    def hold(self, current: State, session: Session | None) -> Lease | None: ...
    def lease_for(self, current: State, session: Session | None) -> Lease | None: ...
    def acquire_pool(self) -> Pool: ...
    def begin_if_due(self, current: State) -> State: ...
    def begin_pooled(self, current: State) -> State: ...
    def commit_pooled(self, current: State) -> None: ...
    def end_pooled(
        self, current: State, block: Block | None, session: Session | None = None
    ) -> None: ...
