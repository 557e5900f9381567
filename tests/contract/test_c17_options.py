"""Tests C17: options are checked at the start, and functions are asked for them at each connect."""

from __future__ import annotations

import asyncio
import io
import itertools
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import iscoroutinefunction
from pathlib import Path
from typing import Any

import psycopg
import pytest
from django.core.checks import run_checks
from django.core.exceptions import ImproperlyConfigured, SynchronousOnlyOperation
from django.core.management import call_command
from django.core.management.base import SystemCheckError
from django.db import OperationalError, connection, connections
from django.views.debug import get_exception_reporter_filter

import pgbackend
from pgbackend import aio, embedded
from pgbackend.base import DatabaseWrapper
from pgbackend.driver.errors import OptionFailed
from pgbackend.driver.pool import Pool
from tests.backend.test_options import password_server  # noqa: F401 - pytest's
from tests.conftest import Runner
from tests.contract.test_c10_errors import (
    CANARY,
    Leaks,
    caught,
    leaks,  # noqa: F401 - pytest's
)
from tests.library.models import Tag
from tests.support.fixtures import pool_of_default, settings_of_default

NOWHERE = {"HOST": "/no/such/directory"}

# --- Wrong options --------------------------------------------------------------------------------

#: Changes of the settings, the id of the check that finds them, the key that it names, its hint.
WRONG: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "a pool of another kind": ({"pool": 3}, "E001", "['pool'] is 3", "Set it to True"),
    "an unknown option of the pool": ({"pool": {"maxsize": 5}}, "E002", "maxsize", "'max_size'?"),
    "a text for a number": ({"pool": {"max_size": "3"}}, "E003", "max_size", "a whole number"),
    "a negative time": ({"pool": {"timeout": -1.0}}, "E003", "timeout", "not negative"),
    "a check that is none": ({"pool": {"check": "yes"}}, "E003", "check", "a function"),
    "sizes that contradict": (
        {"pool": {"min_size": 20, "max_size": 10}},
        "E004",
        "min_size 20 and max_size 10",
        "at least min_size",
    ),
    "no workers": ({"pool": {"num_workers": 0}}, "E004", "num_workers", "at least 1"),
    "another class": ({"pool": {"connection_class": int}}, "E005", "connection_class", "subclass"),
    "a pool with an age": ({"CONN_MAX_AGE": 60}, "E006", "Pooling", "['CONN_MAX_AGE'] to 0"),
    "an unknown reset": ({"session_reset": "no"}, "E007", "session_reset", "'dirty', 'never'"),
    "an unknown level": ({"isolation_level": 99}, "E008", "level 99", "psycopg.IsolationLevel"),
    "a threshold": ({"prepare_threshold": "5"}, "E009", "prepare_threshold", "None, or to a whole"),
    "a misspelt option": ({"sesion_reset": "dirty"}, "E010", "sesion_reset", "'session_reset'?"),
    "libpq's, misspelt": ({"conect_timeout": 2}, "E010", "conect_timeout", "'connect_timeout'?"),
    "a function as a name": ({"NAME": dict}, "E011", "['NAME'] is a function", "only PASSWORD"),
    "a function as a role": ({"assume_role": dict}, "E011", "assume_role", "only PASSWORD"),
    "a number as a primary": ({"replica_of": 1}, "E012", "replica_of", "alias of the primary"),
    "itself as a primary": ({"replica_of": "default"}, "E012", "replica_of", "leave it out"),
    "no primary": ({"replica_of": "nowhere"}, "E013", "no alias", "alias of the primary"),
    "an unknown pooler": ({"pooler": "session"}, "E014", "'session'", "to 'transaction' if"),
    "a pooler and a reset": (
        {"pooler": "transaction", "session_reset": "dirty"},
        "E015",
        "['session_reset'] and DATABASES['default']['OPTIONS']['pooler'] contradict",
        "Leave 'session_reset' out",
    ),
    "a text as a switch": ({"commit_id": "yes"}, "E016", "'yes'", "Set it to True"),
    "another database": ({"listen": {"dbname": CANARY}}, "E017", "['listen']", "Leave it out"),
    "a misspelt host": ({"listen": {"hots": CANARY}}, "E017", "no option 'hots'", "'host'?"),
    "no connection string": ({"listen": CANARY}, "E017", "libpq cannot read", "a dictionary"),
    "a list": ({"sslpassword": [CANARY]}, "E011", "sslpassword", "a text, a number"),
}
#: Settings whose values are all right, beside the project's own.
RIGHT: dict[str, Any] = {
    "pool": {"min_size": 1, "max_size": None, "timeout": 2.5, "max_idle": float("inf")},
    "passfile": Path("passfile"),
    "service": "",
    "application_name": lambda: "asked",
    "keepalives_idle": 30,
    "sslmode": "prefer",
    "server_side_binding": True,
    "prepare_threshold": 5,
    "isolation_level": psycopg.IsolationLevel.SERIALIZABLE,
    "assume_role": None,
    "session_reset": "never",
    "commit_id": True,
    "listen": "host=db1.example.org port=5432",
    "pooler": "transaction",
    "cursor_factory": psycopg.Cursor,
}


