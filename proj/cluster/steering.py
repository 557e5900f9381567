"""Starts a cluster for a ``with`` block, and gives orders to its keeper."""

import json
import os
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from pgbackend.embedded.directories import temporary_base
from proj.cluster.layout import Layout
from proj.cluster.programs import ClusterError

ROOT = Path(__file__).resolve().parents[2]
#: The file in which a cluster that is served notes its directory, for commands in other shells.
NOTE = Path(os.environ.get("CLUSTER_NOTE") or ROOT / ".pgbackend" / "cluster")


@contextmanager
def cluster(first_port=None, **settings):
    """Run a cluster in a directory of its own; yield its description."""
    home = temporary_base()
    keeper = None
    try:
        layout = Layout.new(home, first_port, **settings)
        layout.write()
        keeper = _keep(home)
        yield layout
    finally:
        if keeper is not None:
            keeper.stdin.close()  # the keeper ends everything, and itself
            keeper.wait()
            keeper.stdout.close()
        shutil.rmtree(home, ignore_errors=True)


def _keep(home):
    """Start a keeper; return it when its cluster is complete."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    keeper = subprocess.Popen(
        [sys.executable, "-m", "proj.cluster.keeper", home],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        cwd="/",
        start_new_session=True,  # Ctrl-C does not reach it
    )
    try:
        said = keeper.stdout.readline()
        answer = json.loads(said) if said else {"error": "the keeper of the cluster failed"}
        if "error" in answer:
            raise ClusterError(answer["error"])
    except BaseException:
        keeper.stdin.close()
        keeper.wait()
        keeper.stdout.close()
        raise
    return keeper


def order(home, do, seconds=60, **arguments):
    """Give an order to the keeper of a cluster, and return its answer."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(seconds)
        try:
            connection.connect(str(Path(home, "control")))
            connection.sendall(json.dumps({"do": do, **arguments}).encode() + b"\n")
            answer = json.loads(connection.makefile().readline())
        except (OSError, ValueError) as error:
            raise ClusterError(f"the keeper of the cluster does not answer: {error}") from None
    if "error" in answer:
        raise ClusterError(answer["error"])
    return answer["done"]


@contextmanager
def noted(layout):
    """Note where the cluster is, for the block."""
    NOTE.parent.mkdir(exist_ok=True)
    NOTE.write_text(layout.home)
    try:
        yield
    finally:
        NOTE.unlink(missing_ok=True)


def served():
    """Return the description of the cluster that ``make cluster`` serves."""
    try:
        return Layout.read(os.environ.get("CLUSTER_HOME") or NOTE.read_text())
    except OSError:
        raise ClusterError("no cluster is served here: start one with 'make cluster'") from None
