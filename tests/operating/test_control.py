"""Tests the socket of a process, by which `manage.py pgbackend status` and `dump` ask it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.core.handlers.wsgi import WSGIHandler
from django.core.management import call_command
from django.core.management.base import CommandError
from django.core.signals import request_started
from django.db import connection

from pgbackend import conf
from pgbackend.driver import loops
from pgbackend.management.commands.pgbackend import Command
from pgbackend.operating import control, directory, processes
from tests.conftest import Runner, wait_for
from tests.operating.projects import Project


@pytest.fixture
def within(tmp_path: Path, settings: Any) -> Iterator[Path]:
    """Let this process have its socket in a directory of the test's own; close it afterwards."""
    settings.PGBACKEND_CONTROL_DIR = str(tmp_path / "run")
    before = list(loops.when_opened)
    yield tmp_path / "run"
    control.stop()
    control._wait_no_longer()
    loops.when_opened[:] = before


def said(*arguments: str) -> str:
    """Return the output of ``manage.py pgbackend`` with `arguments`."""
    out = StringIO()
    call_command(Command(), *arguments, stdout=out)
    return out.getvalue()


def select() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")


# --- When the socket is opened --------------------------------------------------------------------


def test_the_first_async_pool_opens_the_socket(within: Path, run_once: Runner) -> None:
    control.start_when_serving()
    assert not within.exists(), "not while Django starts"

    async def main() -> dict[str, Any]:
        from pgbackend import aio

        await aio.run(select)
        return await asyncio.to_thread(processes.status, os.getpid())

    status = run_once(main())
    assert status["pid"] == os.getpid()
    assert [(pool["alias"], pool["requests"]) for pool in status["pools"]] == [("default", 1)]
    assert stat.S_IMODE(within.stat().st_mode) == 0o700
    assert stat.S_IMODE((within / f"{os.getpid()}.sock").stat().st_mode) == 0o600


def test_the_first_request_of_a_wsgi_server_opens_the_socket(within: Path) -> None:
    receivers = list(request_started.receivers)
    control.start_when_serving()
    request_started.send(sender=WSGIHandler, environ={})
    assert f"Process {os.getpid()} (" in said("status", "--all")
    assert list(request_started.receivers) == receivers, "later requests take no step more"


def test_requests_of_tests_open_no_socket(within: Path, client: Any) -> None:
    control.start_when_serving()
    client.get("/no/such/page/")
    assert not within.exists()


def test_the_setting_switches_the_socket_off(within: Path, settings: Any) -> None:
    settings.PGBACKEND_CONTROL_DIR = False
    before = list(loops.when_opened)
    control.start_when_serving()
    assert loops.when_opened == before
    with pytest.raises(CommandError, match="PGBACKEND_CONTROL_DIR is False"):
        said("status", "1")


@pytest.mark.parametrize("value", ["", "run", 3, True])
def test_a_wrong_setting_names_itself_and_the_cure(value: Any, settings: Any) -> None:
    settings.PGBACKEND_CONTROL_DIR = value
    with pytest.raises(ImproperlyConfigured, match="PGBACKEND_CONTROL_DIR is .* absolute path"):
        conf.control_directory()


# --- Who may use it -------------------------------------------------------------------------------


def test_a_directory_that_others_may_enter_is_not_used(
    within: Path, caplog: pytest.LogCaptureFixture
) -> None:
    within.mkdir(mode=0o755)
    control.start()
    control.start()
    assert not list(within.iterdir())
    (record,) = caplog.records
    assert f"chmod 700 {within}" in record.getMessage()


