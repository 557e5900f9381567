"""Provides fixtures of the backend's tests."""

from __future__ import annotations

from tests.support.fixtures import (  # noqa: F401 - pytest's
    fresh_tables,
    leases,
    make_books,
    site,
    threads,
    transactional_db,
)
