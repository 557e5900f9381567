"""Runs the order desk as a process, on a database without orders, for the pictures."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pgbackend import embedded

ROOT = Path(__file__).resolve().parents[2]
PASSWORD = "quince"  # noqa: S105 - of a server that ends with the command
#: By this name PostgreSQL's own view of its connections tells the desk's from all others.
NAME = "order-desk"


class Desk(NamedTuple):
    """The address of a running order desk, and the URL of its database."""

    address: str
    database: str


@contextmanager
def database():
    """Provide the server of ``DATABASE_URL``, or one of its own whose data go with it."""
    with embedded.server() as server:
        yield server.url


@contextmanager
def desk(url, *, pool, service_seconds, status_seconds=0.25):
    """Serve the order desk, with a pool of ``pool`` connections, until the block ends."""
    joint = "&" if "?" in url else "?"
    env = {
        **os.environ,
        "DATABASE_URL": f"{url}{joint}application_name={NAME}",
        "KITCHEN_PASSWORD": PASSWORD,
        "KITCHEN_SERVICE_SECONDS": str(service_seconds),
        "KITCHEN_SERVICE_TIMEOUT": "60",
        "KITCHEN_STATUS_SECONDS": str(status_seconds),
        "POOL_SIZE": str(pool),
        "PORT": "0",
    }
    env.pop("DJANGO_SETTINGS_MODULE", None)
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "proj"],
            cwd=ROOT,
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            yield Desk(_address(process, output), url)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)


def _address(process, output):
    """Wait until the desk prints its address; exit with its words if it ends instead."""
    for _ in range(600):
        output.seek(0)
        printed = output.read()
        if "Sign in as" in printed:
            return re.search(r"http://[\d.:]+", printed)[0]
        if process.poll() is not None:
            break
        time.sleep(0.1)
    sys.exit(f"proj.pictures: the order desk did not open:\n{printed}")