def test_a_directory_with_too_long_a_name_is_told(
    within: Path, settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    settings.PGBACKEND_CONTROL_DIR = str(within / ("long" * 25))
    control.start()
    assert "too long for a socket" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_another_user_gets_no_answer(within: Path, caplog: pytest.LogCaptureFixture) -> None:
    control.start()
    path = within / f"{os.getpid()}.sock"
    ask = (
        "import os, socket, sys\n"
        "os.setuid(65534)\n"
        "client = socket.socket(socket.AF_UNIX)\n"
        "client.connect(sys.argv[1])\n"
        "client.sendall(b'dump\\n')\n"
        "print(client.recv(1000))\n"
    )
    command = [sys.executable, "-c", ask, path]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "PermissionError" in refused.stderr, "by the directory"
    for each in (path, *[place for place in path.parents if str(place) != "/"]):
        if each == Path("/tmp"):
            break
        each.chmod(0o777)
    answered = subprocess.run(command, capture_output=True, text=True, check=True)
    assert answered.stdout == "b''\n", "by the process"
    assert "the user 65534 was refused" in caplog.text


def test_a_question_that_is_unknown_long_or_missing_harms_nothing(within: Path) -> None:
    control.start()
    path = within / f"{os.getpid()}.sock"
    for question in (b"what\n", b"x" * 100_000, b""):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(5)
            client.connect(str(path))
            try:
                client.sendall(question)
                client.shutdown(socket.SHUT_WR)
                client.recv(1000)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the rest of a long question is not read
    assert processes.status(os.getpid())["pid"] == os.getpid()


# --- How it ends ----------------------------------------------------------------------------------


def test_stopping_leaves_neither_file_nor_thread(within: Path) -> None:
    control.start()
    control.stop()
    assert not list(within.iterdir())
    wait_for(
        lambda: "pgbackend.control" not in {each.name for each in threading.enumerate()},
        "the thread ends",
    )


def test_sockets_of_dead_processes_are_removed_by_the_next_one(within: Path) -> None:
    within.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(within / "4000000.sock"))
        dead.listen()
    control.start()
    assert [each.name for each in within.iterdir()] == [f"{os.getpid()}.sock"]


# --- Questions about processes that do not answer -------------------------------------------------


def test_a_process_that_is_not_there_is_told(within: Path) -> None:
    with pytest.raises(CommandError, match=r"no process 999999999 .*status --all"):
        said("status", "999999999")


def test_a_process_without_the_app_is_told_with_the_cure(within: Path) -> None:
    with pytest.raises(CommandError, match="'pgbackend' is not in its INSTALLED_APPS"):
        said("dump", str(os.getpid()))


def test_a_process_id_or_all_is_needed(within: Path) -> None:
    for wrong in (["status"], ["status", "1", "--all"]):
        with pytest.raises(CommandError, match="pid"):
            said(*wrong)
    assert said("status", "--all") == "No process of this user has a socket of pgbackend's.\n"


def test_the_directories_of_another_login_are_looked_in_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, settings: Any
) -> None:
    settings.PGBACKEND_CONTROL_DIR = None
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    serves_in = directory.to_serve_in()
    assert serves_in == tmp_path / "pgbackend"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    serves_in_without = directory.to_serve_in()
    assert serves_in_without == tmp_path / f"pgbackend-{os.geteuid()}"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    found = directory.to_look_in(os.geteuid())
    assert {serves_in, serves_in_without} <= {*found}


# --- Programs -------------------------------------------------------------------------------------

_HANGS = """
import asyncio, sys
from django.db import connection
from pgbackend import aio

def the_code_that_hangs():
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
        print("ready", flush=True)
        sys.stdin.readline()  # holds up the event loop

asyncio.run(aio.run(the_code_that_hangs))
"""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path, PGBACKEND_CONTROL_DIR=str(tmp_path / "run"))


@pytest.mark.slow
def test_a_process_whose_loop_hangs_shows_its_pools_and_stacks(project: Project) -> None:
    with project.started(_HANGS) as process:
        status = project.run("pgbackend", "status", str(process.pid), "--format", "json")
        (shown,) = json.loads(status.check())
        text = project.run("pgbackend", "dump", str(process.pid)).check()
        listed = project.run("pgbackend", "status", "--all").check()
        process.communicate("\n")
    assert shown["pid"] == process.pid and shown["settings"] == "project_settings"
    assert [(pool["alias"], pool["leased"]) for pool in shown["pools"]] == [("default", 1)]
    assert "in the_code_that_hangs" in text and "1 of 10 leased" in text
    assert f"Process {process.pid} (started.py, project_settings)" in listed
    assert not list((project.home / "run").iterdir()), "the socket vanishes at exit"


_HANGS_IN_SYNC_CODE = """
import sys
from django.core.handlers.wsgi import WSGIHandler
from django.core.signals import request_started

def the_view_that_hangs():
    print("ready", flush=True)
    sys.stdin.readline()

request_started.send(sender=WSGIHandler, environ={})
the_view_that_hangs()
"""