@contextmanager
def changed(changes: dict[str, Any]) -> Iterator[None]:
    """Change the options of 'default', or what is beside them if the key is in capitals."""
    given = connections.settings["default"]
    top = {key: value for key, value in changes.items() if key.isupper()}
    options = {key: value for key, value in changes.items() if not key.isupper()}
    with settings_of_default(**top, OPTIONS={**given["OPTIONS"], **options}):
        connections["default"].close()
        yield
    connections["default"].close()


def sync_error() -> BaseException:
    """Return the error of a query on a new connection, in sync code."""
    other = connections["default"].copy()
    try:
        return caught(other.ensure_connection)
    finally:
        other.close()


@pytest.mark.parametrize("name", WRONG)
def test_each_wrong_option_is_found_by_a_check_that_connects_to_nothing(name: str) -> None:
    changes, number, key, hint = WRONG[name]
    with changed({**NOWHERE, **changes}):
        found = [message for message in run_checks() if str(message.id).startswith("pgbackend.E")]
    assert [message.id for message in found] == [f"pgbackend.{number}"]
    assert key in found[0].msg and hint in str(found[0].hint)
    assert CANARY not in str(found[0])


def test_a_wrong_option_ends_manage_py_check() -> None:
    with changed({"sesion_reset": "always"}), pytest.raises(SystemCheckError, match="E010"):
        call_command("check", databases=["default"], stdout=io.StringIO())


@pytest.mark.parametrize("name", ["check", "reset", "reconnect_failed"])
def test_a_coroutine_function_of_the_pool_is_refused_in_sync_code(run: Runner, name: str) -> None:
    async def function(_: object) -> None:
        pass

    with pool_of_default(min_size=0, **{name: function}):
        connection.close()
        connection.close_pool()  # of other options
        try:
            (found,) = [each for each in run_checks() if each.id == "pgbackend.W002"]
            with pytest.raises(ImproperlyConfigured, match="coroutine function") as caught:
                connection.ensure_connection()
            assert str(caught.value) == f"{found.msg} {found.hint}"
            assert run(Tag.objects.acount()) == 0
        finally:
            connection.close_pool()


def test_right_options_are_found_by_no_check() -> None:
    with changed(RIGHT):
        assert not [message for message in run_checks() if "pgbackend.E" in str(message.id)]


@pytest.mark.parametrize("name", WRONG)
def test_sync_and_async_code_raise_the_same_error_for_a_wrong_option(
    run_once: Runner, name: str
) -> None:
    changes, _, key, _ = WRONG[name]
    with changed({**NOWHERE, **changes}):
        errors = [sync_error(), run_once.green(caught, Tag.objects.count)]
        errors.append(run_once.green(sync_error))
        assert not connections["default"].settings_dict["TEST"]["MIRROR"]
    assert {type(error) for error in errors} == {ImproperlyConfigured}
    assert len({str(error) for error in errors}) == 1 and key in str(errors[0])
    assert CANARY not in str(errors[0])


def test_each_check_is_documented_once() -> None:
    page = Path(__file__).parents[2].joinpath("docs/checks.md").read_text()
    named = re.findall(r"^\| `(pgbackend\.E\d+)`", page, re.MULTILINE)
    assert named == sorted(set(named))
    assert set(named) == {f"pgbackend.{number}" for _, number, _, _ in WRONG.values()}


