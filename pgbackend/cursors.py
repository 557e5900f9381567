"""`CursorWrapper`: Django's, a little shorter."""

from __future__ import annotations

from typing import Any

from django.db.backends import utils


class CursorWrapper(utils.CursorWrapper):
    """Django's, with the methods spelled out that it wraps anew each time they are looked up.

    Not `execute()` and its like, which Django spells out: tools that watch statements patch them
    where they are.
    """

    cursor: Any
    db: Any

    def fetchone(self) -> Any:
        with self.db.wrap_database_errors:
            return self.cursor.fetchone()

    def fetchmany(self, *args: Any, **kwargs: Any) -> Any:
        with self.db.wrap_database_errors:
            return self.cursor.fetchmany(*args, **kwargs)

    def fetchall(self) -> Any:
        with self.db.wrap_database_errors:
            return self.cursor.fetchall()

    def close(self) -> None:
        self.cursor.close()
