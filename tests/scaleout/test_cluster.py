"""Tests that the demonstration serves, shows and steers its cluster, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from proj.cluster import processes, programs, steering
from tests.conftest import wait_for
from tests.support.processes import ROOT

pytestmark = pytest.mark.scaleout


class Demo:
    """``python -m proj.cluster`` as a process."""

    def __init__(self, folder: Path) -> None:
        self.note = folder / "note"
        self._output = folder / "output"
        self.environment = {
            **os.environ,
            "PORT": "0",
            "CLUSTER_NOTE": str(self.note),
            "KITCHEN_SERVICE_SECONDS": "0",
            "PYTHONUNBUFFERED": "1",
        }
        del self.environment["DJANGO_SETTINGS_MODULE"]
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "proj.cluster"],
                cwd=ROOT,
                env=self.environment,
                stdout=output,
                stderr=output,
                # As in a terminal, even if the parent of the tests ignores the signal.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )
        try:
            wait_for(self._is_open, "the demonstration opens", 90)
            assert self.process.poll() is None, self.output
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise
        self.home = Path(self.note.read_text())

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def address(self) -> str:
        found = re.search(r"http://[\d.:]+", self.output)
        assert found
        return found[0]

    def _is_open(self) -> bool:
        return "In another shell" in self.output or self.process.poll() is not None

    def command(self, *words: str) -> str:
        """Carry a command out, as in another shell."""
        return subprocess.run(
            [sys.executable, "-m", "proj.cluster", *words],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    def pids(self) -> set[int]:
        """Return all processes of the cluster."""
        return {*processes.descendants(self.process.pid)}


@contextmanager
def demo(folder: Path) -> Iterator[Demo]:
    running = Demo(folder)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()
        wait_for(lambda: not running.home.exists(), "the keeper ends", 20)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGKILL,
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        ),
    ],
)
@pytest.mark.usefixtures("needs")
def test_it_serves_shows_and_steers_its_cluster_and_leaves_nothing(
    tmp_path: Path, number: signal.Signals
) -> None:
    with demo(tmp_path) as running:
        with httpx.Client(base_url=running.address, trust_env=False, timeout=60) as client:
            _order(client)
            before = _leader(client)
            _switch_over(client)
            after = wait_for(lambda: _leader(client, but=before), "another primary", 20)
            _order(client)
        said = running.command("status")
        assert re.search(rf"^{after}  port \d+  leader, running$", said, re.MULTILINE), said
        assert len(re.findall("^haproxy ", said, re.MULTILINE)) == 6
        pids = running.pids()
        assert len(pids) > 5 + 3 * 5
        running.process.send_signal(number)
        running.process.wait(30)
        wait_for(lambda: not _alive(pids), "all processes end", 20)
        assert not running.home.exists()
        if number != signal.SIGKILL:
            assert running.output.endswith("The kitchen is closed.\n")
            assert not running.note.exists()
        assert "Traceback" not in running.output


def _alive(pids: set[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def _order(client: httpx.Client) -> None:
    dish = client.get("/api/menu/").json()["dishes"][0]["id"]
    lines = [{"dish": dish, "quantity": 2}]
    placed = client.post("/api/orders/", json={"table": "7", "lines": lines})
    assert placed.status_code == 201, placed.text
    for path in ("/", "/board/", "/status/", "/cluster/"):
        assert client.get(path).status_code == 200


def _leader(client: httpx.Client, but: str | None = None) -> Any:
    members = client.get("/cluster/topology.json").json()["members"]
    found = [each["name"] for each in members if (each["role"], each["state"]) == _LEADS]
    return found[0] if found and found[0] != but else None


_LEADS = ("leader", "running")


def _switch_over(client: httpx.Client) -> None:
    refused = client.post("/cluster/switchover/")
    assert refused.status_code == 403, "without a token against forgery"
    data = {"csrfmiddlewaretoken": client.cookies["csrftoken"]}
    done = client.post("/cluster/switchover/", data=data)
    assert done.status_code == 302, done.text


@pytest.mark.usefixtures("needs")
def test_a_cluster_that_cannot_be_started_says_why_and_leaves_nothing(monkeypatch) -> None:
    monkeypatch.setenv("HAPROXY", "/bin/false")
    with pytest.raises(steering.ClusterError, match="haproxy ended at its start"):
        with steering.cluster():
            pass


def test_a_missing_program_is_named_with_the_cure(monkeypatch) -> None:
    monkeypatch.setattr("proj.cluster.programs._SBIN", ())
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("HAPROXY", raising=False)
    with pytest.raises(programs.ClusterError, match="haproxy is not installed: 'make cluster'"):
        programs.find()
