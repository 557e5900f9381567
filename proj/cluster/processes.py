"""Starts and ends processes so that none is left: also those that a child of ours has left behind.

Patroni starts PostgreSQL as a process of its own, which goes on when Patroni is killed. The keeper
declares itself the reaper of all its descendants: orphans become its children, and are found.
"""

import ctypes
import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_IPC_RMID = 0


def reap_orphans():
    """Make orphaned descendants children of this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def start(command, log, options):
    """Start a program in a session of its own; its output is added to a file."""
    with Path(log).open("ab") as output:
        return subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            **options,
        )


def descendants(pid=None):
    """Return the process numbers of all descendants that live or are not yet reaped."""
    found = []
    for task in Path(f"/proc/{pid or os.getpid()}/task").iterdir():
        with suppress(OSError):  # the thread or process has ended meanwhile
            for child in map(int, (task / "children").read_text().split()):
                found.append(child)
                with suppress(OSError):
                    found += descendants(child)
    return found


def reap():
    """Take leave of all ended children."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def reap_known(parts):
    """Take leave of ended orphans, after the parts that were started have got their exit status."""
    for part in parts:
        part.poll()
    reap()


def kill(pid, how=signal.SIGKILL):
    """Send a signal to a process, unless it is gone."""
    if pid:
        with suppress(ProcessLookupError):
            os.kill(pid, how)


def end_all(seconds=10):
    """End all descendants; return whether none is left."""
    deadline = time.monotonic() + seconds
    while True:
        reap()
        alive = descendants()
        if not alive or time.monotonic() > deadline:
            return not alive
        for pid in alive:
            kill(pid)
        time.sleep(0.02)


def postmaster(data):
    """Return the process number and the shared memory of a data directory's server, or None."""
    with suppress(FileNotFoundError):
        lines = Path(data, "postmaster.pid").read_text().splitlines()
        if len(lines) > 6:
            return int(lines[0]), int(lines[6].split()[1])
    return None


def drop_shared_memory(number):
    """Remove the segment by which a server tells that it lives; a killed one leaves it behind."""
    ctypes.CDLL(None).shmctl(number, _IPC_RMID, None)
