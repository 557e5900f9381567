"""Checks, when the driver is loaded, that psycopg is of a version that it was written against.

The driver overrides and calls private functions of psycopg and psycopg_pool, which a minor version
may change: what would go wrong then would go wrong in the midst of a transaction.
"""

from __future__ import annotations

from importlib import metadata

#: By distribution: the first version that may be used, and the first that may not.
SUPPORTED = {"psycopg": ((3, 3, 9), (3, 4)), "psycopg-pool": ((3, 3, 3), (3, 4))}


def check() -> None:
    """Raise `ImportError` if psycopg, or its pool, is too old or too new."""
    for name, (least, too_new) in SUPPORTED.items():
        installed = metadata.version(name)
        numbers = tuple(int(part) for part in installed.split(".")[:3] if part.isdigit())
        if not least <= numbers < too_new:
            allowed = f">={_text(least)},<{_text(too_new)}"
            raise ImportError(
                f"pgbackend does not know {name} {installed}: install '{name}{allowed}' "
                "(pip install does, together with pgbackend), or another version of pgbackend"
            )


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