@pytest.mark.slow
def test_a_worker_of_sync_code_shows_the_stacks_of_its_threads(
    project: Project, settings: Any
) -> None:
    settings.PGBACKEND_CONTROL_DIR = str(project.home / "run")
    with project.started(_HANGS_IN_SYNC_CODE) as process:
        text = processes.dump(process.pid)
    assert "Thread 'MainThread'" in text and "in the_view_that_hangs" in text
    assert "pgbackend.control" not in text


@pytest.mark.slow
def test_a_killed_process_leaves_a_socket_that_the_command_removes(project: Project) -> None:
    with project.started(_HANGS) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(list((project.home / "run").iterdir())) == 1
        said = project.run("pgbackend", "status", str(process.pid))
        assert said.returncode == 1 and "there is no process" in said.errors
        listed = project.run("pgbackend", "status", "--all").check()
    assert listed == "No process of this user has a socket of pgbackend's.\n"
    assert not list((project.home / "run").iterdir())


@pytest.mark.slow
def test_a_stopped_process_is_told_as_such(
    project: Project, monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    settings.PGBACKEND_CONTROL_DIR = str(project.home / "run")
    monkeypatch.setattr(processes, "PATIENCE", 0.5)
    with project.started(_HANGS) as process:
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(processes.NoAnswer, match=r"does not answer .* \(GIL\)"):
            processes.status(process.pid)
        (listed,) = processes.all_running()
        assert listed["pid"] == process.pid and "does not answer" in listed["error"]


_FORKS = """
import asyncio, os, sys
from django.db import connection
from pgbackend import aio

def select():
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")

asyncio.run(aio.run(select))
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
child = os.fork()
if child == 0:
    sys.stdin.read()
    os._exit(0)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_a_forked_child_has_a_socket_of_its_own(project: Project, settings: Any) -> None:
    settings.PGBACKEND_CONTROL_DIR = str(project.home / "run")
    with project.started(_FORKS) as parent:
        both = wait_for(
            lambda: len(found := list(processes.running())) == 2 and found, "the child serves"
        )
        assert parent.pid in both
        (child,) = {*both} - {parent.pid}
        assert {processes.status(pid)["pid"] for pid in both} == {parent.pid, child}
        assert processes.status(child)["pools"] == [], "those of the parent are forgotten"
        parent.kill()
        parent.wait()
        assert list(processes.running()) == [child], "nobody answers for the parent"
        os.kill(child, signal.SIGKILL)


_CHANGES_ITS_USER = """
import sys
from django.core.handlers.wsgi import WSGIHandler
from django.core.signals import request_started

os.setgid(65534)
os.setuid(65534)
request_started.send(sender=WSGIHandler, environ={})
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change its user")
def test_root_may_ask_a_process_that_has_changed_its_user(project: Project, settings: Any) -> None:
    run = project.home / "run"
    run.mkdir(mode=0o700)
    os.chown(run, 65534, 65534)
    for each in project.home.parents:
        if each == Path("/tmp"):
            break
        each.chmod(0o755)
    project.home.chmod(0o755)
    settings.PGBACKEND_CONTROL_DIR = str(run)
    with project.started(_CHANGES_ITS_USER) as process:
        assert processes.status(process.pid)["pid"] == process.pid


_FORKS_FIRST = """
import asyncio, os, sys
from django.db import connection
from pgbackend import aio

def select():
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")

child = os.fork()  # as a server that loads the project before it starts its workers
if child == 0:
    asyncio.run(aio.run(select))
    print("ready", flush=True)
    sys.stdin.read()
    os._exit(0)
sys.stdin.read()
"""


@pytest.mark.slow
def test_a_worker_that_is_forked_from_a_loaded_project_serves_and_its_parent_does_not(
    project: Project, settings: Any
) -> None:
    settings.PGBACKEND_CONTROL_DIR = str(project.home / "run")
    with project.started(_FORKS_FIRST) as parent:
        (child,) = processes.running()
        assert child != parent.pid
        assert processes.status(child)["pid"] == child
        os.kill(child, signal.SIGKILL)
