"""Statements that are known to leave nothing in their session.

A session is reset after statements that may have changed it (contract C9). Code that knows that
its statements change nothing says so with `vouching()`, and a leased cursor asks `is_vouched()` for
each statement right before it is sent. The text of the statement decides, and not the cursor: on
the cursor of a statement that is vouched for, an observer or a derived class may send others.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_texts: ContextVar[Collection[str]] = ContextVar("_texts", default=())

#: What tools put around a statement, to find it in the server's log: comments, and spaces.
_COMMENT = r"/\*(?:(?!\*/|/\*).)*\*/"
_BEFORE = re.compile(rf"(?:\s|{_COMMENT}|--[^\r\n]*\n)*", re.DOTALL)
_AFTER = re.compile(rf"(?:\s|;|{_COMMENT})*(?:--[^\r\n]*)?", re.DOTALL)


@contextmanager
def vouching(texts: Collection[str]) -> Iterator[None]:
    """Vouch for statements with these texts, in the block and what runs in its context.

    The collection may grow in the block.
    """
    outer = _texts.get()
    _texts.set(texts)
    try:
        yield
    finally:
        _texts.set(outer)


def is_vouched(query: object) -> bool:
    """Tell whether somebody vouches for a statement with this text, or with comments around it."""
    texts = _texts.get()
    if not texts or not isinstance(query, str):
        return False
    return query in texts or any(_is_commented(query, text) for text in texts)


def _is_commented(query: str, text: str) -> bool:
    before, found, after = query.partition(text)
    return bool(found and _BEFORE.fullmatch(before) and _AFTER.fullmatch(after))