@pytest.mark.parametrize(
    "pool", [True, {"max_size": 1}, {"max_size": 2}, {"min_size": 0}, {"min_size": 1}], ids=str
)
def test_one_size_of_the_pool_is_enough_everywhere(run: Runner, pool: Any) -> None:
    with changed({"pool": pool, "CONN_MAX_AGE": 0}):
        assert run.green(Tag.objects.count) == 0
        with new_wrapper("synchronous pool") as wrapper, wrapper.cursor() as cursor:
            cursor.execute("SELECT 1")
            assert wrapper.pool.min_size <= wrapper.pool.max_size


# --- Functions as options -------------------------------------------------------------------------

CONTEXTS = ["by the pool", "green", "sync", "synchronous pool"]


@contextmanager
def new_wrapper(context: str, cls: type[DatabaseWrapper] | None = None) -> Iterator[Any]:
    """Make a wrapper that connects as sync code does in `context`."""
    settings_dict = {**connections.settings["default"], "CONN_MAX_AGE": 0}
    given = settings_dict["OPTIONS"].get("pool", {})
    options = {key: value for key, value in settings_dict["OPTIONS"].items() if key != "pool"}
    if context == "synchronous pool":
        options["pool"] = given or {"min_size": 0, "max_size": 3, "timeout": 5.0}
    settings_dict["OPTIONS"] = options
    wrapper = (cls or type(connections["default"]))(settings_dict, context)
    try:
        yield wrapper
    finally:
        wrapper.close()
        if context == "synchronous pool":
            wrapper.close_pool()


def connect(
    context: str, run: Runner, times: int = 1, cls: type[DatabaseWrapper] | None = None
) -> list[Any]:
    """Make new connections in `context`; return what psycopg knows of each, as `info`."""

    def on_the_pool() -> list[Any]:
        wrapper = cls(connections.settings["default"], "default") if cls else connection
        made = []
        for _ in range(times):
            wrapper._async_pool().renew()  # type: ignore[union-attr]
            with wrapper.cursor() as cursor:
                made.append(described(cursor.connection))
        return made

    def by_itself() -> list[Any]:
        made = []
        for _ in range(times):
            with new_wrapper(context, cls) as wrapper:
                wrapper.ensure_connection()
                made.append(described(wrapper.connection))
        return made

    if context == "by the pool":
        found: list[Any] = run.green(on_the_pool)
        return found
    return run.green(by_itself) if context == "green" else by_itself()  # type: ignore[no-any-return]


def described(raw: psycopg.Connection[Any]) -> dict[str, Any]:
    """Return the parameters that `raw` was opened with, and its password."""
    return {**raw.info.get_parameters(), "password": raw.info.password}


class Tokens:
    """Gives a new password each time, as a function of any form; notes how it was called."""

    def __init__(self) -> None:
        self.numbers = itertools.count(1)
        self.threads: list[int] = []
        self.lock = threading.Lock()  # as clients of vaults have, which cannot be copied

    def give(self) -> str:
        self.threads.append(threading.get_ident())
        return f"token-{next(self.numbers)}"

    async def give_later(self) -> str:
        await asyncio.sleep(0)
        return self.give()

    def forms(self) -> dict[str, Callable[[], Any]]:
        class Asynchronous:
            async def __call__(me) -> str:  # noqa: N805
                return await self.give_later()

        return {
            "function": self.give,
            "coroutine function": self.give_later,
            "object": Asynchronous(),
            "function that returns an awaitable": lambda: self.give_later(),  # noqa: PLW0108 - no coroutine function
        }


