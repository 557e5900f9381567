"""Runs order desks as processes of their own, one for each way to the primary."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import httpx

from tests.conftest import wait_for
from tests.support.ports import free_port
from tests.support.processes import ROOT

POOL_SIZE = 6


def environment(home: str, way: str) -> dict[str, str]:
    """Return the environment of a desk that reaches the cluster's primary in this way."""
    given = {
        "DJANGO_SETTINGS_MODULE": "tests.scaleout.settings",
        "CLUSTER_HOME": home,
        "CLUSTER_WAY": way,
        "POOL_SIZE": str(POOL_SIZE),
        "SECRET_KEY": "tests",
        "PYTHONPATH": str(ROOT),
    }
    return {**os.environ, **given}


def manage(home: str, *command: str) -> None:
    """Run one of Django's management commands on the cluster's primary."""
    subprocess.run(
        [sys.executable, "-m", "django", *command],
        cwd=ROOT,
        env=environment(home, "haproxy"),
        check=True,
        stdout=subprocess.DEVNULL,
    )


@contextmanager
def desks(home: str, ways: tuple[str, ...], logs: Path) -> Iterator[dict[str, str]]:
    """Serve an order desk for each way; yield their addresses."""
    addresses = {way: f"http://127.0.0.1:{free_port()}" for way in ways}
    with ExitStack() as stack:
        started = {}
        for way, address in addresses.items():
            log = logs / f"{way}.log"
            started[way] = stack.enter_context(_desk(home, way, address, log)), log
        for way, (process, log) in started.items():
            ready = partial(_answers, process, addresses[way], log)
            wait_for(ready, f"the desk {way} answers", 30)
        yield addresses


@contextmanager
def _desk(home: str, way: str, address: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    port = address.rpartition(":")[2]
    command = [sys.executable, "-m", "uvicorn", "proj.asgi:application", "--port", port]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--log-level", "warning", "--timeout-graceful-shutdown", "3"],
            cwd=ROOT,
            env=environment(home, way),
            stdout=output,
            stderr=output,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        finally:
            process.kill()
            process.wait()


def _answers(process: subprocess.Popen[bytes], address: str, log: Path) -> bool:
    assert process.poll() is None, log.read_text()
    try:
        return httpx.get(f"{address}/api/menu/", trust_env=False).is_success
    except httpx.TransportError:
        return False
