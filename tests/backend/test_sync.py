"""Tests that sync code is untouched: one connection a thread, kept as Django keeps it."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import threading
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.db import connection, connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.postgresql.base import DatabaseWrapper as StockWrapper

import pgbackend
from tests.library.models import Tag


def test_a_thread_keeps_its_connection() -> None:
    Tag.objects.create(name="a")
    first = connection.connection
    assert first is not None and not first.closed
    assert Tag.objects.count() == 1
    assert connection.connection is first
    assert pgbackend.statistics() == []


def without_pool(**changes: Any) -> Any:
    """Make a wrapper for the same database, of the kind that `connections` makes."""
    settings_dict = copy.deepcopy(connections.settings["default"])
    settings_dict["OPTIONS"].pop("pool")
    return type(connections["default"])({**settings_dict, **changes}, alias="other")


def test_each_thread_has_a_connection_of_its_own() -> None:
    Tag.objects.count()
    theirs: list[Any] = []

    def other() -> None:
        Tag.objects.count()
        theirs.append(connection.connection)
        connection.close()

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert theirs[0] is not connection.connection


def test_conn_max_age_is_honoured() -> None:
    wrapper = without_pool(CONN_MAX_AGE=3600)
    with wrapper.cursor() as cursor:
        cursor.execute("SELECT 1")
    raw = wrapper.connection
    wrapper.close_if_unusable_or_obsolete()
    assert wrapper.connection is raw, "not old enough"
    wrapper.close_at = 0.0
    wrapper.close_if_unusable_or_obsolete()
    assert raw.closed and wrapper.connection is None


def test_health_checks_replace_a_dead_connection(admin: Any) -> None:
    wrapper = without_pool(CONN_MAX_AGE=None, CONN_HEALTH_CHECKS=True)
    with wrapper.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        (pid,) = cursor.fetchone()
    admin.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
    wrapper.close_if_unusable_or_obsolete()  # as at the end of a request
    with wrapper.cursor() as cursor:
        cursor.execute("SELECT 1")
    wrapper.close()


def test_atomic_and_its_state_are_djangos() -> None:
    with transaction.atomic():
        assert connection.in_atomic_block and not connection.autocommit
        with transaction.atomic():
            assert len(connection.savepoint_ids) == 1
            Tag.objects.create(name="a")
        assert connection.savepoint_ids == []
        transaction.set_rollback(True)
    assert not connection.in_atomic_block and connection.autocommit
    assert not Tag.objects.exists()


def test_a_doomed_block_refuses_statements_of_every_context() -> None:
    def count() -> None:
        with pytest.raises(transaction.TransactionManagementError, match="atomic"):
            Tag.objects.count()

    with transaction.atomic():
        transaction.set_rollback(True)
        contextvars.Context().run(count)  # this context does not know of the block
        count()


def test_server_side_cursors_stream() -> None:
    Tag.objects.bulk_create(Tag(name=str(n)) for n in range(10))
    rows = Tag.objects.iterator(chunk_size=3)
    next(rows)
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_cursors WHERE name LIKE '_django_curs%'")
        assert cursor.fetchone() == (1,)
    assert len(list(rows)) == 9


def test_the_synchronous_pool_is_djangos() -> None:
    settings_dict = copy.deepcopy(connections.settings["default"])
    settings_dict["OPTIONS"]["pool"] = {"min_size": 0, "max_size": 1, "timeout": 0.2}
    settings_dict["CONN_MAX_AGE"] = 0
    first, second = (
        type(connections["default"])(settings_dict, alias="sync pool") for _ in range(2)
    )
    try:
        with first.cursor() as cursor:
            cursor.execute("SELECT 1")
        with pytest.raises(Exception, match="couldn't get a connection"):
            second.cursor()
        first.close()
        with second.cursor() as cursor:
            cursor.execute("SELECT 1")
    finally:
        first.close()
        second.close()
        first.close_pool()


@pytest.mark.parametrize("health_checks", [False, True])
def test_the_synchronous_pool_calls_the_check_that_it_is_given(health_checks: bool) -> None:
    checked: list[Any] = []
    settings_dict = copy.deepcopy(connections.settings["default"])
    settings_dict["OPTIONS"]["pool"] = {"min_size": 0, "max_size": 1, "check": checked.append}
    settings_dict["CONN_MAX_AGE"] = 0
    settings_dict["CONN_HEALTH_CHECKS"] = health_checks
    wrapper = type(connections["default"])(settings_dict, alias="sync pool")
    try:
        for number in range(3):
            with wrapper.cursor() as cursor:
                cursor.execute("SELECT 1")
                assert len(checked) == number + 1
            wrapper.close()
    finally:
        wrapper.close()
        wrapper.close_pool()


def test_a_copy_has_a_connection_of_its_own() -> None:
    Tag.objects.count()
    other = connection.copy()
    try:
        with other.cursor() as cursor:
            cursor.execute("SELECT 1")
        assert other.connection is not connection.connection
    finally:
        other.close()
    assert not connection.connection.closed


def test_every_name_of_djangos_wrapper_is_there() -> None:
    """Packages use these names; none of Django's may be missing, or be of another kind."""
    stock = {name for name in dir(StockWrapper) if not name.startswith("__")}
    assert stock <= set(dir(type(connections["default"])))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("isolation_level", 999, "Invalid transaction isolation level 999"),
    ],
)
def test_bad_options_of_the_connection(option: str, value: Any, message: str) -> None:
    settings_dict = copy.deepcopy(connections.settings["default"])
    settings_dict["OPTIONS"] = {option: value}
    wrapper = type(connections["default"])(settings_dict, alias="bad")
    with pytest.raises(ImproperlyConfigured, match=message):
        wrapper.ensure_connection()


def test_a_patch_of_a_method_may_call_the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    ensure_connection = connection.ensure_connection
    calls: list[Any] = []

    def patch(wrapper: Any) -> None:
        calls.append(wrapper)
        ensure_connection()

    monkeypatch.setattr(BaseDatabaseWrapper, "ensure_connection", patch)
    connection.close()
    assert Tag.objects.count() == 0
    assert calls and set(calls) == {connections["default"]}


def test_a_patch_that_refuses_the_database_refuses_an_open_connection_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """pytest-django patches so, for tests that are not marked."""

    def refuse(wrapper: Any) -> None:
        raise AssertionError("refused")

    Tag.objects.count()
    assert connection.connection is not None
    for within in (contextlib.nullcontext, transaction.atomic):
        with within(), monkeypatch.context() as patches:
            patches.setattr(BaseDatabaseWrapper, "ensure_connection", refuse)
            with pytest.raises(AssertionError, match="refused"):
                Tag.objects.count()
    assert Tag.objects.count() == 0
