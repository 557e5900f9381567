"""Fetches the suite of the installed Django, from its source distribution, once."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import django

#: Git ignores this directory, and deleting it is harmless.
CACHE = Path(__file__).resolve().parents[2] / ".pgbackend" / "suite"


class NoSource(RuntimeError):
    """Says that the source distribution could not be had, why, and what to do."""


def tests_dir() -> Path:
    """Return Django's directory ``tests``, for the version that is installed."""
    home = CACHE / f"django-{django.__version__}"
    if not home.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        _unpack(_find_archive() or _download(), home)
    return home / "tests"


def modules_of(source: Path) -> list[str]:
    """Name the modules of the suite, as its ``runtests.py`` finds them."""
    code = "import runtests; print(*runtests.get_test_modules(gis_enabled=True))"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=True)
    return sorted(done.stdout.split())


def _find_archive() -> Path | None:
    # The case of the distribution's name has changed between releases.
    wanted = f"django-{django.__version__}.tar.gz"
    return next((path for path in CACHE.glob("*.tar.gz") if path.name.lower() == wanted), None)


def _download() -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", "django", "--dest", str(CACHE), f"Django=={django.__version__}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archive = _find_archive()
    if done.returncode or archive is None:
        raise NoSource(
            f"pip could not download the source of Django {django.__version__}; put its .tar.gz "
            f"into {CACHE} and try again. pip said:\n{done.stdout}{done.stderr}"
        )
    return archive


def _unpack(archive: Path, home: Path) -> None:
    """Unpack the archive into `home`, which appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        with tarfile.open(archive) as tar:
            if hasattr(tarfile, "data_filter"):  # Python 3.11.4 and later; required from 3.14 on
                tar.extraction_filter = tarfile.data_filter
            tar.extractall(temporary)
        (unpacked,) = Path(temporary).iterdir()
        try:
            unpacked.rename(home)
        except OSError:
            if not home.is_dir():  # another process was faster
                raise
