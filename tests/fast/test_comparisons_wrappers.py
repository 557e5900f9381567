"""Compares what a request finds on the `connection` with a shortcut and without it: `wrappers`.

The requests before it have changed the connection's wrapper in many ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta, timezone
from typing import Any

import pytest
from django.db import connection, connections
from django.http import HttpRequest, HttpResponse
from django.urls import path

from pgbackend.fast import wrappers
from pgbackend.operations import DatabaseOperations
from tests.conftest import Runner
from tests.library.models import Tag
from tests.support.both_ways import compare

from .test_blocks import what_is_seen
from .test_comparisons import empty, named
from .test_comparisons_requests import Client

Seen = list[Any]


@pytest.fixture(autouse=True)
def _nothing_is_kept() -> Iterator[None]:
    wrappers.forget()
    yield
    wrappers.forget()


class OwnOperations(DatabaseOperations):
    def quote_name(self, name: str) -> str:
        return super().quote_name(name)


METHODS = ("cursor", "commit", "close", "execute_wrapper")


def found() -> dict[str, Any]:
    """Return what a request finds on the wrapper of its connection."""
    wrapper: Any = connections["default"]
    cls = type(wrapper)
    allowed = wrappers._NOTES | wrappers._cached_by(cls)
    return {
        **what_is_seen(),
        "class": cls,
        "names": sorted(vars(wrapper).keys() - allowed),
        "settings": wrapper.settings_dict is connections.settings["default"],
        "log": [each["sql"] for each in wrapper.queries],
        "wrappers": [*wrapper.execute_wrappers],
        "debug": (wrapper.force_debug_cursor, wrapper.queries_logged, wrapper.queries_log.maxlen),
        "sharing": wrapper.allow_thread_sharing,
        "timezone": (wrapper.timezone, wrapper.timezone_name),
        "helpers": [
            (type(helper), helper.connection is wrapper, sorted(_own_names(helper)))
            for helper in (getattr(wrapper, name) for name in wrappers._HELPERS)
        ],
        "methods": [getattr(wrapper, name).__func__.__name__ for name in METHODS
                    if hasattr(getattr(wrapper, name), "__func__")],
        "connection": wrapper.connection,
        "versions": (wrapper.features.is_postgresql_16, wrapper.pg_version),
        "rest": (wrapper.close_at, wrapper.health_check_enabled, wrapper.health_check_done,
                 wrapper.alias,
                 wrapper.vendor, wrapper.errors_occurred, wrapper.isolation_level),
        "operators": dict(wrapper.operators),
        "types": dict(wrapper.data_types),
    }  # fmt: skip


def _own_names(helper: Any) -> set[str]:
    return vars(helper).keys() - wrappers._cached_by(type(helper)) - {"_cache", "connection"}


def derived(cls: type[Any]) -> type[Any]:
    return type("Derived", (cls,), {})


MEDDLING: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda wrapper: None,
    "a statement": lambda wrapper: Tag.objects.count(),
    "an attribute": lambda wrapper: setattr(wrapper, "tenant", "a"),
    "a method": lambda wrapper: setattr(wrapper, "cursor", wrapper.cursor),
    "an execute_wrapper": lambda wrapper: wrapper.execute_wrappers.append(_pass_on),
    "a hook": lambda wrapper: wrapper.run_on_commit.append((set(), print, False)),
    "a rollback to come": lambda wrapper: setattr(wrapper, "needs_rollback", True),
    "errors": lambda wrapper: setattr(wrapper, "errors_occurred", True),
    "a debug cursor": lambda wrapper: setattr(wrapper, "force_debug_cursor", True),
    "a log": lambda wrapper: wrapper.queries_log.append({"sql": "x", "time": "0"}),
    "a closed connection": lambda wrapper: wrapper.close(),
    "sharing": lambda wrapper: (wrapper.inc_thread_sharing(), wrapper._close_own()),
    "a timezone": lambda wrapper: setattr(wrapper, "timezone", timezone(timedelta(hours=5))),
    "its name": lambda wrapper: setattr(wrapper, "timezone_name", "Asia/Tokyo"),
    "operations": lambda wrapper: setattr(wrapper, "ops", OwnOperations(wrapper)),
    "a feature": lambda wrapper: setattr(wrapper.features, "has_bulk_insert", False),
    "a method of operations": lambda wrapper: setattr(wrapper.ops, "now_utc", print),
    "operators": lambda wrapper: setattr(wrapper, "operators", {"exact": "== %s"}),
    "types": lambda wrapper: setattr(wrapper, "data_types", {}),
    "settings": lambda wrapper: setattr(wrapper, "settings_dict", {**wrapper.settings_dict}),
    "a time to close": lambda wrapper: setattr(wrapper, "close_at", 1e12),
    "an isolation level": lambda wrapper: setattr(wrapper, "isolation_level", 4),
    "savepoints": lambda wrapper: setattr(wrapper, "savepoint_state", 7),
    "a derived class": lambda wrapper: setattr(wrapper, "__class__", derived(type(wrapper))),
    "a cached feature": lambda wrapper: wrapper.features.__dict__.update(is_postgresql_16=False),
}  # fmt: skip


def _pass_on(execute: Any, *args: Any) -> Any:
    return execute(*args)


@pytest.mark.parametrize("name", [named(each) for each in ("wrappers", "handler", "all")])
def test_a_request_finds_nothing_of_an_earlier_one(
    run_once: Runner, settings: Any, name: str
) -> None:
    settings.MIDDLEWARE = []
    settings.DEBUG_PROPAGATE_EXCEPTIONS = True

    def once() -> Any:
        all_seen: Seen = []

        async def main() -> None:
            async def view(request: HttpRequest, what: str) -> HttpResponse:
                seen.append(found())
                MEDDLING[what](connections["default"])
                return HttpResponse(what)

            class urls:  # noqa: N801 - a module
                urlpatterns = [path("<what>", view)]

            settings.ROOT_URLCONF = urls
            for what in MEDDLING:
                seen: Seen = []
                for each in (what, "nothing"):
                    seen.append(await Client(url=f"/{each}").serve())
                all_seen.append((what, seen))

        empty()
        connection.close()
        wrappers.forget()
        run_once(main())
        return all_seen

    plainly = compare(name, once)
    for what, seen in plainly:
        assert seen[2] == plainly[0][1][0], what
