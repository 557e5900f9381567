"""Leads Django's aliases to a primary and its standbys, with a `ReplicaRouter` between."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from django.db import connection, connections
from django.db import router as djangos_router
from django.test import override_settings

from pgbackend import routers
from pgbackend.replicas import writes
from tests.conftest import wait_for
from tests.library.models import Author, Book, Entry, Tag
from tests.support.fixtures import settings_of_default
from tests.support.replication import Member, Replication

_PLAIN = {"sslmode": "disable", "gssencmode": "disable"}


@contextmanager
def family(pair: Replication, **of_router: Any) -> Iterator[list[str]]:
    """Make 'default' the primary of `pair`, and add an alias for each standby; yield these.

    `of_router` are arguments of the router.
    """
    members = [("replica", pair.standby), ("second", pair.second)]
    replicas = {alias: _settings(member) for alias, member in members if member is not None}
    connections["default"].close()
    with settings_of_default(**_settings(pair.primary)):
        try:
            with routed(replicas, **of_router):
                yield [*replicas]
        finally:
            connections["default"].close()


@contextmanager
def routed(replicas: Mapping[str, Mapping[str, Any]], **of_router: Any) -> Iterator[None]:
    """Route reads to aliases for `replicas`: the settings by which each differs from 'default'."""
    default = connections.settings["default"]
    for alias, changes in replicas.items():
        given = {**default, **changes, "TEST": {**default["TEST"]}}
        given["OPTIONS"] = {**given["OPTIONS"], "replica_of": "default"}
        connections.settings[alias] = given
    try:
        with override_settings(DATABASE_ROUTERS=[routers.ReplicaRouter(**of_router)]):
            yield
    finally:
        routers.stop_monitors()
        writes.uninstall()
        for alias in replicas:
            connections[alias].close()
            connections[alias].close_pool()
            del connections[alias], connections.settings[alias]


def _settings(member: Member) -> dict[str, Any]:
    place = {"HOST": "127.0.0.1", "PORT": str(member.port), "USER": "postgres"}
    return {**place, "NAME": "postgres", "PASSWORD": "", "OPTIONS": {**_PLAIN, "pool": {}}}


def make_tables(pair: Replication) -> None:
    """Make the tables of the library on the primary, and wait until the standbys have them."""
    with family(pair) as aliases:
        with connection.schema_editor() as editor:
            for model in (Author, Tag, Book, Entry):
                editor.create_model(model)
        for alias in aliases:
            wait_for(partial(has_tables, alias), f"the tables are on {alias!r}")


def has_tables(alias: str) -> bool:
    return Book._meta.db_table in connections[alias].introspection.table_names()


def goes_to(model: Any = Tag, **hints: Any) -> str:
    """Return the alias that a read would go to now."""
    return str(djangos_router.db_for_read(model, **hints))


def wait_for_reads(alias: str) -> None:
    """Wait until a read goes to `alias`."""
    wait_for(lambda: goes_to() == alias, f"reads go to {alias!r}", 20)
