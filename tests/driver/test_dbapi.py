"""Tests `pgbackend.driver` as a PEP 249 module, and as the `Database` of a Django backend."""

from __future__ import annotations

import datetime
import pickle

import psycopg
import pytest

from pgbackend import driver
from pgbackend.driver import errors


def test_the_module_says_what_pep_249_asks() -> None:
    assert driver.apilevel == "2.0"
    assert driver.threadsafety == 2
    assert driver.paramstyle == "pyformat"


def test_connect_makes_a_connection_of_ours(conninfo: str) -> None:
    with driver.connect(conninfo) as connection:
        assert type(connection) is driver.Connection
        assert isinstance(connection, psycopg.Connection)


@pytest.mark.parametrize(
    "name",
    [
        "Date",
        "Time",
        "Timestamp",
        "DateFromTicks",
        "TimeFromTicks",
        "TimestampFromTicks",
        "Binary",
        "STRING",
        "BINARY",
        "NUMBER",
        "DATETIME",
        "ROWID",
    ],
)
def test_type_objects_and_constructors_are_psycopgs(name: str) -> None:
    assert getattr(driver, name) is getattr(psycopg, name)


def test_the_type_objects_compare_with_type_codes(conninfo: str) -> None:
    with driver.connect(conninfo) as connection:
        cursor = connection.execute("SELECT 'a'::text, 1, now(), '\\x00'::bytea, 1::oid")
        assert cursor.description is not None
        codes = [column.type_code for column in cursor.description]
    kinds = [driver.STRING, driver.NUMBER, driver.DATETIME, driver.BINARY, driver.ROWID]
    assert all(kind == code for kind, code in zip(kinds, codes, strict=True))
    assert driver.Date(2025, 1, 2) == datetime.date(2025, 1, 2)


def test_exceptions_form_pep_249s_hierarchy() -> None:
    assert issubclass(driver.Warning, Exception)
    assert issubclass(driver.Error, Exception)
    assert issubclass(driver.InterfaceError, driver.Error)
    assert issubclass(driver.DatabaseError, driver.Error)
    for name in ["Data", "Operational", "Integrity", "Internal", "Programming", "NotSupported"]:
        assert issubclass(getattr(driver, f"{name}Error"), driver.DatabaseError)


@pytest.mark.parametrize(
    "name", [name for name in vars(psycopg) if name.endswith("Error") or name == "Warning"]
)
def test_exceptions_are_psycopgs_own(name: str) -> None:
    """Code that catches psycopg's exceptions must catch the driver's."""
    assert getattr(driver, name) is getattr(psycopg, name)


@pytest.mark.parametrize(
    "cls, base",
    [
        (errors.LeaseEnded, driver.InterfaceError),
        (errors.PoolTimeout, driver.OperationalError),
        (errors.PoolClosed, driver.OperationalError),
        (errors.PoolQueueFull, driver.OperationalError),
        (errors.OutcomeUnknown, driver.OperationalError),
        (errors.NotGreen, RuntimeError),
        (errors.PortalClosed, RuntimeError),
    ],
)
def test_our_exceptions_have_their_place_in_it(cls: type, base: type) -> None:
    """Errors of run time derive from the driver's `Error`; mistakes in a program do not."""
    assert issubclass(cls, base)
    assert pickle.loads(pickle.dumps(cls("text"))).args == ("text",)


def test_a_connection_has_pep_249s_exceptions_and_methods() -> None:
    for name in ("close", "commit", "rollback", "cursor"):
        assert callable(getattr(driver.Connection, name))
    for name in ("Error", "Warning", "DatabaseError", "IntegrityError", "NotSupportedError"):
        assert getattr(driver.Connection, name) is getattr(driver, name)


@pytest.mark.parametrize(
    "name", sorted(set(psycopg.__all__) - {"connect", "Connection", "AsyncConnection"})
)
def test_every_other_name_is_psycopgs(name: str) -> None:
    """`DatabaseWrapper.Database` replaces psycopg in other people's code."""
    assert getattr(driver, name) is getattr(psycopg, name)


def test_errors_by_sqlstate_are_found_where_psycopg_has_them() -> None:
    assert driver.errors.UniqueViolation is psycopg.errors.UniqueViolation
    assert driver.errors.lookup("23505") is psycopg.errors.UniqueViolation
    assert not hasattr(driver.errors, "NoSuchError")
