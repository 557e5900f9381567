"""Leaves views out of `ATOMIC_REQUESTS`, whatever aliases there are.

Django's `non_atomic_requests()` names one alias. A view that tells of the connections must open a
transaction on none: it would wait while no connection is free.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class _EveryAlias(frozenset[str]):
    """A set that contains each alias."""

    def __contains__(self, alias: object) -> bool:
        return True


def never_atomic(view: Callable[..., Any]) -> None:
    """Mark `view`, so that Django opens no transaction for it."""
    view._non_atomic_requests = _EveryAlias()  # type: ignore[attr-defined]  # noqa: SLF001 - Django's
