"""The programs of PostgreSQL at work: ``initdb``, and one server process from start to stop.

The processes run as the account of the plan, with an environment of their own and without a shell,
and inherit ``server.lock`` (see Note [Locks] in locks.py).
"""

from __future__ import annotations

import fcntl
import locale
import os
import signal
import socket
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .directories import PORT, SOCKET
from .errors import EmbeddedError
from .locks import open_lock, try_lock

if TYPE_CHECKING:
    from .plan import Plan

POLL_SECONDS = 0.01
START_SECONDS = 120.0


def initdb(plan: Plan, data: Path, lock: int) -> None:
    """Fill an empty directory with a new cluster, in which everybody is trusted."""
    fsync = plan.settings.get("fsync", "on").lower()
    done = subprocess.run(
        [
            *(plan.bindir / "initdb", "-D", data, "-U", "postgres", "-A", "trust"),
            *("-E", "UTF8", f"--locale={_locale()}", "--no-instructions"),
            *(["--no-sync"] if fsync in ("off", "false", "no", "0") else []),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        pass_fds=[lock],
        **_child_options(plan),
    )
    if done.returncode != 0:
        said = done.stdout.decode(errors="replace").strip()[-2000:]
        raise EmbeddedError(
            f"initdb failed in {plan.home} with status {done.returncode} (it needs some 50 MB, "
            f"and an entry in the password file for its user): {said}"
        )


class Postgres:
    """The server process of one data directory, whichever process started it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.data: Path = plan.home / "data"
        self.log: Path = plan.home / "server.log"
        self.lock: Path = plan.home / "server.lock"
        self.child: subprocess.Popen[bytes] | None = None

    # Start

    def launch(self, run: Path, lock: int) -> None:
        """Start the server with its socket in `run`; its processes inherit the lock."""
        # Not through pg_ctl: it takes the arguments through a shell, and polls slowly.
        ours = {
            "listen_addresses": "",
            "port": PORT,
            "unix_socket_directories": str(run),
            "unix_socket_permissions": "0700",
        }
        arguments = [
            text
            for name, value in {**self.plan.settings, **ours}.items()
            for text in ("-c", f"{name}={value}")
        ]
        with suppress(FileNotFoundError):
            self.log.replace(self.plan.home / "server.log.1")
        with self.log.open("wb") as log:
            self.child = subprocess.Popen(
                [self.plan.bindir / "postgres", "-D", self.data, *arguments],
                stdout=log,
                stderr=log,
                pass_fds=[lock],
                start_new_session=True,
                **_child_options(self.plan),
            )

    def await_ready(self, deadline: float) -> str:
        """Wait until the server that was launched answers, and return its socket directory."""
        child = self.child
        assert child is not None
        while (run := self.answers()) is None:
            if child.poll() is not None:
                raise EmbeddedError(f"PostgreSQL ended at its start. {self._log_tail()}")
            self.check_deadline(deadline, "is not ready")
            time.sleep(POLL_SECONDS)
        # Reaps it should it crash while the keeper waits for the users.
        threading.Thread(target=child.wait, daemon=True).start()
        return run

    def check_deadline(self, deadline: float, what: str) -> None:
        """Raise an error that says `what` if the deadline of the start has passed."""
        if time.monotonic() > deadline:
            raise EmbeddedError(
                f"PostgreSQL in {self.plan.home} {what} after {START_SECONDS:.0f} s: end the "
                f"processes that use it, or delete that directory. {self._log_tail()}"
            )

    def _log_tail(self) -> str:
        with suppress(FileNotFoundError):
            tail = self.log.read_bytes()[-2000:].decode(errors="replace").strip()
            return f"Its log, {self.log}, ends with:\n{tail}"
        return f"There is no log {self.log}."

    # The running server

    def answers(self) -> str | None:
        """Return the socket directory, if a server is ready there."""
        lines = self._pid_file()
        ready = len(lines) > 7 and lines[7].strip() == "ready"
        return lines[4] if ready and self._process() else None

    def _process(self) -> int | None:
        """Return the process number, if it lives: only a living one accepts connections."""
        if self.child is not None and self.child.poll() is None:
            return self.child.pid
        if lines := self._pid_file():
            with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
                probe.settimeout(5.0)
                probe.connect(str(Path(lines[4], SOCKET)))
                return int(lines[0])
        return None

    def _pid_file(self) -> list[str]:
        """Read postmaster.pid: line 0 is the process, 4 the socket directory, 7 the state."""
        with suppress(FileNotFoundError):
            lines = (self.data / "postmaster.pid").read_text(errors="replace").splitlines()
            if len(lines) > 4:
                return lines
        return []

    # Stop

    def stop(self) -> None:
        """Disconnect clients, write everything to disk and end; sterner if that takes too long."""
        pid = self._process()
        for how, seconds in (
            (signal.SIGINT, 60.0),  # PostgreSQL's "fast"
            (signal.SIGQUIT, 10.0),  # "immediate"
            (signal.SIGKILL, 10.0),
        ):
            if pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(pid, how)
            if self._await_gone(seconds):
                break

    def stop_child(self) -> None:
        """End the process that this keeper launched, if there is one, without writing to disk."""
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(signal.SIGQUIT)
            self.child.wait()

    def _await_gone(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        lock = open_lock(self.lock)
        try:
            while not (gone := try_lock(lock, fcntl.LOCK_EX)) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
            return gone
        finally:
            os.close(lock)


def _child_options(plan: Plan) -> dict[str, Any]:
    env = {
        "PATH": "/usr/bin:/bin",
        "LC_ALL": _locale(),
        "HOME": str(plan.home / "run"),
        "TZ": "UTC",  # initdb writes it down as the server's time zone
    }
    options: dict[str, Any] = {"cwd": "/", "stdin": subprocess.DEVNULL, "env": env}
    if account := plan.account:
        options.update(user=account.uid, group=account.gid, extra_groups=[])
    return options


def _locale() -> str:
    """Return C.UTF-8, which sorts by code point and knows all letters, or C without it."""
    try:
        locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
    except locale.Error:
        return "C"
    return "C.UTF-8"