@pytest.mark.parametrize("form", Tokens().forms())
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_function_is_asked_for_the_password_of_each_connection(
    run: Runner, context: str, form: str
) -> None:
    tokens = Tokens()
    with settings_of_default(PASSWORD=tokens.forms()[form]):
        used = [made["password"] for made in connect(context, run, 3)]
    assert used == ["token-1", "token-2", "token-3"]
    assert len(tokens.threads) == 3, "and asked for no other reason"


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_derived_wrapper_is_asked_for_the_parameters_of_each_connection(
    run: Runner, context: str
) -> None:
    tokens = Tokens()

    class Derived(DatabaseWrapper):
        def get_connection_params(self) -> dict[str, Any]:
            if self.connection is not None:
                return {}
            return {**super().get_connection_params(), "password": tokens.give()}

    used = [made["password"] for made in connect(context, run, 3, Derived)]
    assert len(set(used)) == 3


@pytest.mark.parametrize("context", CONTEXTS)
def test_any_option_of_a_connection_may_be_a_function(run: Runner, context: str) -> None:
    given = connections.settings["default"]
    values = {"USER": given["USER"], "HOST": given["HOST"], "PORT": given["PORT"]}

    async def name() -> str:
        return "asked"

    functions = {key: lambda value=value: value for key, value in values.items()}
    with changed({**functions, "application_name": name, "connect_timeout": lambda: 7}):
        (made,) = connect(context, run)
    assert (made["application_name"], made["connect_timeout"]) == ("asked", "7")
    assert made["user"] == values["USER"] and made.get("host", "") == values["HOST"]


def test_a_rotated_password_is_used_without_a_restart(
    run: Runner,
    password_server: str,  # noqa: F811
) -> None:
    given = embedded.database_settings(password_server)
    password = ["right"]

    def read() -> Any:
        with connection.cursor() as cursor:
            cursor.execute("SELECT current_user")
            return cursor.fetchone()

    async def main() -> None:
        assert await aio.run(read) == ("careful",)
        with psycopg.connect(admin_url, autocommit=True) as admin:
            admin.execute("ALTER ROLE careful PASSWORD 'n3w'")
            admin.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                " WHERE usename = 'careful'"
            )
        password[0] = "n3w"
        assert await aio.run(read) == ("careful",)

    admin_url = password_server.replace("careful:right@", "postgres@")
    with settings_of_default(**{**given, "PASSWORD": lambda: password[0]}):
        run(main())


# --- Where functions run --------------------------------------------------------------------------


def test_a_function_that_blocks_holds_no_other_task_up(run: Runner) -> None:
    asked, answered = threading.Event(), threading.Event()

    def slow() -> str:
        asked.set()
        return "in time" if answered.wait(10) else "the loop was blocked"

    class Derived(DatabaseWrapper):
        def get_connection_params(self) -> dict[str, Any]:
            return {**super().get_connection_params(), "application_name": slow()}

    async def main(wrapper: Any) -> Any:
        def read() -> str:
            with wrapper.cursor() as cursor:
                return str(described(cursor.connection)["application_name"])

        reading = asyncio.create_task(aio.run(read))
        while not asked.is_set():
            await asyncio.sleep(0)
        answered.set()  # the loop goes on while the function waits
        return await reading

    with changed({"application_name": slow}):
        assert run(main(connection)) == "in time"
    asked.clear(), answered.clear()
    assert run(main(Derived(connections.settings["default"], "default"))) == "in time"


@pytest.mark.parametrize("derives", [False, True])
def test_a_coroutine_function_runs_on_the_loop_of_the_pool(run: Runner, derives: bool) -> None:
    loops: list[object] = []

    class Derived(DatabaseWrapper):
        def get_connection_params(self) -> dict[str, Any]:
            return super().get_connection_params()

    async def password() -> str:
        loops.append(asyncio.get_running_loop())
        return "token"

    async def main() -> object:
        def read() -> None:
            wrapper = Derived(connections.settings["default"], "default") if derives else connection
            wrapper.cursor().close()

        await aio.run(read)
        return asyncio.get_running_loop()

    with settings_of_default(PASSWORD=password):
        assert loops == [run(main())]


def test_a_coroutine_function_is_refused_on_the_bare_loop(run: Runner) -> None:
    async def password() -> str:
        return CANARY

    async def main() -> None:
        with pytest.raises(SynchronousOnlyOperation, match=r"\['PASSWORD'\].*pgbackend.aio.run"):
            connection.get_connection_params()
        assert (await aio.run(connection.get_connection_params))["password"] == CANARY

    with settings_of_default(PASSWORD=password):
        run(main())


