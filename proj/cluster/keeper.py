"""The keeper: a process that starts all parts of a cluster, obeys orders, and ends all parts.

Its standard input is a pipe that the user of the cluster holds open. When that ends, however the
user went, the keeper kills what it has started and removes the directory. Orders come in on a
socket in the directory, which only root or the user may open (see ``steering``).
"""

import json
import os
import selectors
import shutil
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

import psycopg

from proj.cluster import files, processes, rest
from proj.cluster.layout import DATABASE, USER, Layout
from proj.cluster.programs import ClusterError, find

START_SECONDS = 90
PATRONI = "from patroni.__main__ import main; main()"


class UserGoneError(Exception):
    """Nobody holds the other end of the pipe any more."""


class Keeper:
    """Runs the parts of one cluster."""

    def __init__(self, home):
        self.home = Path(home)
        self.layout = Layout.read(home)
        self.programs = find()
        self.parts = {}
        self.doors = selectors.DefaultSelector()
        self.doors.register(0, selectors.EVENT_READ)

    # Start

    def start(self):
        """Start all parts, and wait until the cluster can be written to and read."""
        for name in ("haproxy", "pgbouncer"):
            self._make_dir(self.home / name)
        for member in self.layout.members:
            self._make_dir(Path(member.home))
            self.start_member(member)
        self.start_haproxy()
        self.start_pgbouncer()
        deadline = time.monotonic() + START_SECONDS
        self._await(self._leader, "elects no primary", deadline)
        self._make_database()
        self._await(self._complete, "does not stream to two standbys", deadline)

    def _make_dir(self, path):
        path.mkdir(mode=0o700, exist_ok=True)
        if self.programs.account is not None:
            os.chown(path, self.programs.account.uid, self.programs.account.gid)

    def start_member(self, member):
        """Start a member's Patroni, which starts PostgreSQL."""
        config = Path(member.home, "patroni.json")
        text = files.patroni(self.layout, member, self.programs.bindir)
        files.write_private(config, text, self.programs.account)
        command = [self.programs.python, "-c", PATRONI, config]
        self._start(member.name, command, member.home)

    def start_haproxy(self):
        config = self.home / "haproxy" / "haproxy.cfg"
        files.write_private(config, files.haproxy(self.layout), self.programs.account)
        self._start("haproxy", [self.programs.haproxy, "-db", "-f", config], config.parent)

    def start_pgbouncer(self):
        command = [self.programs.pgbouncer, self._write_pgbouncer()]
        self._start("pgbouncer", command, self.home / "pgbouncer")

    def _write_pgbouncer(self):
        home, account = self.home / "pgbouncer", self.programs.account
        files.write_private(home / "users", files.pgbouncer_users(self.layout), account)
        files.write_private(home / "pgbouncer.ini", files.pgbouncer(self.layout), account)
        return home / "pgbouncer.ini"

    def _start(self, name, command, home):
        log = Path(home, f"{name}.log")
        self.parts[name] = processes.start(command, log, self.programs.options(home))

    def _await(self, condition, complaint, deadline):
        while not condition():
            ended = [name for name, part in self.parts.items() if part.poll() is not None]
            if ended or time.monotonic() > deadline:
                what = f"{ended[0]} ended at its start" if ended else f"the cluster {complaint}"
                raise ClusterError(f"{what}: {self._log_tail(ended[0] if ended else 'a')}")
            self._look(0.1)

    def _log_tail(self, name):
        log = self.home / name / f"{name}.log"
        return f"{log} ends with:\n{log.read_text(errors='replace')[-1500:]}"

    def _leader(self):
        states = rest.members(self.layout)
        return any(member["role"] == "leader" and "timeline" in member for member in states)

    def _complete(self):
        states = [(member["role"], member["state"]) for member in rest.members(self.layout)]
        return (
            len(states) == 3
            and states.count(("leader", "running")) == 1
            and (
                states.count(("sync_standby", "streaming")) == 1
                and states.count(("replica", "streaming")) == 1
            )
        )

    def _make_database(self):
        leader = rest.leader(self.layout)
        password = self.layout.passwords[USER]
        with psycopg.connect(
            **self.layout.conninfo(leader.port, "postgres", "postgres"), autocommit=True
        ) as connection:
            # Only characters of hexadecimal numbers are in it.
            connection.execute(f"CREATE ROLE {USER} LOGIN CREATEDB PASSWORD '{password}'")
            connection.execute(f"CREATE DATABASE {DATABASE} OWNER {USER}")
            # Whether a standby follows is shown to the owner of the database, too.
            connection.execute(f"GRANT pg_monitor TO {USER}")

    # Work

    def serve(self):
        """Obey orders until the user is gone."""
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self.home / "control"))
            (self.home / "control").chmod(0o600)
            listener.listen()
            self.doors.register(listener, selectors.EVENT_READ)
            _answer({"ready": True})
            while True:
                self._look(0.5)

    def _look(self, seconds):
        """Wait for an order, or the end of the user, for so long."""
        processes.reap_known(self.parts.values())
        for key, _ in self.doors.select(seconds):
            if key.fileobj == 0:
                if not os.read(0, 100):
                    raise UserGoneError
            else:
                connection, _ = key.fileobj.accept()
                with connection, suppress(OSError):
                    self._obey(connection)

    def _obey(self, connection):
        connection.settimeout(5)
        order = json.loads(connection.makefile().readline())
        try:
            answer = {"done": getattr(Orders(self), order.pop("do"))(**order)}
        except (ClusterError, KeyError, ValueError, TypeError, AttributeError) as error:
            answer = {"error": str(error)}
        connection.sendall(json.dumps(answer).encode() + b"\n")

    def end(self):
        """Kill all parts, and remove the directory."""
        segments = [processes.postmaster(member.data) for member in self.layout.members]
        processes.end_all()
        for _, number in filter(None, segments):
            processes.drop_shared_memory(number)
        shutil.rmtree(self.home, ignore_errors=True)


