"""Checks, when the driver is imported, that it was written for the installed psycopg and greenlet.

The driver overrides and calls private functions of psycopg and psycopg_pool, which a minor version
may change: the driver would then fail in the midst of a transaction. Installers keep to the same
ranges (pyproject.toml), unless they are told not to look at dependencies.
"""

from __future__ import annotations

from importlib import metadata

#: For each distribution: the lowest supported version, and the lowest that is too new, if any.
SUPPORTED: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None]] = {
    "psycopg": ((3, 3, 9), (3, 4)),
    "psycopg-pool": ((3, 3, 3), (3, 4)),
    "greenlet": ((3, 5, 3), None),
}
#: The distributions of a package that are to be installed in one version.
_WITH_EXTRAS = {"psycopg": "psycopg[binary]"}


def check() -> None:
    """Raise `ImportError` if a package of `SUPPORTED` is missing, too old or too new."""
    for name in SUPPORTED:
        if problem := problem_of(name):
            raise ImportError(problem)


def problem_of(name: str) -> str:
    """Return what is wrong with the installed version of `name`, and the cure; "" if nothing is."""
    least, too_new = SUPPORTED[name]
    allowed = f"{_WITH_EXTRAS.get(name, name)}>={_text(least)}"
    allowed += f",<{_text(too_new)}" if too_new else ""
    try:
        installed = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"pgbackend needs {name}, which is not installed: pip install '{allowed}'"
    numbers = tuple(int(part) for part in installed.split(".")[:3] if part.isdigit())
    if least <= numbers and (too_new is None or numbers < too_new):
        return ""
    return (
        f"pgbackend does not support {name} {installed}: pip install '{allowed}', or install "
        "another version of pgbackend"
    )


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
