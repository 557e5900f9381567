"""Handles on servers: `server` starts or joins one, and a `Server` holds it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

from .cluster import Cluster
from .directories import PORT
from .errors import CURE, EmbeddedError
from .keeper import ask_keeper
from .plan import check_settings, make_plan
from .programs import find_bindir, version_of
from .urls import database_settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .plan import Plan


class Server:
    """A handle on a running server; as long as one is held, in any process, the server runs.

    Use it as a context manager or call `release()`. A process that ends in any way, SIGKILL
    included, releases its handles. Processes forked from the holder hold the server too.

    Attributes:
        url: ``postgresql://`` URL of the database ``postgres``, or ``DATABASE_URL`` as it is.
        params: the same for Django's ``DATABASES``: NAME, USER, PASSWORD, HOST, PORT, OPTIONS.
        bindir: directory of the server's programs (``initdb``, ``psql`` if it comes with one);
            None when the server is the one of ``DATABASE_URL``.
        version: such as ``"18.6"``; None when the server is the one of ``DATABASE_URL``.
    """

    def __init__(
        self,
        url: str,
        *,
        bindir: Path | None = None,
        version: str | None = None,
        cluster: Cluster | None = None,
        lock: int | None = None,
    ) -> None:
        self.url = url
        self.params: dict[str, Any] = database_settings(url)
        self.bindir = bindir
        self.version = version
        self._cluster = cluster
        self._lock = lock

    def __repr__(self) -> str:
        if self._cluster is None:
            return "<Server of DATABASE_URL>"
        state = "released" if self._lock is None else "held"
        return f"<Server {self.version} in {str(self._cluster.home)!r}, {state}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the server back; the last user waits until it has stopped. May be repeated."""
        lock, self._lock = self._lock, None
        if lock is not None and self._cluster is not None:
            os.close(lock)
            self._cluster.leave()

    def outlive_exec(self) -> None:
        """Let a program that replaces this process by ``exec`` hold the server as well."""
        if self._lock is not None:
            os.set_inheritable(self._lock, True)


def server(
    base: Path | None = None, *, settings: Mapping[str, str] | None = None, keep: bool = True
) -> Server:
    """Start the server of a directory, or join the one that runs there, and return a handle.

    If ``DATABASE_URL`` is set, nothing is started and the handle gives that URL.

    Args:
        base: directory for this server; made if missing. Data of each major version of PostgreSQL
            are apart in it (``postgresql-18``); delete it to start afresh. As root, when the
            server's user cannot reach ``base``, data are in ``/var/lib/pgbackend`` instead and a
            note in ``base`` says where. None: a temporary directory, removed with the server.
        settings: server settings such as ``{"fsync": "off", "max_connections": "50"}``. They are
            set when the server starts, and change nothing on a server that runs already.
        keep: False removes the data that this call creates when the last user is gone, unless a
            user who joined meanwhile asked to keep them.

    Raises:
        EmbeddedError: no server was found, or it did not start.
        ValueError: a setting belongs to the launcher, or ``DATABASE_URL`` is malformed.
    """
    if url := os.environ.get("DATABASE_URL"):
        return Server(url)
    settings = dict(settings or {})
    check_settings(settings)
    bindir = find_bindir()
    version = version_of(bindir)
    try:
        plan = make_plan(base, bindir, version, settings, keep=keep)
        return _start(plan, version)
    except OSError as exc:
        raise EmbeddedError(f"the embedded PostgreSQL cannot be started: {exc}. {CURE}") from exc


def _start(plan: Plan, version: str) -> Server:
    cluster = Cluster(plan)
    lock = cluster.join()
    try:
        run = ask_keeper(plan)
    except EmbeddedError:
        os.close(lock)
        cluster.leave()  # removes what was made for a throwaway
        raise
    except BaseException:  # Ctrl-C: do not wait, the keeper sees that nobody is left
        os.close(lock)
        raise
    url = f"postgresql://postgres@/postgres?host={quote(run, safe='/')}&port={PORT}"
    return Server(url, bindir=plan.bindir, version=version, cluster=cluster, lock=lock)
