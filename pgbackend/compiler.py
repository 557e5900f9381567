"""SQL compilers that say which statements the ORM made.

A statement that the ORM compiled leaves nothing in its session, so the connection can go to the
next task as it is; after any other, the session is reset (contract C9). The cursor of a compiled
statement is closed by the compiler as soon as the result is in memory, and the lease ends with it.
"""

from __future__ import annotations

from typing import Any

from django.db.backends.postgresql import compiler

#: Since Django 6.1 a compiler quotes every name as its operations do.
_QUOTES_ALIKE = hasattr(compiler.SQLCompiler, "quote_name")


class CompiledStatement:
    """A compiler whose statements are marked as compiled by the ORM."""

    connection: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if _QUOTES_ALIKE:
            # Django's keeps a dictionary for each statement, in front of what is kept anyway.
            self.quote_name = self.connection.ops.quote_name

    def execute_sql(self, *args: Any, **kwargs: Any) -> Any:
        session = self.connection.async_session()
        if session is None:
            return super().execute_sql(*args, **kwargs)  # type: ignore[misc]
        # The next cursor takes the mark. Compiling may run statements of its own before that.
        outer, session.compiled, session.cursor = (session.compiled, session.cursor), True, None
        try:
            return super().execute_sql(*args, **kwargs)  # type: ignore[misc]
        except BaseException:
            # Django closes the cursor for an Exception, which a cancellation is not; the
            # traceback would keep it, and its lease, for as long as somebody keeps that.
            if session.cursor is not None:
                session.cursor.close()
            raise
        finally:
            session.compiled, session.cursor = outer


class SQLCompiler(CompiledStatement, compiler.SQLCompiler):
    pass


class SQLInsertCompiler(CompiledStatement, compiler.SQLInsertCompiler):
    pass


class SQLDeleteCompiler(CompiledStatement, compiler.SQLDeleteCompiler):
    pass


class SQLUpdateCompiler(CompiledStatement, compiler.SQLUpdateCompiler):
    def execute_returning_sql(self, returning_fields: Any) -> Any:  # Django 6.0 and later
        session = self.connection.async_session()
        if session is None:
            return super().execute_returning_sql(returning_fields)
        outer, session.compiled = session.compiled, True
        try:
            return super().execute_returning_sql(returning_fields)
        finally:
            session.compiled = outer


class SQLAggregateCompiler(CompiledStatement, compiler.SQLAggregateCompiler):
    pass