# --- Functions that fail --------------------------------------------------------------------------


class VaultIsSealed(Exception):
    pass


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("context", CONTEXTS)
def test_the_error_of_a_function_is_the_cause_and_shows_no_secret(
    run: Runner,
    leaks: Leaks,  # noqa: F811
    context: str,
    asynchronous: bool,
) -> None:
    def password() -> str:
        secret = CANARY
        raise VaultIsSealed(f"after {len(secret)} characters")

    async def password_later() -> str:
        return password()

    function = password_later if asynchronous else password
    pool = {"min_size": 0, "max_size": 1, "timeout": 0.3}

    def fail() -> BaseException:
        if context == "by the pool":
            return caught(Tag.objects.count)
        with new_wrapper(context) as wrapper:
            return caught(wrapper.ensure_connection)

    with changed({"PASSWORD": function, "pool": pool, "CONN_MAX_AGE": 0}):
        error = run.green(fail) if context in ("by the pool", "green") else fail()
    assert isinstance(error, OperationalError)
    failed = error.__cause__
    while not isinstance(failed, OptionFailed):  # a synchronous pool has an error of its own
        assert context == "synchronous pool" and isinstance(failed, psycopg.OperationalError)
        failed = failed.__cause__
    assert "DATABASES" in str(failed) and "VaultIsSealed: after 6 characters" in str(failed)
    cause = failed.__cause__
    assert isinstance(cause, VaultIsSealed) and cause.__traceback__ is not None
    trace, names = cause.__traceback__, []
    while trace is not None:
        names.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next  # type: ignore[assignment]
    assert names[-1] == "password", "the traceback says where"
    leaks.show(error)
    leaks.check()


def test_each_task_that_waits_gets_the_error_of_the_function(run: Runner) -> None:
    async def main() -> None:
        asked = asyncio.Event()

        async def password() -> str:
            await asked.wait()
            raise VaultIsSealed("connection refused")  # which is no outage of the database

        with settings_of_default(PASSWORD=password):
            tasks = [asyncio.create_task(aio.run(caught, Tag.objects.count)) for _ in range(5)]
            while not pgbackend.statistics() or pgbackend.statistics()[0].waiting < 5:
                await asyncio.sleep(0)
            asked.set()
            errors: list[Any] = await asyncio.gather(*tasks)
        assert {type(error.__cause__.__cause__) for error in errors} == {VaultIsSealed}
        assert len(set(map(id, errors))) == 5

    run(main())


@pytest.mark.parametrize("context", ["by the pool", "sync"])
def test_what_is_no_value_is_refused_and_not_shown(
    run: Runner,
    leaks: Leaks,  # noqa: F811
    context: str,
) -> None:
    def improper() -> str:
        raise ImproperlyConfigured("VAULT_ADDR is not set")

    for function, text in (
        (lambda: {"password": CANARY}, r"\['PASSWORD'\] returned a dict. It must return a text"),
        (improper, "VAULT_ADDR is not set"),
    ):
        with settings_of_default(PASSWORD=function), new_wrapper("sync") as wrapper:
            if context == "sync":
                error = caught(wrapper.ensure_connection)
            else:
                error = run.green(caught, Tag.objects.count)
        assert isinstance(error, ImproperlyConfigured) and re.search(text, str(error)), repr(error)
        leaks.show(error)
    leaks.check()


@pytest.mark.sweep(one_in=2)
def test_a_function_that_hangs_is_told_and_takes_two_threads_at_most(
    run_once: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pool, "_limit", lambda self: 0.05)
    monkeypatch.setattr("pgbackend.driver.attempts.FAILURE_WINDOW", 0.0)
    ended, calls = threading.Event(), itertools.count(1)

    def password() -> str:
        next(calls)
        ended.wait(20)
        return "late"

    def fails() -> list[BaseException]:
        found = []
        while len(found) < 3 or "is not called again" not in str(found[-1]):
            found.append(caught(Tag.objects.count))
        return found

    with settings_of_default(PASSWORD=password):
        errors = run_once.green(fails)
        ended.set()
    assert {type(error.__cause__) for error in errors} == {OptionFailed}
    assert "did not return within 0.05 s" in str(errors[0])
    assert "2 earlier calls have not returned" in str(errors[-1])
    assert next(calls) == 3


