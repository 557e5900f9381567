"""Part of the shortcut `statements`: what Django's compilers get in the place of a cursor.

A compiler says (`Session.at_once`) that it asks for its cursor next, executes one statement and
fetches all of its rows: then a `StatementCursor` does for one.
"""

from __future__ import annotations

from pgbackend import state
from pgbackend.driver.bridge import Portal
from pgbackend.statements import StatementCursor, can_execute
from pgbackend.wrapper.cursors import Cursors


def cursor_for_compiler(self: Cursors, here: Portal) -> StatementCursor | None:
    """Return a cursor for the next statement only, if a compiler has said what it will do."""
    session = state.find(here, self).session
    if session is None or not session.at_once:
        return None
    session.at_once = False
    if not can_execute(self):
        return None
    session.compiled = False
    return StatementCursor(self)


def install() -> None:
    """Put the cursors of single statements into the seam for them."""
    Cursors.cursor_for_compiler = cursor_for_compiler  # type: ignore[method-assign]
