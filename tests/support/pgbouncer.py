"""Runs a real PgBouncer in front of the tests' server, on loopback, for a `with` block.

`PGBOUNCER` names the program, if it is not the one on the path. `PGBOUNCER_NEWER` names a newer
one, if it is not the one that `make pgbouncer-newer` unpacks.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict

from tests.support.polling import wait_for
from tests.support.ports import free_port

_SBIN = ("/usr/sbin", "/usr/local/sbin", "/sbin")


def program() -> str | None:
    """Return the path of the PgBouncer of this machine, or None."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *_SBIN])
    return os.environ.get("PGBOUNCER") or shutil.which("pgbouncer", path=path)


def newer_program() -> str | None:
    """Return the path of a PgBouncer that tracks prepared statements, or None."""
    unpacked = Path(__file__).parents[2] / ".pgbackend/pgbouncer-newer/bin/pgbouncer"
    return os.environ.get("PGBOUNCER_NEWER") or (str(unpacked) if unpacked.exists() else None)


def version(of: str | None = None) -> tuple[int, ...]:
    """Return the version of a program, such as (1, 24, 1)."""
    said = subprocess.run(
        [str(of or program()), "--version"], capture_output=True, text=True, check=True
    ).stdout
    return tuple(int(part) for part in said.split()[1].split("."))


@contextmanager
def pgbouncer(conninfo: str, run: str | None = None, **settings: Any) -> Iterator[dict[str, Any]]:
    """Start PgBouncer in transaction mode; yield the parameters of a connection through it.

    `run` is the path of the program; by default that of `program()`.
    """
    given = conninfo_to_dict(conninfo)
    target = {name: given[name] for name in ("host", "port", "user", "password") if name in given}
    account = _account(str(target.get("host", "")))
    home = Path(tempfile.mkdtemp(prefix="pgbouncer"))
    try:
        port = free_port()
        config = {
            "listen_addr": "127.0.0.1",
            "listen_port": port,
            "unix_socket_dir": "",
            "auth_type": "any",
            "pool_mode": "transaction",
            "default_pool_size": 3,
            "max_client_conn": 200,
            "server_round_robin": 1,  # so that a client gets another session each time
            **settings,
        }
        if account is not None:  # the program may be in a directory that only root may enter
            config["user"] = account.pw_name
        # "auth_type = any" lets every client in, as the user that is forced here.
        databases = " ".join(f"{name}={value}" for name, value in target.items())
        lines = [f"{name} = {value}" for name, value in config.items()]
        ini = home / "pgbouncer.ini"
        ini.write_text("\n".join(["[databases]", f"* = {databases}", "[pgbouncer]", *lines, ""]))
        if account is not None:
            shutil.chown(home, account.pw_uid, account.pw_gid)
            shutil.chown(ini, account.pw_uid, account.pw_gid)
        log = home / "log"
        with log.open("wb") as out:
            bouncer = subprocess.Popen(
                [run or str(program()), str(ini)], stdout=out, stderr=out, cwd="/"
            )
        try:
            parameters = {"host": "127.0.0.1", "port": str(port), "user": "anybody"}
            wait_for(lambda: _answers(bouncer, parameters, log), "PgBouncer answers", 10)
            yield parameters
        finally:
            bouncer.terminate()
            bouncer.wait(10)
    finally:
        shutil.rmtree(home)


def _account(host: str) -> pwd.struct_passwd | None:
    """Choose the account of PgBouncer: not root, but one that may enter the server's directory."""
    if os.geteuid() != 0:
        return None
    if host.startswith("/"):
        return pwd.getpwuid(os.stat(host).st_uid)
    return pwd.getpwnam("nobody")


def _answers(bouncer: subprocess.Popen[bytes], parameters: dict[str, Any], log: Path) -> bool:
    assert bouncer.poll() is None, log.read_text()
    try:
        psycopg.connect(**parameters, dbname="postgres", sslmode="disable").close()
    except psycopg.OperationalError:
        return False
    return True
