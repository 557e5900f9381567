"""Shares the totals of several processes through a directory, for the one that is scraped.

Each process writes its totals to a file of its own, every few seconds and when it ends. While it
lives it holds the lock of another file. Who reads takes the lock of each file that is free: that
process has ended, so its counts are added to the file of the ended, and its connections are gone.
No signal or hook of a server is needed for that, and `SIGKILL` loses the last seconds only.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pgbackend.driver.forks import after_fork
from pgbackend.totals import Totals

logger = logging.getLogger("pgbackend.contrib")

#: Seconds between two snapshots of a process.
INTERVAL = 2.0

#: The file with the counts of the processes that have ended, and the lock of those who read.
_ENDED, _READERS = "pgbackend_ended.json", "pgbackend_readers.lock"


class Snapshots:
    """This process's part of a directory, in which several processes leave their totals."""

    def __init__(self, folder: Path, totals: Callable[[], list[Totals]]) -> None:
        self.folder = folder
        self._totals = totals
        self._lock_file: int | None = None
        self._thread: threading.Thread | None = None
        after_fork(self._start_in_child)

    def start(self) -> None:
        """Write a snapshot now, and then at an interval, in a thread; raise if it cannot be."""
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"PROMETHEUS_MULTIPROC_DIR is {str(self.folder)!r}, which is no directory: make it "
                "before the server starts"
            )
        self._begin()
        atexit.register(self.stop)

    def _begin(self) -> None:
        self._stopped, self._writing = threading.Event(), threading.Lock()
        self._name = f"pgbackend_{os.getpid()}_{secrets.token_hex(4)}"
        path = self.folder / f"{self._name}.lock"
        with _locked(self.folder / _READERS):  # who reads must not find the file before its lock
            self._lock_file = _open(path)
            fcntl.flock(self._lock_file, fcntl.LOCK_EX)
        self.write()
        self._thread = threading.Thread(target=self._write_often, name="pgbackend", daemon=True)
        self._thread.start()

    def _start_in_child(self) -> None:
        """Begin anew after a fork: the lock and the file are the parent's."""
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None
            try:
                self._begin()
            except OSError:
                logger.exception("the numbers of a forked child are not left in %s", self.folder)

    def stop(self) -> None:
        """Write the last snapshot, and end the thread."""
        if self._lock_file is None:
            return
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
        self._try_to_write()
        os.close(self._lock_file)
        self._lock_file = None

    def _write_often(self) -> None:
        while not self._stopped.wait(INTERVAL):
            self._try_to_write()

    def _try_to_write(self) -> None:
        try:
            self.write()
        except Exception:
            logger.exception("no snapshot of the pools could be written to %s", self.folder)

    def write(self) -> None:
        """Write this process's totals."""
        with self._writing:
            _write(self.folder / f"{self._name}.json", [each.to_json() for each in self._totals()])

    def read(self) -> tuple[list[Totals], int]:
        """Return the sums of all processes, and how many of them live."""
        self.write()
        found: dict[tuple[str, str], Totals] = {}
        with _locked(self.folder / _READERS):
            processes = self._fold_ended()
            _add(found, _read(self.folder / _ENDED).get("totals", []), ended=True)
            for path in processes:
                _add(found, _read(path), ended=False)
        return [found[key] for key in sorted(found)], len(processes)

    def _fold_ended(self) -> list[Path]:
        """Add the counts of ended processes to the file for them; return the others' files."""
        past = _read(self.folder / _ENDED)
        names = past.get("names", [])
        sums: dict[tuple[str, str], Totals] = {}
        _add(sums, past.get("totals", []), ended=True)
        living, gone = [], []
        for lock in sorted(self.folder.glob("pgbackend_*_*.lock")):
            path = lock.with_suffix(".json")
            if lock.stem != self._name and _is_free(lock):
                gone.append(path)
                if path.stem not in names:  # else its file was left when a reader ended
                    _add(sums, _read(path) or [], ended=True)
            elif path.exists():
                living.append(path)
        if gone:
            told = [each.to_json() for each in sums.values()]
            _write(self.folder / _ENDED, {"names": [path.stem for path in gone], "totals": told})
        for path in gone:
            path.unlink(missing_ok=True)
            path.with_suffix(".lock").unlink(missing_ok=True)
        return living


def _add(found: dict[tuple[str, str], Totals], records: Any, *, ended: bool) -> None:
    for record in map(Totals.from_json, records):
        key = (record.alias, record.kind)
        found.setdefault(key, Totals(*key)).merge(record, ended=ended)


def _read(path: Path) -> Any:
    """Return what `_write()` has written to `path`; an empty dictionary if there is no file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}


def _write(path: Path, value: object) -> None:
    """Write `value` so that a reader finds the old file or the new one, never a part."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(value))
    new.replace(path)


def _open(path: Path) -> int:
    """Return a descriptor of `path`, a file for a lock, which is made if need be.

    To read is enough for a lock, and the file may be another user's: a server may load the project
    as root, and let its workers run as somebody else.
    """
    return os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)


def _is_free(path: Path) -> bool:
    """Return whether no process holds the lock of `path`."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held; or another reader has removed it
        return False
    return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(_open(path)) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:  # closing it is not enough: a child that was forked meanwhile has it open, too
            fcntl.flock(file, fcntl.LOCK_UN)
