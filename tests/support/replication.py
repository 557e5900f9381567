"""Runs a real primary and its standby, on loopback, and lets them change their places."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgbackend.embedded.errors import EmbeddedError
from pgbackend.embedded.programs import find_bindir
from pgbackend.embedded.root import Account, reachable_bindir, server_account
from tests.conftest import wait_for
from tests.support.ports import free_port

_SETTINGS = {
    "fsync": "off",
    "listen_addresses": "127.0.0.1",
    "max_connections": "100",
    "hot_standby": "on",
    "max_standby_streaming_delay": "-1",  # no statement is cancelled for the sake of the replay
    "wal_retrieve_retry_interval": "100ms",
}


def programs() -> tuple[Path, Account | None]:
    """Return the directory of PostgreSQL's programs, and who runs them if root may not."""
    try:
        bindir = find_bindir()
        account = server_account() if os.geteuid() == 0 else None
    except EmbeddedError as exc:
        pytest.skip(str(exc))
    if not (bindir / "pg_basebackup").exists():
        pytest.skip(f"{bindir} has no pg_basebackup")
    return (bindir if account is None else reachable_bindir(bindir, account)), account


class Member:
    """One of the two servers."""

    def __init__(self, home: Path) -> None:
        self.bindir, self.account = programs()
        self.home = home
        self.data = home / "data"
        self.port = free_port()
        home.mkdir()
        if self.account is not None:
            os.chown(home, self.account.uid, self.account.gid)

    @property
    def conninfo(self) -> str:
        return f"host=127.0.0.1 port={self.port} user=postgres dbname=postgres"

    def run(self, program: str, *arguments: object) -> None:
        """Run one of PostgreSQL's programs to its end."""
        account: dict[str, Any] = {}
        if self.account is not None:
            ids = {"user": self.account.uid, "group": self.account.gid}
            account = {**ids, "extra_groups": []}
        command = [self.bindir / program, *map(str, arguments)]
        with (self.home / "output").open("ab") as output:
            subprocess.run(command, check=True, cwd="/", stdout=output, stderr=output, **account)

    def make(self) -> None:
        """Make the data of a primary."""
        self.run("initdb", "-D", self.data, "-A", "trust", "-U", "postgres", "--no-sync")

    def copy(self, primary: Member) -> None:
        """Make the data of a standby of `primary`, which runs."""
        self.run("pg_basebackup", "-D", self.data, "-d", primary.conninfo, "-c", "fast", "-N")

    def follow(self, primary: Member) -> None:
        """Be a standby of `primary` from the next start on."""
        (self.data / "standby.signal").touch()
        with (self.data / "postgresql.auto.conf").open("a") as settings:
            settings.write(f"primary_conninfo = '{primary.conninfo}'\n")

    def start(self) -> None:
        settings = {**_SETTINGS, "port": self.port, "unix_socket_directories": self.home}
        given = " ".join(f"-c {name}={value}" for name, value in settings.items())
        log = self.home / "log"
        self.run("pg_ctl", "-D", self.data, "-w", "-s", "-l", log, "-o", given, "start")

    def stop(self) -> None:
        self.run("pg_ctl", "-D", self.data, "-w", "-s", "-m", "fast", "stop")

    def promote(self) -> None:
        self.run("pg_ctl", "-D", self.data, "-w", "-s", "promote")

    def execute(self, query: Any, *params: object) -> Any:
        """Execute a statement, and return the first column of its first row, if there is one."""
        with psycopg.connect(self.conninfo, autocommit=True) as admin:
            cursor = admin.execute(query, params or None)
            row = cursor.fetchone() if cursor.description else None
            return None if row is None else row[0]

    def pause(self) -> None:
        """Replay nothing more on this standby, from now on."""
        self.execute("SELECT pg_wal_replay_pause()")
        state = "SELECT pg_get_wal_replay_pause_state()"
        # A standby that has nothing to replay looks at the request every few seconds only.
        asked = ("pause requested", "paused")
        wait_for(lambda: self.execute(state) in asked, "the standby stops replaying", 20)

    def resume(self) -> None:
        """Replay again, after `pause()`."""
        self.execute("SELECT pg_wal_replay_resume()")

    def streams(self) -> bool:
        """Return whether a standby follows."""
        with psycopg.connect(self.conninfo, autocommit=True) as admin:
            query = "SELECT FROM pg_stat_replication WHERE state = 'streaming'"
            return admin.execute(query).fetchone() is not None


class Replication:
    """A primary and its standby; and by choice a second standby, which never takes a part."""

    def __init__(self, home: Path, *, second: bool = False) -> None:
        self.primary, self.standby = Member(home / "a"), Member(home / "b")
        self.second = Member(home / "c") if second else None
        self.primary.make()
        self.primary.start()
        for standby in filter(None, (self.standby, self.second)):
            standby.copy(self.primary)
            standby.follow(self.primary)
            standby.start()
        self.wait_for_standby()

    def wait_for_standby(self) -> None:
        wait_for(self.primary.streams, "the standby follows", 20)

    def demote(self) -> None:
        """Restart the primary as a standby: for a moment there are two of them."""
        self.primary.stop()
        self.primary.follow(self.standby)
        self.primary.start()

    def promote(self) -> None:
        """Make the standby the primary; the other must have been demoted, or stopped."""
        self.standby.promote()
        self.primary, self.standby = self.standby, self.primary

    def close(self) -> None:
        for member in filter(None, (self.primary, self.standby, self.second)):
            if (member.data / "postmaster.pid").exists():
                member.run("pg_ctl", "-D", member.data, "-w", "-s", "-m", "immediate", "stop")


@contextmanager
def replication(*, second: bool = False) -> Iterator[Replication]:
    """Run a primary and its standby, or two, for a `with` block."""
    home = Path(tempfile.mkdtemp(prefix="pgbackend-replication-", dir="/tmp"))
    home.chmod(0o755)
    pair: Replication | None = None
    try:
        pair = Replication(home, second=second)
        yield pair
    finally:
        if pair is not None:
            pair.close()
        shutil.rmtree(home, ignore_errors=True)
