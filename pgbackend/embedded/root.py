"""Running as root: PostgreSQL refuses to, so another account runs the server.

This module chooses the account, finds out what it can reach, and copies the programs for it when
they are below a directory that it cannot enter.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import pwd
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .directories import own_dir, socket_fits
from .errors import EmbeddedError
from .locks import locked

# The directory in which root keeps binaries and data that the unprivileged user cannot reach
# elsewhere. Owned by root: a predictable name in a directory that all may write could be planted
# by someone else.
ROOT_HOME = Path("/var/lib/pgbackend")


@dataclass(frozen=True)
class Account:
    """The account that root runs the server as."""

    uid: int
    gid: int

    def reaches(self, path: Path) -> bool:
        """Return whether the account may execute this file, or enter this directory.

        The kernel is asked, since it knows access control lists too.
        """
        done = subprocess.run(
            ["/bin/sh", "-c", 'test -x "$1"', "sh", path],
            check=False,
            cwd="/",
            user=self.uid,
            group=self.gid,
            extra_groups=[],
        )
        return done.returncode == 0


def server_account() -> Account:
    """Return the account of ``PGBACKEND_EMBEDDED_USER``, else of ``postgres`` or ``nobody``."""
    given = os.environ.get("PGBACKEND_EMBEDDED_USER")
    for name in [given] if given else ["postgres", "nobody"]:
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            if entry.pw_uid != 0:
                return Account(entry.pw_uid, entry.pw_gid)
    raise EmbeddedError(
        "PostgreSQL refuses to run as root, and there is no unprivileged user "
        f"{given or 'postgres or nobody'!r}: set PGBACKEND_EMBEDDED_USER to one that exists, or "
        "set DATABASE_URL"
    )


def owner_of(data: Path) -> Account | None:
    """Return the account that data were made as, or None if there are none.

    They stay with it: the account that is chosen may be another one by now, because ``postgres``
    was installed since.
    """
    with suppress(FileNotFoundError):
        info = data.lstat()
        if info.st_uid != 0:
            return Account(info.st_uid, info.st_gid)
    return None


def root_may_use(base: Path, home: Path, account: Account) -> bool:
    """Return whether the data may be in `base` when root starts the server.

    Root gives files away below `base`, so nobody else may be able to put links there; and the
    server's account must reach it.
    """
    info = base.stat()
    own = info.st_uid == 0 and not info.st_mode & 0o022
    return own and socket_fits(home / "run") and account.reaches(base)


def reachable_bindir(bindir: Path, account: Account) -> Path:
    """Return the programs' directory, or that of a copy if the account cannot enter the first.

    An environment below root's home is the usual case: its permissions are not ours to change.
    """
    if account.reaches(bindir / "postgres"):
        return bindir
    info = (bindir / "postgres").stat()
    key = hashlib.sha256(
        b"%s %d %d" % (os.fsencode(bindir), info.st_mtime_ns, info.st_size)
    ).hexdigest()[:12]
    own_dir(ROOT_HOME, 0o755)
    copy = ROOT_HOME / f"bin-{key}"
    prefix = bindir.parent
    with locked(ROOT_HOME / "copy.lock", fcntl.LOCK_EX):
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