class Orders:
    """Carries out the orders that a keeper is given; its methods have their names."""

    def __init__(self, keeper):
        self.keeper = keeper
        self.layout = keeper.layout

    def pids(self):
        """Return the process numbers of the parts that live."""
        parts = self.keeper.parts.items()
        return {name: part.pid for name, part in parts if part.poll() is None}

    def kill(self, name):
        """Kill a member's Patroni and PostgreSQL, as a machine that vanishes."""
        member = self.layout.member(name)
        server = processes.postmaster(member.data)
        part = self.keeper.parts[name]
        if part.poll() is None:
            part.kill()
            part.wait()
        if server:
            processes.kill(server[0])

    def stop(self, name):
        """Stop a member in good order."""
        self.layout.member(name)
        part = self.keeper.parts[name]
        if part.poll() is None:
            part.terminate()
            part.wait(30)

    def start(self, name):
        """Start a member that was killed or stopped."""
        member = self.layout.member(name)
        if self.keeper.parts[name].poll() is None:
            raise ClusterError(f"member {name!r} runs")
        self.keeper.start_member(member)

    def restart_pgbouncer(self):
        """Kill PgBouncer, and start it anew."""
        self._end("pgbouncer")
        self.keeper.start_pgbouncer()

    def move_haproxy(self):
        """Stop HAProxy, start it at other ports, and tell PgBouncer where it is."""
        self._end("haproxy")
        self.layout.move_proxy()
        self.layout.write()
        self.keeper.start_haproxy()
        self.keeper._write_pgbouncer()  # noqa: SLF001
        self.keeper.parts["pgbouncer"].send_signal(signal.SIGHUP)

    def _end(self, name):
        part = self.keeper.parts[name]
        part.kill()
        part.wait()


def main(home):
    """Be the keeper of the cluster whose description is in a directory."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    processes.reap_orphans()
    keeper = None
    try:
        keeper = Keeper(home)
        keeper.start()
        keeper.serve()
    except UserGoneError:
        pass
    except ClusterError as error:
        _answer({"error": str(error)})
    except OSError as error:
        _answer({"error": f"the cluster in {home} cannot be started: {error}"})
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if keeper is not None:
            keeper.end()
        else:
            shutil.rmtree(home, ignore_errors=True)


def _answer(answer):
    with suppress(BrokenPipeError):
        os.write(1, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1])
