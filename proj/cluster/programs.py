"""Finds the programs of a cluster, and makes Patroni runnable for the account that runs PostgreSQL.

PostgreSQL refuses to run as root, so all parts run as another account then. If that account cannot
enter the environment with Patroni, a copy of Patroni is installed where it can.
"""

import fcntl
import hashlib
import os
import pwd
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from pgbackend.embedded.directories import own_dir
from pgbackend.embedded.errors import EmbeddedError
from pgbackend.embedded.locks import locked
from pgbackend.embedded.programs import find_bindir
from pgbackend.embedded.root import ROOT_HOME, reachable_bindir, server_account

_CURE = "'make cluster' installs what is missing, as root on Debian or Ubuntu"
_SBIN = ("/usr/sbin", "/usr/local/sbin", "/sbin")
_RUNS = "import sys, patroni, psycopg, pysyncobj; sys.exit(sys.version_info < (3, 9))"


class ClusterError(Exception):
    """The cluster cannot be started or steered; the message says why, and what to do."""


@dataclass
class Programs:
    """The programs, and the account that they run as (None: that of this process)."""

    bindir: Path
    haproxy: str
    pgbouncer: str
    python: str
    library: Path | None
    account: object

    def options(self, home):
        """Return the arguments of ``Popen`` for a part of the cluster."""
        environment = {
            "PATH": f"{self.bindir}:/usr/bin:/bin:/usr/sbin",
            "HOME": str(home),
            "LC_ALL": "C.UTF-8",
            "TZ": "UTC",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        if path := self.library or (self.account is None and os.environ.get("PYTHONPATH")):
            environment["PYTHONPATH"] = str(path)
        return {"cwd": "/", "env": environment, **as_account(self.account)}


def as_account(account):
    """Return the arguments of ``Popen`` for running a program as an account."""
    if account is None:
        return {}
    return {"user": account.uid, "group": account.gid, "extra_groups": []}


def find():
    """Return the programs of a cluster; raise ``ClusterError`` if one is missing."""
    if not sys.platform.startswith("linux"):
        raise ClusterError(f"the cluster needs Linux, and this is {sys.platform}")
    try:
        account = server_account() if os.geteuid() == 0 else None
        bindir = find_bindir()
        bindir = bindir if account is None else reachable_bindir(bindir, account)
    except EmbeddedError as error:
        raise ClusterError(str(error)) from None
    for name in ("pg_basebackup", "pg_rewind", "pg_controldata"):
        if not (bindir / name).exists():
            raise ClusterError(f"{bindir} has no {name}: name another by PGBACKEND_PG_BINDIR")
    proxies = _program("haproxy"), _program("pgbouncer")
    return Programs(bindir, *proxies, *_patroni(account), account)


def missing():
    """Return why no cluster can be started here, or None."""
    try:
        _program("haproxy"), _program("pgbouncer"), _version_of_patroni()
    except ClusterError as error:
        return str(error)
    return None


def _program(name):
    path = os.pathsep.join([os.environ.get("PATH", ""), *_SBIN])
    found = os.environ.get(name.upper()) or shutil.which(name, path=path)
    if not found:
        raise ClusterError(f"{name} is not installed: {_CURE}")
    return found


def _version_of_patroni():
    try:
        return metadata.version("patroni")
    except metadata.PackageNotFoundError:
        raise ClusterError(f"Patroni is not installed in {sys.prefix}: {_CURE}") from None


def _patroni(account):
    """Return a Python that runs Patroni as the account, and a directory for its path or None."""
    version = _version_of_patroni()
    if account is None:
        return sys.executable, None
    pythons = [sys.executable, sys._base_executable, "/usr/bin/python3"]  # noqa: SLF001
    for python in filter(account.reaches, map(Path, pythons)):
        if _runs(python, account, None):
            return str(python), None
        library = _install(python, version)
        if _runs(python, account, library):
            return str(python), library
    name = pwd.getpwuid(account.uid).pw_name
    raise ClusterError(
        f"the user {name!r}, as whom Patroni must run, can execute none of {', '.join(pythons)}: "
        "install Debian's python3, or run as a user that is not root"
    )


def _runs(python, account, library):
    environment = {"PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    if library:
        environment["PYTHONPATH"] = str(library)
    done = subprocess.run(
        [python, "-c", _RUNS],
        check=False,
        capture_output=True,
        cwd="/",
        env=environment,
        **as_account(account),
    )
    return done.returncode == 0


def _install(python, version):
    """Install this release of Patroni for another Python, once; return its directory."""
    key = hashlib.sha256(f"{python.resolve()} {version}".encode()).hexdigest()[:12]
    own_dir(ROOT_HOME, 0o755)
    library = ROOT_HOME / f"patroni-{key}"
    with locked(ROOT_HOME / "patroni.lock", fcntl.LOCK_EX):
        if not library.exists():
            print(f"Installing Patroni {version} for {python}, once ...", file=sys.stderr)
            part = library.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            _pip_install(python, version, part)
            part.rename(library)
    return library


def _pip_install(python, version, target):
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    command += ["--disable-pip-version-check", "--root-user-action=ignore", "--target", target]
    old = os.umask(0o022)
    try:
        done = subprocess.run(
            [*command, f"patroni[psycopg3,raft]=={version}"],
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    finally:
        os.umask(old)
    if done.returncode != 0:
        said = done.stdout.strip()[-1000:]
        raise ClusterError(f"pip cannot install Patroni {version} for {python}: {said}")
