"""The keeper: a process of its own that starts a server, waits for its users to go, and stops it.

`ask_keeper` is called by a user and starts the process; `keep` is all that the process does. See
Note [Locks] in locks.py.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from .cluster import Cluster
from .errors import CURE, EmbeddedError
from .locks import locked, locked_or_none, open_lock
from .plan import Plan

# The package's directory comes last: nothing beside it may stand before the standard library.
_PROGRAM = (
    "import sys; sys.path.append(sys.argv[1]); from pgbackend.embedded.keeper import keep; keep()"
)


def ask_keeper(plan: Plan) -> str:
    """Let a keeper start a server, or find the one that runs; return its socket directory."""
    # Isolated and told where the package is, so that it needs neither the environment nor an
    # installed package. In a session of its own, so that Ctrl-C does not reach it.
    library = Path(__file__).absolute().parents[2]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _PROGRAM, library],
        input=plan.dump().encode(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        cwd="/",
        start_new_session=True,
    )
    said = done.stdout.decode(errors="replace")
    try:
        answer = json.loads(said)
    except ValueError:
        raise EmbeddedError(f"the keeper of {plan.home} failed: {said.strip()[-2000:]}") from None
    if "error" in answer:
        raise EmbeddedError(answer["error"])
    return str(answer["run"])


def keep() -> None:
    """Be the keeper: start, answer on standard output, wait for the users to go, stop."""
    plan = Plan.load(sys.stdin.read())
    if os.fork():
        os._exit(0)  # the caller reaps this process at once, and never has the keeper as a child
    cluster = Cluster(plan)
    try:
        with locked(cluster.start_lock, fcntl.LOCK_EX):
            run = cluster.ensure()
    except EmbeddedError as exc:
        _answer({"error": str(exc)})
    except OSError as exc:
        _answer({"error": f"PostgreSQL in {plan.home} cannot be started: {exc}. {CURE}"})
    else:
        _answer({"run": run})
        with suppress(FileNotFoundError):  # the directory was deleted, and the server with it
            _guard(cluster)


def _answer(answer: dict[str, str]) -> None:
    with suppress(BrokenPipeError):  # the caller was killed meanwhile: what it started is guarded
        os.write(1, json.dumps(answer).encode())
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)  # the caller reads up to the end
    os.close(null)


def _guard(cluster: Cluster) -> None:
    with locked_or_none(cluster.keeper_lock) as keeper:
        if keeper is None:
            return  # one keeper is enough
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        users = open_lock(cluster.users_lock)
        try:
            fcntl.flock(users, fcntl.LOCK_EX)  # granted when the last user is gone
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            _finish(cluster, users)
    # users.lock is still held: it goes when this process ends, after keeper.lock. The other way
    # round the keeper of a new user would find keeper.lock taken, and give up.


def _finish(cluster: Cluster, users: int) -> None:
    try:
        with locked(cluster.start_lock, fcntl.LOCK_EX):
            cluster.finish(users)
    except FileNotFoundError:
        cluster.postgres.stop_child()
