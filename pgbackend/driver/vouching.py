"""Vouching: code declares that its statements do not change the server session.

A statement that may have changed the server session makes its lease dirty: the pool resets the
session before the next lease (contract C9). Code that knows that its statements change nothing
declares their texts with `vouching()`, and a leased cursor asks `is_vouched()` for each statement
right before it is sent. The text decides, not the cursor: on the same cursor, an observer or a
derived class may send other statements.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_texts: ContextVar[Collection[str]] = ContextVar("_texts", default=())

#: A comment without another one inside. Tools put comments around a statement, to find it in the
#: server's log.
COMMENT = r"/\*(?:(?!\*/|/\*).)*\*/"
_BEFORE = re.compile(rf"(?:\s|{COMMENT}|--[^\r\n]*\n)*", re.DOTALL)
_AFTER = re.compile(rf"(?:\s|;|{COMMENT})*(?:--[^\r\n]*)?", re.DOTALL)


@contextmanager
def vouching(texts: Collection[str]) -> Iterator[None]:
    """Vouch for statements with these texts inside the `with` statement.

    Tasks that are started inside it vouch for them, too. Texts that are added to `texts` meanwhile
    count from then on.
    """
    outer = _texts.get()
    _texts.set(texts)
    try:
        yield
    finally:
        _texts.set(outer)


def is_vouched(query: object) -> bool:
    """Return whether code vouches for `query`, or for `query` without the comments around it."""
    texts = _texts.get()
    if not texts or not isinstance(query, str):
        return False
    return query in texts or any(_is_commented(query, text) for text in texts)


def _is_commented(query: str, text: str) -> bool:
    before, found, after = query.partition(text)
    return bool(found and _BEFORE.fullmatch(before) and _AFTER.fullmatch(after))
