"""Starts the cluster and the desks once, and prints the figures of all scenes at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import psycopg
import pytest

from proj.cluster import databases, programs, rest, steering
from tests.conftest import wait_for
from tests.scaleout.desks import desks, manage

FIGURES = pytest.StashKey[list[tuple[str, ...]]]()
HEAD = ("scene", "way", "orders", "failed", "longest gap", "promoted", "first after", "read from")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FIGURES] = []


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not (rows := config.stash.get(FIGURES, [])):
        return
    widths = [max(map(len, column)) for column in zip(HEAD, *rows, strict=True)]
    terminalreporter.section("orders while parts of the cluster fail")
    for row in (HEAD, *rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        terminalreporter.write_line("  ".join(cells).rstrip())


@pytest.fixture(scope="session")
def is_long(pytestconfig: pytest.Config) -> bool:
    """Return whether this is the long form."""
    return bool(pytestconfig.option.slow)


@pytest.fixture(scope="session")
def needs(pytestconfig: pytest.Config) -> None:
    """Skip, or fail with ``--require-servers``, where the programs of a cluster are missing."""
    if why := programs.missing():
        if pytestconfig.option.require_servers:
            pytest.fail(why)
        pytest.skip(why)


class Site:
    """The cluster, and an order desk for each way to its primary."""

    def __init__(self, layout: Any, addresses: dict[str, str]) -> None:
        self.home = layout.home
        self.addresses = addresses
        menu = httpx.get(f"{addresses['haproxy']}/api/menu/", trust_env=False).json()
        self.dishes = [dish["id"] for dish in menu["dishes"]]

    @property
    def layout(self) -> Any:
        """Return the description of the cluster as it is now: ports may change."""
        return steering.Layout.read(self.home)

    def order(self, do: str, **arguments: Any) -> Any:
        return steering.order(self.home, do, **arguments)

    @contextmanager
    def late(self, name: str) -> Iterator[None]:
        """Let a standby apply what it receives a second later, for the block."""
        self._apply_after(name, "1s")
        try:
            yield
        finally:
            self._apply_after(name, "0")

    def _apply_after(self, name: str, delay: str) -> None:
        arguments = self.layout.conninfo(self.layout.member(name).port, "postgres", "postgres")
        with psycopg.connect(**arguments, autocommit=True) as standby:
            standby.execute(f"ALTER SYSTEM SET recovery_min_apply_delay = '{delay}'")
            standby.execute("SELECT pg_reload_conf()")

    def roles(self) -> dict[str, str]:
        """Return the members that stream or lead, by their roles."""
        alive = ("running", "streaming")
        states = rest.members(self.layout)
        return {each["role"]: each["name"] for each in states if each["state"] in alive}

    def wait_until_whole(self, seconds: float = 60) -> dict[str, str]:
        """Wait until one member leads and two follow; return their names by their roles.

        Patroni says for up to `ttl` that a killed member streams, so the primary is asked, too.
        """
        return wait_for(self._whole, "one member leads and two follow", seconds)

    def _whole(self) -> dict[str, str] | None:
        roles = self.roles()
        if not roles.keys() >= {"leader", "sync_standby", "replica"}:
            return None
        query = "SELECT application_name FROM pg_stat_replication WHERE state = 'streaming'"
        try:
            with self.primary() as primary:
                streaming = {name for (name,) in primary.execute(query)}
        except (psycopg.OperationalError, steering.ClusterError):
            return None
        return roles if {roles["sync_standby"], roles["replica"]} <= streaming else None

    @contextmanager
    def primary(self, user: str = "kitchen", dbname: str = "kitchen") -> Iterator[Any]:
        """Open a session at the primary, past all proxies."""
        member = rest.leader(self.layout)
        arguments = self.layout.conninfo(member.port, user, dbname)
        with psycopg.connect(**arguments, autocommit=True) as connection:
            yield connection


@pytest.fixture(scope="session")
def site(needs: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    logs = tmp_path_factory.mktemp("desks")
    with steering.cluster() as layout:
        manage(layout.home, "migrate", "--run-syncdb", "--verbosity=0")
        manage(layout.home, "seed_menu", "--verbosity=0")
        with desks(layout.home, databases.WAYS, logs) as addresses:
            yield Site(layout, addresses)
