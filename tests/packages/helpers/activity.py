"""Uses django-pgactivity: timeouts, contexts in statements, the list of running statements."""

from __future__ import annotations

from io import StringIO

import pgactivity
import pytest
from django.core.management import call_command
from django.db import OperationalError, connection
from pgactivity.models import PGActivity

from tests.packages.helpers.contexts import Meeting, at_once
from tests.packages.helpers.models import Part
from tests.packages.project import green

PACKAGE = "django-pgactivity"


def shown(setting: str) -> str:
    with connection.cursor() as cursor:
        cursor.execute(f"SHOW {setting}")
        return cursor.fetchone()[0]


def sleep(seconds: float) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_sleep(%s)", [seconds])


def a_timeout_ends_a_statement() -> None:
    with pytest.raises(OperationalError, match="statement timeout"):
        with pgactivity.timeout(milliseconds=20):
            sleep(20)
    assert shown("statement_timeout") == "0"


def timeouts_nest_and_end() -> None:
    with pgactivity.timeout(seconds=5):
        with pgactivity.timeout(seconds=7):
            Part.objects.count()
            assert shown("statement_timeout") == "7s"
        assert shown("statement_timeout") == "5s"
    assert shown("statement_timeout") == "0"


def timeouts_do_not_mix() -> None:
    meeting = Meeting(3)

    def seen(seconds: int | None) -> str:
        if seconds is None:
            meeting.wait()
            return shown("statement_timeout")
        with pgactivity.timeout(seconds=seconds):
            meeting.wait()
            return shown("statement_timeout")

    assert at_once(lambda: seen(5), lambda: seen(7), lambda: seen(None)) == ["5s", "7s", "0"]


def contexts_do_not_mix() -> None:
    """Each statement carries the context of its own task, read from the server's list."""
    meeting = Meeting()

    def seen(name: str) -> object:
        with pgactivity.context(user=name):
            meeting.wait()
            with connection.cursor() as cursor:
                cursor.execute("SELECT query FROM pg_stat_activity WHERE pid = pg_backend_pid()")
                return name in cursor.fetchone()[0]

    assert at_once(lambda: seen("ann"), lambda: seen("bob")) == [True, True]
    with connection.cursor() as cursor:
        cursor.execute("SELECT query FROM pg_stat_activity WHERE pid = pg_backend_pid()")
        assert "pga_context" not in cursor.fetchone()[0]


def the_command_lists_statements() -> None:
    out = StringIO()
    with pgactivity.context(page="list"):
        call_command("pgactivity", stdout=out)
    assert "{'page': 'list'}" in out.getvalue(), out.getvalue()


def a_statement_is_cancelled_by_its_context() -> None:
    """One runs long; the other finds it by its context, and cancels it."""

    def run() -> str:
        try:
            with pgactivity.context(job="long"):
                sleep(20)
        except OperationalError as exc:
            return exc.__cause__.sqlstate
        return "slept"

    def cancel() -> list[int]:
        while True:
            found = PGActivity.objects.filter(context__job="long").cancel()
            if found:
                return found

    assert at_once(run, cancel)[0] == "57014"


CASES = [
    a_timeout_ends_a_statement,
    timeouts_nest_and_end,
    timeouts_do_not_mix,
    contexts_do_not_mix,
    the_command_lists_statements,
    a_statement_is_cancelled_by_its_context,
]


async def a_timeout_holds_in_green_code_of_an_async_view() -> None:
    await green(a_timeout_ends_a_statement)
    assert await green(shown, "statement_timeout") == "0"


ASYNC_CASES = [a_timeout_holds_in_green_code_of_an_async_view]
