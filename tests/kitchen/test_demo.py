"""Tests that ``python -m proj`` opens with one command, closes with one key, and leaves nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from tests.conftest import wait_for
from tests.kitchen.conftest import ROOT, Demo, url_of

DATABASE = "kitchen_demo"


@pytest.fixture
def empty_database(admin: psycopg.Connection[Any]) -> Iterator[str]:
    """Make an empty database; yield its URL. Dropping it fails while anybody is connected."""
    admin.execute(f"DROP DATABASE IF EXISTS {DATABASE}")
    admin.execute(f"CREATE DATABASE {DATABASE}")
    yield url_of(DATABASE)
    admin.execute(f"DROP DATABASE {DATABASE}")


@pytest.fixture
def start(tmp_path: Path, empty_database: str) -> Iterator[Any]:
    demos = []

    def start(**env: str) -> Demo:
        output = tmp_path / f"output-{len(demos)}"
        demos.append(demo := Demo(output, **{"DATABASE_URL": empty_database} | env))
        return demo

    yield start
    for demo in demos:
        demo.stop(signal.SIGKILL)


@pytest.mark.sweep(one_in=4)
@pytest.mark.parametrize("green", ["0", "1"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_its_pages_and_closes_on_a_signal(start, number, green) -> None:
    demo = start(KITCHEN_SERVICE_SECONDS="0", GREEN=green)
    with httpx.Client(base_url=demo.address(), trust_env=False) as client:
        dish = client.get("/api/menu/").json()["dishes"][0]["id"]
        lines = [{"dish": dish, "quantity": 2}]
        placed = client.post("/api/orders/", json={"table": "7", "lines": lines})
        assert placed.json()["promised_minutes"] == 12
        for path in (
            "/",
            "/board/",
            "/status/",
            "/sign-in/",
            "/health/ready/",
            "/static/kitchen/desk.css",
        ):
            assert client.get(path).status_code == 200
        # Open live pages must not hold the server, nor the server hold them.
        with (
            client.stream("GET", "/board/events/") as board,
            client.stream("GET", "/status/feed/") as status,
        ):
            feed = status.iter_text()
            assert any("event: numbers" in chunk for chunk in feed), "before it is stopped"
            assert demo.stop(number) == 0
            assert board.read().startswith(b"retry: ")
            "".join(feed)  # the stream ends in order
    banner, _, rest = demo.output.partition("Sign in as 'chef', password ")
    assert banner.split()[:3] == ["Quince", "is", "open."]
    assert rest.split(maxsplit=1)[1].strip() == "The kitchen is closed."


@pytest.mark.slow
@pytest.mark.parametrize("green", ["0", "1"])
def test_the_chef_signs_in_with_the_password_that_is_printed(start, green) -> None:
    demo = start(GREEN=green)
    with httpx.Client(base_url=demo.address(), trust_env=False) as client:
        password = demo.output.split("password ")[1].split()[0]
        client.get("/sign-in/")
        token = client.cookies["csrftoken"]
        data = {"username": "chef", "password": password, "csrfmiddlewaretoken": token}
        assert client.post("/sign-in/", data=data).status_code == 302
        assert client.get("/admin/").status_code == 200
        if green == "1":  # else Django warns that it reads the whole stream first
            assert client.get("/takings.csv").text.startswith("day,dish,portions,amount")


@pytest.mark.slow
def test_a_password_that_was_given_is_not_printed(start) -> None:
    demo = start(KITCHEN_PASSWORD="only the chef knows")
    demo.address()
    assert "password as in KITCHEN_PASSWORD" in demo.output
    assert "only the chef knows" not in demo.output


@pytest.mark.slow
def test_it_opens_again_with_what_was_there(start) -> None:
    first = start()
    orders = httpx.post(
        f"{first.address()}/api/orders/", json={"table": "7", "lines": []}, trust_env=False
    )
    assert orders.status_code == 400
    dishes = httpx.get(f"{first.address()}/api/menu/", trust_env=False).json()
    first.stop()
    second = start()
    assert httpx.get(f"{second.address()}/api/menu/", trust_env=False).json() == dishes


def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, **env}
    given.pop("DJANGO_SETTINGS_MODULE", None)
    command = [sys.executable, "-m", "proj", *args]
    return subprocess.run(
        command, cwd=ROOT, env=given, capture_output=True, text=True, check=False, timeout=60
    )


def test_a_taken_port_is_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run(PORT=str(port))
    assert done.returncode == 1
    assert done.stderr == (
        f"proj: cannot listen on 127.0.0.1:{port} (Address already in use): "
        "set PORT to another port\n"
    )


@pytest.mark.parametrize(
    ("args", "env", "says"),
    [
        ((), {"PORT": "http"}, "set PORT"),
        ((), {"PORT": "99999"}, "set PORT"),
        (("migrate",), {}, "'manage' and a command"),
        ((), {"PORT": "0", "DATABASE_URL": "nonsense"}, "malformed database URL"),
        ((), {"PORT": "0", "DATABASE_URL": "postgresql://127.0.0.1:1/x"}, "cannot be used"),
    ],
)
def test_what_cannot_be_is_said_without_a_traceback(args, env, says) -> None:
    done = run(*args, **env)
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


@pytest.mark.slow
def test_commands_of_django_pass_through(empty_database) -> None:
    done = run("manage", "migrate", "--check", DATABASE_URL=empty_database)
    assert done.returncode == 1, "nothing is migrated yet"
    assert run("manage", "check", DATABASE_URL=empty_database).returncode == 0
    missing = run("manage", "makemigrations", "--check", DATABASE_URL=empty_database)
    assert missing.returncode == 0, missing.stdout


@pytest.mark.slow
def test_a_kill_leaves_no_connection_behind(start, admin) -> None:
    demo = start()
    httpx.get(f"{demo.address()}/board/", trust_env=False)
    demo.stop(signal.SIGKILL)
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s"
    wait_for(lambda: admin.execute(query, [DATABASE]).fetchone() == (0,), "its connections to go")
