"""The versions of the programs and packages that pgbackend works with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import pgbackend

_PACKAGES = ("Django", "psycopg", "psycopg-pool", "greenlet", "asgiref")
#: Packages that save time where they are installed, and what for.
OPTIONAL = {
    "uvloop": "a faster event loop, for uvicorn and granian",
    "httptools": "a faster parser of HTTP, for uvicorn",
}


def versions() -> dict[str, str]:
    """Return the version of each package by its name; "none" for one that is not installed."""
    return {
        "pgbackend": pgbackend.__version__,
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        **{name: installed(name) or "none" for name in (*_PACKAGES, *OPTIONAL)},
        **_of_psycopg(),
    }


def _of_psycopg() -> dict[str, str]:
    try:
        from psycopg import pq
    except ImportError as exc:  # not installed, or without a libpq: reports are to tell that
        return {"psycopg's implementation": f"none ({exc})"}
    return {"psycopg's implementation": pq.__impl__, "libpq": libpq()}


def installed(name: str) -> str | None:
    """Return the version of the package `name`; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def libpq() -> str:
    """Return the version of libpq, such as 18.0."""
    from psycopg import pq

    number = pq.version()
    return f"{number // 10_000}.{number % 10_000}"