@pytest.mark.parametrize("function_fails", [False, True])
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_derived_wrappers_parameters_are_not_shown(
    run: Runner,
    leaks: Leaks,  # noqa: F811
    context: str,
    function_fails: bool,
) -> None:
    class Derived(DatabaseWrapper):
        def get_connection_params(self) -> dict[str, Any]:
            params = {"password": CANARY}
            if function_fails:
                raise VaultIsSealed
            return {**super().get_connection_params(), **params}

        def get_new_connection(self, conn_params: dict[str, Any]) -> Any:
            return super().get_new_connection(conn_params)

    def fail() -> None:
        if context == "by the pool":
            wrapper = Derived(connections.settings["default"], "default")
            leaks.show(caught(wrapper.cursor))
            return
        with new_wrapper(context, Derived) as wrapper:
            leaks.show(caught(wrapper.ensure_connection))

    pool = {"min_size": 0, "max_size": 1, "timeout": 0.3}
    with changed({**NOWHERE, "pool": pool, "CONN_MAX_AGE": 0}):
        run.green(fail) if context in ("by the pool", "green") else fail()
    leaks.check()


# --- Elsewhere ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["value", "function", "derived"])
def test_psql_gets_the_password_in_a_file_and_not_in_its_environment(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    secret = "p:a\\s:s"
    seen: dict[str, Any] = {}

    class Derived(DatabaseWrapper):
        def get_connection_params(self) -> dict[str, Any]:
            return {**super().get_connection_params(), "password": secret}

    def psql(args: list[str], *, env: dict[str, str], **options: Any) -> None:
        path = Path(env["PGPASSFILE"])
        seen.update(args=args, env=env, path=path)
        seen.update(text=path.read_text(), mode=path.stat().st_mode & 0o777)

    monkeypatch.setattr(subprocess, "run", psql)
    monkeypatch.setenv("PGPASSWORD", "another's")
    given = {"value": secret, "function": lambda: secret, "derived": ""}[kind]
    with settings_of_default(PASSWORD=given):
        cls = Derived if kind == "derived" else DatabaseWrapper
        cls(connections.settings["default"], "default").client.runshell(["-c", "SELECT 1"])
    assert seen["text"] == "*:*:*:*:p\\:a\\\\s\\:s\n" and seen["mode"] == 0o600
    assert secret not in str(seen["args"]) + str(seen["env"])
    assert seen["env"]["PGPASSWORD"] == "", "psql would prefer it to the file"
    assert not seen["path"].exists(), "the file is gone"
    assert os.environ["PGPASSWORD"] == "another's"


def test_psqls_arguments_have_the_values_of_functions() -> None:
    given = {"PASSWORD": lambda: "token", "USER": lambda: "me", "OPTIONS": {"sslkey": lambda: "k"}}
    settings_dict = {**connections.settings["default"], **given}
    args, env = connection.client.settings_to_cmd_args_env(settings_dict, [])
    assert args[:3] == ["psql", "-U", "me"] and env == {"PGPASSWORD": "token", "PGSSLKEY": "k"}


def test_a_copied_wrapper_shares_the_function() -> None:
    tokens = Tokens()
    with settings_of_default(PASSWORD=tokens.give):
        assert connection.copy().get_connection_params()["password"] == "token-1"
    assert next(tokens.numbers) == 2


def test_the_debug_page_asks_no_function() -> None:
    tokens = Tokens()
    with settings_of_default(PASSWORD=tokens.give, USER=tokens.give):
        shown = repr(get_exception_reporter_filter(None).get_safe_settings()["DATABASES"])
    assert "token" not in shown and not tokens.threads


def test_test_databases_are_made_with_the_values_of_functions() -> None:
    tokens = Tokens()
    assert not iscoroutinefunction(tokens.give)
    with changed({"PASSWORD": tokens.give, "application_name": tokens.give_later}):
        with connection.creation._nodb_cursor() as cursor:
            cursor.execute("SELECT current_setting('application_name'), current_database()")
            assert cursor.fetchone() == ("token-1", "postgres")
