"""Checks, when the driver is imported, that it was written for the installed psycopg.

The driver overrides and calls private functions of psycopg and psycopg_pool, which a minor version
may change: the driver would then fail in the midst of a transaction.
"""

from __future__ import annotations

from importlib import metadata

#: For each distribution: the lowest supported version, and the lowest that is too new.
SUPPORTED = {"psycopg": ((3, 3, 9), (3, 4)), "psycopg-pool": ((3, 3, 3), (3, 4))}


def check() -> None:
    """Raise `ImportError` if psycopg, or its pool, is too old or too new."""
    for name, (least, too_new) in SUPPORTED.items():
        installed = metadata.version(name)
        numbers = tuple(int(part) for part in installed.split(".")[:3] if part.isdigit())
        if not least <= numbers < too_new:
            allowed = f">={_text(least)},<{_text(too_new)}"
            raise ImportError(
                f"pgbackend does not support {name} {installed}: install '{name}{allowed}', or "
                "another version of pgbackend"
            )


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
