"""The error that this package raises, and the advice that several of its messages end with."""

from __future__ import annotations

CURE = (
    "Use a base directory that this user may write (and, as root, a PGBACKEND_EMBEDDED_USER that "
    "root may become), or set DATABASE_URL to a server that runs"
)


class EmbeddedError(RuntimeError):
    """No server could be found or started; the text says why, and what to do."""
