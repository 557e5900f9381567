"""One server's directory: its users, its data, and its server started and stopped.

Everything of a server is below one home directory: data, socket, locks, log. Both sides use this
module: the users to join and leave, the keeper to start the server, and the last user or the keeper
to stop it. Each step holds a lock of Note [Locks] in locks.py.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from .directories import SOCKET, own_dir, socket_fits
from .errors import EmbeddedError
from .locks import is_at, locked, open_lock, try_lock
from .postgres import POLL_SECONDS, START_SECONDS, Postgres, initdb
from .root import ROOT_HOME

if TYPE_CHECKING:
    from .plan import Plan


class Cluster:
    """The home directory of one server, and the server in it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.home: Path = plan.home
        self.data: Path = plan.home / "data"
        self.throwaway: Path = plan.home / "throwaway"
        self.users_lock: Path = plan.home / "users.lock"
        self.start_lock: Path = plan.home / "start.lock"
        self.keeper_lock: Path = plan.home / "keeper.lock"
        self.postgres: Postgres = Postgres(plan)

    # Users

    def join(self) -> int:
        """Become a user, after a server that is being stopped, and return the lock to close."""
        while True:
            with suppress(FileNotFoundError):  # removed by the last user of a throwaway: once more
                self._make_home()
                fd = open_lock(self.users_lock)
                try:
                    fcntl.flock(fd, fcntl.LOCK_SH)
                    if is_at(fd, self.users_lock):
                        return fd
                except BaseException:
                    os.close(fd)
                    raise
                os.close(fd)

    def leave(self) -> None:
        """Stop the server if the caller was its last user, or wait until it is stopped.

        The keeper would stop it as well. Done here, the caller may remove the directory next.
        """
        with suppress(FileNotFoundError):
            with locked(self.start_lock, fcntl.LOCK_EX):
                users = open_lock(self.users_lock)
                try:
                    if try_lock(users, fcntl.LOCK_EX):
                        self.finish(users)
                        return
                    if try_lock(users, fcntl.LOCK_SH):
                        return  # others use it
                finally:
                    os.close(users)
            with locked(self.users_lock, fcntl.LOCK_SH):
                pass  # the keeper was quicker, and has stopped it now

    def _make_home(self) -> None:
        mode = 0o700
        if self.plan.account:
            mode = 0o711
            if self.plan.note:
                own_dir(ROOT_HOME, 0o755)
                own_dir(self.home.parent, mode)
        self.home.parent.mkdir(parents=True, exist_ok=True)
        own_dir(self.home, mode)

    # Start, under start.lock

    def ensure(self) -> str:
        """Start the server unless it runs, and return its socket directory when it answers."""
        deadline = time.monotonic() + START_SECONDS
        lock = open_lock(self.postgres.lock)
        try:
            while not try_lock(lock, fcntl.LOCK_EX):
                if (run := self.postgres.answers()) is not None:
                    self._mark_throwaway(new=False)
                    return run
                self.postgres.check_deadline(deadline, "does not answer")
                time.sleep(POLL_SECONDS)  # its children end soon after a killed postmaster
            self.postgres.launch(self._prepare(lock), lock)
        finally:
            os.close(lock)  # the server has it now
        try:
            return self.postgres.await_ready(deadline)
        except BaseException:
            self._stop()
            raise

    def _prepare(self, lock: int) -> Path:
        """Clear up after a former server, make missing data, and return the socket directory."""
        # No process of this server lives (see Note [Locks]): what these files say is stale, and
        # their process numbers may be those of strangers by now.
        (self.data / "postmaster.pid").unlink(missing_ok=True)
        run = self._make_run()
        for name in (SOCKET, f"{SOCKET}.lock"):
            (run / name).unlink(missing_ok=True)
        note = self.plan.note
        if note and not note.exists():
            shutil.rmtree(self.data, ignore_errors=True)  # base was deleted, so its data go too
            note.write_text(
                f"The data of this directory are in {self.data}\nbecause the user that the server "
                "runs as cannot enter this one.\n"
                "Deleting this file deletes them at the next start.\n"
            )
        new = not self.data.exists()
        self._mark_throwaway(new=new)
        if new:
            self._make_data(lock)
        return run

    def _make_data(self, lock: int) -> None:
        # Renamed when complete: PG_VERSION, by which a cluster is known, is one of the first files.
        new = self.home / "data.new"
        shutil.rmtree(new, ignore_errors=True)
        self._give_dir(new)
        initdb(self.plan, new, lock)
        new.rename(self.data)

    def _mark_throwaway(self, *, new: bool) -> None:
        if self.plan.keep:
            self.throwaway.unlink(missing_ok=True)
        elif new:
            self.throwaway.touch()

    def _make_run(self) -> Path:
        """Make the socket's directory: in home, or a short one in /tmp if that path is too long."""
        run = self.home / "run"
        if socket_fits(run):
            self._give_dir(run)
            return run
        record = self.home / "socket-directory"  # so that it stays the same from start to start
        with suppress(FileNotFoundError, EmbeddedError):
            run = Path(record.read_text())
            own_dir(run, 0o700)
            return run
        run = Path(tempfile.mkdtemp(prefix="pgbackend-", dir="/tmp"))
        record.write_text(str(run))
        return run

    def _give_dir(self, path: Path) -> None:
        path.mkdir(mode=0o700, exist_ok=True)
        path.chmod(0o700)
        if account := self.plan.account:
            os.chown(path, account.uid, account.gid, follow_symlinks=False)

    # End

    def finish(self, users: int) -> None:
        """Stop the server, and remove a throwaway one; under start.lock, with no user left."""
        if not is_at(users, self.users_lock):
            # The directory was deleted: one that is there now belongs to another server.
            self.postgres.stop_child()
            return
        self._stop()
        if self.throwaway.exists():
            self._discard()

    def _stop(self) -> None:
        self.postgres.stop()
        with suppress(OSError):  # there is none, or a server that could not be stopped uses it
            Path((self.home / "socket-directory").read_text()).rmdir()

    def _discard(self) -> None:
        # In one step: a new user makes a new home, or waits on a lock that it finds removed.
        trash = Path(tempfile.mkdtemp(prefix="discarded-", dir=self.home.parent))
        self.home.rename(trash / self.home.name)
        shutil.rmtree(trash, ignore_errors=True)
        if self.plan.note:
            self.plan.note.unlink(missing_ok=True)
        if self.plan.own_parent:
            with suppress(OSError):
                self.home.parent.rmdir()
