"""Tests `manage.py pgbackend sum`: it adds up the connections that the settings allow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import StringIO
from typing import Any

import psycopg
import pytest
from django.core.management import call_command
from django.core.management.base import CommandError
from django.db import connections

from pgbackend.fast.registry import SHORTCUTS
from pgbackend.management.commands.pgbackend import Command
from pgbackend.operating import sums
from pgbackend.operating.sums import Load
from tests.operating.test_check import NOWHERE, USUAL, configured, server, words


def said(*arguments: str) -> tuple[int, str]:
    """Return the exit status of ``manage.py pgbackend`` with `arguments`, and its output."""
    out = StringIO()
    try:
        call_command(Command(), *arguments, stdout=out)
    except SystemExit as exc:
        return int(str(exc.code)), out.getvalue()
    return 0, out.getvalue()


def total(load: Load, **pool: Any) -> int | None:
    """Return the connections of one process, with these options of the pool."""
    with configured(pool):
        return sums.of_process("default", load).total


@pytest.mark.parametrize(
    ("expected", "load", "pool"),
    [
        (10 + 1, Load(), {"pool": {}}),
        (3 * 10 + 5, Load(loops=3, threads=5), {"pool": {}}),
        (4 + 4, Load(threads=9), {"pool": {"max_size": 4}}),
        (4 + 4, Load(), {"pool": {"min_size": 4, "max_size": None}}),
        (10 + 4, Load(), {"pool": True}),
        (0 + 8, Load(loops=0, threads=8), {"pool": {}}),
        (10, Load(threads=0), {"pool": {"max_size": 10}}),
        (10 + 1 + 1, Load(listens=True), {"pool": {}}),
        (None, Load(), {"pool": None}),
        (2, Load(loops=0, threads=2), {"pool": None}),
    ],
)
def test_a_process_may_open_so_many(expected: int | None, load: Load, pool: dict[str, Any]) -> None:
    assert total(load, **pool) == expected


def test_the_synchronous_pool_has_the_size_that_is_counted() -> None:
    for pool in (True, {"max_size": 2}, {"min_size": 0}, {"min_size": 3}, {"max_size": 7}):
        given: Any = pool if pool is True else {**pool}
        with configured({"pool": given}):
            counted = sums.of_process("default", Load(loops=0)).total
            wrapper: Any = connections["default"].copy("counted")
            try:
                assert wrapper.pool.max_size == counted
            finally:
                wrapper.close_pool()


def test_connections_are_compared_with_the_servers() -> None:
    status, text = said("sum", "--database", "default", "--processes", "3", "--loops", "2")
    assert status == 0
    # tests/settings.py: async pools of 4 on two loops, and a synchronous pool of 4.
    assert "default            8     4          0         0         12             36" in text
    assert "3 x 12 = 36 connections may be opened; the server allows" in words(text)


def test_too_many_are_an_error_that_says_what_to_change() -> None:
    status, text = said("sum", "--database", "default", "--processes", "100")
    assert status == 1
    assert "100 x 8 = 800 connections may be opened; the server allows" in words(text)
    for cure in ("max_size'] of DATABASES['default'] to at most 1", "run at most 2", "pooler"):
        assert cure in words(text)


def test_the_size_that_is_advised_fits() -> None:
    _, text = said("sum", "--database", "default", "--processes", "20", "--loops", "3")
    size = int(words(text).split("to at most ")[1].split(",")[0])
    for fits in (True, False):
        with configured({"pool": {"min_size": 0, "max_size": size if fits else size + 1}}):
            status, _ = said("sum", "--database", "default", "--processes", "20", "--loops", "3")
        assert (status == 0) is fits


@pytest.mark.parametrize(
    ("changes", "text", "cure"),
    [
        ({}, "97 (max_connections 100, less superuser_reserved_connections 3)", "to 403 or more"),
        ({"is_superuser": True}, "100 (max_connections 100)", "to 400 or more"),
        ({"is_superuser": True, "role_limit": 2}, "100 (max_connections 100); 3", "to 400 or more"),
        ({"role_limit": 20}, "the role 20", "the CONNECTION LIMIT of the role to 400"),
        ({"database_limit": 0}, "the database 0", "the CONNECTION LIMIT of the database to 400"),
    ],
)
def test_the_limits_of_the_role_and_database_count(
    changes: dict[str, Any], text: str, cure: str
) -> None:
    facts = server.Server(**{**USUAL, **changes})
    one = sums.Sum("default", 9, 1, 0, 0)
    (finding,) = sums.compared([one], Load(processes=40), {"default": facts})
    assert finding.level == "error"
    assert text in finding.text and cure in finding.cure


@pytest.fixture
def limited_role(admin: psycopg.Connection[Any]) -> Iterator[str]:
    """Make a role that may have six connections; return its name."""
    admin.execute("CREATE ROLE limited LOGIN PASSWORD 'right' CONNECTION LIMIT 6")
    yield "limited"
    admin.execute("DROP ROLE limited")


@pytest.mark.django_db(transaction=True)
def test_the_limit_of_a_role_is_found_at_the_server(limited_role: str) -> None:
    with configured(USER=limited_role, PASSWORD="right"):
        status, text = said("check", "--database", "default")
    assert status == 1
    assert "1 x 8 = 8 connections may be opened; the server allows" in words(text)
    assert "the role 6; " in words(text)
    assert "raise the CONNECTION LIMIT of the role to 8" in words(text)
    assert "The role is a superuser" not in text


def test_aliases_of_one_server_are_added_up() -> None:
    facts = server.Server(**USUAL)
    both = [sums.Sum("default", 10, 1, 0, 0), sums.Sum("default", 40, 0, 0, 0)]
    (finding,) = sums.compared(both, Load(), {"default": facts})
    assert "1 x 51 = 51" in finding.text and finding.level == "ok"
    (nearly,) = sums.compared([*both, sums.Sum("default", 40, 0, 0, 0)], Load(), {"default": facts})
    assert nearly.level == "warning" and "side by side" in nearly.cure


def test_listeners_beside_a_pooler_do_not_count_there() -> None:
    one = sums.Sum("default", 10, 1, 2, 0)
    load, facts = Load(processes=2, loops=2, listens=True), {"default": server.Server(**USUAL)}
    (finding,) = sums.compared([one], load, facts)
    assert "2 x 13 = 26" in finding.text
    with configured({"listen": {"host": "elsewhere"}}):
        (finding,) = sums.compared([one], load, facts)
    assert "2 x 11 = 22" in finding.text


def test_a_server_that_cannot_be_asked_is_told_beside_the_sum() -> None:
    with configured(**NOWHERE):
        status, text = said("sum", "--database", "default", "--format", "json")
    shown = json.loads(text)
    assert status == 1 and shown["ok"] is False
    assert shown["sums"][0]["total"] == 8
    assert "nothing listens" in shown["findings"][0]["text"]


def test_an_alias_with_wrong_options_is_told_and_not_added_up() -> None:
    with configured({"pool": {"max_size": "3"}}):
        status, text = said("sum", "--database", "default")
    assert status == 1
    assert "['max_size'] is '3'. -> Set it to a whole number" in " ".join(text.split())


def test_wrong_numbers_are_refused() -> None:
    for wrong in (["--processes", "0"], ["--loops", "-1"], ["--threads", "many"]):
        with pytest.raises(CommandError, match="invalid whole number from"):
            said("sum", *wrong)


def test_shortcuts_are_listed_with_the_reason_of_those_that_are_off() -> None:
    status, text = said("shortcuts", "--format", "json")
    listed = json.loads(text)
    assert status == 0 and [each["name"] for each in listed] == [*SHORTCUTS]
    assert all(each["on"] or each["why_off"] for each in listed)
    _, lines = said("shortcuts")
    assert {line.split()[0] for line in lines.splitlines() if line[0] != " "} == {*SHORTCUTS}
