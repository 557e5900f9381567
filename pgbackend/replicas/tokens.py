"""Tokens: signed texts that carry the writes of a request to other requests and processes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from django.core import signing
from django.db import Error, connections
from django.db.transaction import TransactionManagementError

from .families import is_in_transaction
from .positions import QUERY, Answer, Position
from .writes import Record, last_write, primaries, reading

_SALT = "pgbackend.routers.token"


def made(record: Record) -> str | None:
    """Return a token for the writes of `record`; None if it has none.

    Raises `TransactionManagementError` in a transaction that the token could not stand for.
    """
    # A list by alias: the timeline and the position; or nothing, if the primary did not tell.
    content = {
        alias: _as_list(_position(record, alias))
        for alias in sorted(primaries)
        if last_write(record, alias) or alias in record.positions
    }
    return signing.dumps(content, salt=_SALT) if content else None


def _position(record: Record, alias: str) -> Position | None:
    if is_in_transaction(alias):
        raise TransactionManagementError(
            f"a token cannot stand for a transaction of {alias!r} that is still open: make it "
            "after the atomic block, or in on_commit()"
        )
    if not last_write(record, alias):
        return record.positions[alias]
    try:
        with reading(), connections[alias].cursor() as cursor:
            cursor.execute(QUERY)
            answer = Answer.of_row(cursor.fetchone())
    except Error:
        return None
    return None if answer.is_replica else answer.position


def _as_list(position: Position | None) -> list[int]:
    return [] if position is None else [position.timeline, position.lsn]


def read(token: str | None, max_age: int, record: Record) -> None:
    """Add the writes that `token` stands for to `record`.

    A token that is older than `max_age`, in seconds, is ignored. One that cannot be read requires
    all that is committed by now.
    """
    if not token:
        return
    try:
        content: Any = signing.loads(token, salt=_SALT, max_age=max_age)
        found = {str(alias): [int(each) for each in given] for alias, given in content.items()}
    except signing.SignatureExpired:
        return
    except (signing.BadSignature, AttributeError, TypeError, ValueError):
        _need_now(record, primaries)
        return
    for alias, given in found.items():
        if len(given) == 2 and alias in primaries:
            record.positions[alias] = Position(*given)
        else:
            _need_now(record, primaries & {alias})


def _need_now(record: Record, aliases: Iterable[str]) -> None:
    for alias in aliases:
        record.need_now(alias)
